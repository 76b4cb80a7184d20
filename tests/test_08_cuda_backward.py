"Tests of 08_cuda_backward. Generated from nbs/08_cuda_backward.ipynb: edit that, then run pythia_book build."
import json
import pytest
import torch
from pathlib import Path
from pythia_nb import patterns as P
from pythia_nb.cuda_backward import DKV, DQ, cuda_backward, dkv_parts, dkv_tile, dq_tile, simulate_column
from pythia_nb.cuda_forward import HEAD_DIMS, compile_report, cuda_forward, kernel_source, source_hash
from pythia_nb.layout import BlockLayout
from pythia_nb.reference import attention_oracle, check_attention, gradients, split_segments


@pytest.mark.parametrize("N, BN", [(64, 32), (16, 32), (32, 32)])
@pytest.mark.parametrize("causal", [True, False])
def test_column_simulation_equals_autograd(N, BN, causal):
    for L, S in [(100, 100), (40, 100), (100, 60)]:
        layout = P.per_head([P.bigbird(1, 1, 1), P.strided(2)]).layout(L, S, N, causal)
        q, k, v, do = torch.randn(1, 2, L, 16), torch.randn(1, 2, S, 16), torch.randn(1, 2, S, 16), torch.randn(1, 2, L, 16)
        exact = gradients(attention_oracle, *(t.double() for t in (q, k, v)), do, torch.zeros(1, 2, L), layout)
        delta = (do * exact["o"]).sum(-1).float()
        for h in range(2):
            parts = [simulate_column(*(t[0, h] for t in (q, k, v, do, exact["lse"].float(), delta)), layout, j, h, BN, 0.25) for j in range(layout.nK)]
            for name, got in zip(("dk", "dv"), zip(*parts)): torch.testing.assert_close(torch.cat(got).double(), exact[name][0, h], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("N", [16, 32, 64, 128])
@pytest.mark.parametrize("D", HEAD_DIMS)
def test_every_variant_compiles_without_spills(D, N, arch):
    variants = [(DQ, dq_tile(D, N), 3)] + [(DKV, dkv_tile(D, N), part) for part in dkv_parts(D)]
    for body, tile, part in variants:
        done, log = compile_report(kernel_source(body, D, N, *tile, part=part), arch)
        assert done, log
        assert log.count(" 0 bytes spill stores, 0 bytes spill loads") == log.count("spill stores") >= 1, log


class OnGpu(torch.autograd.Function):
    "Forward and backward kernels as one differentiable function, for the judge"
    @staticmethod
    def forward(ctx, q, k, v, layout, kw):
        segments = split_segments(layout, kw.get("segment_ids"))
        ctx.rest = (layout, q.shape[-1]**-0.5, segments, kw.get("kv_lengths"))
        o, lse = cuda_forward(q, k, v, *ctx.rest)
        ctx.save_for_backward(q, k, v, o, lse)
        return o, lse

    @staticmethod
    def backward(ctx, do, dlse): return *cuda_backward(do, dlse, *ctx.saved_tensors, *ctx.rest), None, None

def gpu_problem(D, N, dtype, kind, B=2, H=3):
    "A random problem on the GPU: kind 0 plain, 1 strided views and lists for each head, 2 documents and key counts"
    L = int(torch.randint(1, 5 * N, ()))
    S = L if kind == 0 else int(torch.randint(1, 6 * N, ()))
    causal = kind != 1
    start = S - L if causal else 0
    nQ = -(-(start + L) // N) - start // N
    layout = BlockLayout.from_block_mask(torch.rand(H if kind == 1 else 1, nQ, -(-S // N)) < 0.6, N, causal, L, S).to("cuda")
    def make(n): return torch.randn(B, n, H, D, device="cuda").transpose(1, 2) if kind == 1 else torch.randn(B, H, n, D, device="cuda")
    q, k, v = make(L), make(S), make(S)
    kw = dict(segment_ids=tuple(torch.randint(0, 2, (B, n), device="cuda") for n in (L, S)), kv_lengths=torch.randint(0, S + 1, (B,), device="cuda")) if kind == 2 else {}
    return [t.to(dtype) for t in (q, k, v)], layout, kw


@pytest.mark.cuda
@pytest.mark.parametrize("kind", range(3))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("N", [16, 32, 64, 128])
@pytest.mark.parametrize("D", HEAD_DIMS)
def test_gradients_on_the_gpu_within_budget(D, N, dtype, kind):
    (q, k, v), layout, kw = gpu_problem(D, N, dtype, kind)
    check_attention(lambda q, k, v, layout, **kw: OnGpu.apply(q, k, v, layout, kw), q, k, v, layout, **kw)


@pytest.mark.cuda
def test_gradients_have_the_same_bits_in_every_run():
    (q, k, v), layout, kw = gpu_problem(64, 64, torch.bfloat16, 2)
    rest = (layout, 0.125, split_segments(layout, kw["segment_ids"]), kw["kv_lengths"])
    o, lse = cuda_forward(q, k, v, *rest)
    do, dlse = torch.randn_like(o), torch.randn_like(lse)
    first = cuda_backward(do, dlse, q, k, v, o, lse, *rest)
    for _ in range(20): assert all(torch.equal(a, b) for a, b in zip(first, cuda_backward(do, dlse, q, k, v, o, lse, *rest)))


def test_the_sources_are_the_ones_that_passed_on_a_gpu():
    verified = json.loads((Path(__file__).parent.parent / "nbs/results/h200/verified.json").read_text())
    assert verified["cuda_backward"] == source_hash(DQ, DKV), "the kernels were edited since they last passed on a GPU: run pytest -m cuda there"
