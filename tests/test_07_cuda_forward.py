"Tests of 07_cuda_forward. Generated from nbs/07_cuda_forward.ipynb: edit that, then run pythia_book build."
import json
import math
import pytest
import time
import torch
from pathlib import Path
from pythia_nb import patterns as P
from pythia_nb.cuda_forward import (
    FORWARD, HEAD_DIMS, compile_report, cuda_forward, forward_tile, kernel_source, simulate_row, source_hash,
)
from pythia_nb.layout import BlockLayout
from pythia_nb.reference import attention_oracle, low_precision_reference, row_queries


def simulated(q, k, v, layout, BN, kv_lengths=None):
    "The simulation for all rows, heads and sequences"
    o, lse = torch.zeros_like(q), torch.full(q.shape[:3], -math.inf)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for r in range(layout.nQ):
                x = row_queries(layout, r)
                o[b, h, x], lse[b, h, x] = simulate_row(q[b, h], k[b, h], v[b, h], layout, r, h if layout.heads > 1 else 0, BN, q.shape[-1]**-0.5,
                                                        None if kv_lengths is None else int(kv_lengths[b]))
    return o, lse

@pytest.mark.parametrize("N, BN", [(64, 32), (32, 32), (16, 32), (128, 64), (16, 64)])
@pytest.mark.parametrize("causal", [True, False])
def test_simulation_equals_the_oracle(N, BN, causal):
    for L, S, lengths in [(150, 150, None), (70, 150, torch.tensor([130, 0])), (150, 90, None)]:
        layout = P.per_head([P.bigbird(1, 1, 1), P.strided(2), P.local(2)]).layout(L, S, N, causal)
        q, k, v = torch.randn(2, 3, L, 32), torch.randn(2, 3, S, 32), torch.randn(2, 3, S, 32)
        o, lse = simulated(q, k, v, layout, BN, lengths)
        expected = attention_oracle(q, k, v, layout, kv_lengths=lengths)
        torch.testing.assert_close(o.double(), expected[0], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(lse.double(), expected[1], atol=2e-5, rtol=1e-4)


def assert_compiles_without_spills(source, arch):
    done, log = compile_report(source, arch)
    assert done, log
    assert log.count(" 0 bytes spill stores, 0 bytes spill loads") == log.count("spill stores") >= 1, log

@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("N", [16, 32, 64, 128])
@pytest.mark.parametrize("D", HEAD_DIMS)
def test_every_variant_compiles_without_spills(D, N, arch):
    assert_compiles_without_spills(kernel_source(FORWARD, D, N, *forward_tile(D, N)), arch)

def test_fp16_compiles_and_mistakes_are_reported():
    assert_compiles_without_spills(kernel_source(FORWARD, 64, 64, *forward_tile(64, 64), bf16=False), "sm_80")
    done, log = compile_report(kernel_source("this is no code", 64, 64, 64, 1), "sm_80")
    assert not done and "error" in log


def gpu_problem(D, N, dtype, kind, B=2, H=3):
    "A random problem on the GPU: kind 0 plain, 1 strided views and lists for each head, 2 documents and key counts, 3 very negative scores"
    L = int(torch.randint(1, 5 * N, ()))
    S = L if kind in (0, 3) else int(torch.randint(1, 6 * N, ()))
    causal = kind != 1
    start = S - L if causal else 0
    nQ = -(-(start + L) // N) - start // N
    layout = BlockLayout.from_block_mask(torch.rand(H if kind == 1 else 1, nQ, -(-S // N)) < 0.6, N, causal, L, S).to("cuda")
    def make(n): return torch.randn(B, n, H, D, device="cuda").transpose(1, 2) if kind == 1 else torch.randn(B, H, n, D, device="cuda")
    q, k, v = make(L), make(S), make(S)
    if kind == 3: q = q * 20 - 60
    kw = dict(segment_ids=tuple(torch.randint(0, 2, (B, n), device="cuda") for n in (L, S)), kv_lengths=torch.randint(0, S + 1, (B,), device="cuda")) if kind == 2 else {}
    return [t.to(dtype) for t in (q, k, v)], layout, kw


@pytest.mark.cuda
@pytest.mark.parametrize("kind", range(4))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("N", [16, 32, 64, 128])
@pytest.mark.parametrize("D", HEAD_DIMS)
def test_forward_on_the_gpu(D, N, dtype, kind):
    (q, k, v), layout, kw = gpu_problem(D, N, dtype, kind)
    poison = torch.full((64 << 20,), float("nan"), device="cuda"); del poison    # freed memory that the outputs will be made from
    o, lse = cuda_forward(q, k, v, layout, D**-0.5, kw.get("segment_ids"), kw.get("kv_lengths"))
    exact_o, exact_lse = attention_oracle(q, k, v, layout, **kw)
    reference = low_precision_reference(q, k, v, torch.zeros_like(q), None, layout, **kw)
    assert torch.equal(lse.isfinite(), exact_lse.isfinite()) and not o.isnan().any()
    allowed = 2 * (reference["o"].double() - exact_o).abs().max() + torch.finfo(dtype).eps * exact_o.abs().max()
    assert (o.double() - exact_o).abs().max() <= allowed
    finite = exact_lse.isfinite()
    assert not finite.any() or (lse.double() - exact_lse)[finite].abs().max() <= 1e-5 * (1 + exact_lse[finite].abs().max())


@pytest.mark.cuda
def test_calling_is_light():
    (q, k, v), layout, _ = gpu_problem(64, 16, torch.bfloat16, 0)
    for _ in range(20): cuda_forward(q, k, v, layout, 0.125, None, None)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(300): cuda_forward(q, k, v, layout, 0.125, None, None)
    assert (time.perf_counter() - start) / 300 < 100e-6    # seconds; the measured value is in the result file


@pytest.mark.cuda
def test_streams_graphs_and_repeats():
    (q, k, v), layout, _ = gpu_problem(64, 64, torch.bfloat16, 0)
    first = cuda_forward(q, k, v, layout, 0.125, None, None)
    for _ in range(20): assert all(torch.equal(a, b) for a, b in zip(first, cuda_forward(q, k, v, layout, 0.125, None, None)))
    other = torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(other): side = cuda_forward(q, k, v, layout, 0.125, None, None)
    other.synchronize()
    assert torch.equal(side[0], first[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph): captured = cuda_forward(q, k, v, layout, 0.125, None, None)
    new = torch.randn_like(q); expected = cuda_forward(new, k, v, layout, 0.125, None, None)[0]
    q.copy_(new); graph.replay(); torch.cuda.synchronize()
    assert torch.equal(captured[0], expected)


def test_the_sources_are_the_ones_that_passed_on_a_gpu():
    verified = json.loads((Path(__file__).parent.parent / "nbs/results/h200/verified.json").read_text())
    assert verified["cuda_forward"] == source_hash(FORWARD), "the kernels were edited since they last passed on a GPU: run pytest -m cuda there"
    grid = len(HEAD_DIMS) * 4 * 2 * (4 + 3)    # head dims, block sizes, types; kinds of problems forward and backward
    assert verified["passed"] >= grid and verified["failed"] == 0
