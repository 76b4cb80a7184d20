"Tests of 07a_cuda_small_blocks. Generated from nbs/07a_cuda_small_blocks.ipynb: edit that, then run pythia_book build."
import json
import math
import pytest
import torch
from pathlib import Path
from pythia_nb import patterns as P
from pythia_nb.cuda_basics import check_compiles
from pythia_nb.cuda_forward import cuda_forward, simulate_work
from pythia_nb.cuda_small import (
    SMALL_HEAD_DIMS, forward_by_block, simulate_warp, small_forward_body, small_forward_hash, small_forward_tile,
    small_shared, small_source,
)
from pythia_nb.layout import BlockLayout
from pythia_nb.reference import attention_oracle, check_forward, hard_problem
from pythia_nb.schedule import schedule


@pytest.mark.parametrize("N, EN, E, causal", [(16, 4, 2, True), (16, 2, 2, False), (32, 2, 1, True), (32, 1, 1, False)])
def test_the_simulated_warps_equal_the_oracle(N, EN, E, causal):
    L, S, D, H = 5 * N + 7, 8 * N - 3, 32, 2
    start = S - L if causal else 0
    nQ = -(-(start + L) // N) - start // N
    mask = torch.rand(H, nQ, -(-S // N)) < 0.5
    mask[0, 1] = False; mask[1, 0] = True    # a row that sees nothing, and a long one
    layout = BlockLayout.from_block_mask(mask, N, causal, L, S)
    q, k, v = torch.randn(1, H, L, D), torch.randn(1, H, S, D), torch.randn(1, H, S, D)
    q[:, 1] -= 30    # very negative scores
    exact_o, exact_lse = attention_oracle(q.double(), k.double(), v.double(), layout, kv_lengths=torch.tensor([S - 5]))
    plan = schedule(layout, False, 64 // N, 1 << 20)
    o, lse = torch.full((H, L, D), math.nan), torch.full((H, L), math.nan)
    for item in range(plan.counts[0].item()):
        head, w = plan.items[item, 0].item() // plan.lists, simulate_work(plan, item, N, 64, layout.q_start // N)
        for row0 in range(0, 64, 16):
            acc, m, l = simulate_warp(q[0, head], k[0, head], v[0, head], layout, w, row0, EN, E, D**-0.5, S - 5)
            x = torch.tensor(w.first[row0:row0 + 16]) - layout.q_start
            there = (torch.tensor(w.first[row0:row0 + 16]) >= 0) & (x >= 0) & (x < L)
            o[head, x[there]] = torch.where(l > 0, acc / l, 0)[there]
            lse[head, x[there]] = (m * D**-0.5 + torch.log2(l) * math.log(2))[there, 0]
    assert torch.equal(lse.isfinite(), exact_lse[0].isfinite())
    torch.testing.assert_close(o.double(), exact_o[0], atol=1e-4, rtol=1e-4)
    finite = lse.isfinite()
    torch.testing.assert_close(lse[finite].double(), exact_lse[0][finite], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("N", [16, 32])
@pytest.mark.parametrize("D", SMALL_HEAD_DIMS)
def test_every_variant_compiles_without_spills(D, N):
    check_compiles(small_source(small_forward_body(), D, N, small_forward_tile(D)))

def test_fp16_compiles(): check_compiles(small_source(small_forward_body(), 64, 16, small_forward_tile(64), bf16=False))

@pytest.mark.parametrize("D", SMALL_HEAD_DIMS)
def test_launch_parameters_fit_every_gpu(D):
    t = small_forward_tile(D)
    assert t.threads == 128 and small_shared(t, D) <= 99 * 1024 and (small_shared(t, D) + 1024) * t.CTAS <= 228 * 1024


@pytest.mark.cuda
@pytest.mark.parametrize("kind", range(4))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("N", [16, 32])
@pytest.mark.parametrize("D", SMALL_HEAD_DIMS)
@pytest.mark.parametrize("blocks", [12, 70])    # 70: lists of more than one window
def test_forward_on_the_gpu(D, N, dtype, kind, blocks):
    (q, k, v), layout, kw = hard_problem(D, N, dtype, kind, blocks)
    poison = torch.full((64 << 20,), float("nan"), device="cuda"); del poison    # freed memory that the outputs will be made from
    o, lse = forward_by_block(q, k, v, layout, D**-0.5, kw.get("segment_ids"), kw.get("kv_lengths"))
    check_forward(o, lse, q, k, v, layout, **kw)


@pytest.mark.cuda
def test_repeats_have_the_same_bits_and_long_rows_are_split():
    layout = (P.local(4) | P.sinks(2) | P.strided(8)).layout(20_000, block=16, device="cuda")    # rows of up to 160 entries, cut into parts
    q, k, v = (torch.randn(1, 2, 20_000, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    first = forward_by_block(q, k, v, layout, 0.125, None, None)
    for _ in range(20): assert all(torch.equal(a, b) for a, b in zip(first, forward_by_block(q, k, v, layout, 0.125, None, None)))
    other = cuda_forward(q, k, v, layout, 0.125, None, None)
    torch.testing.assert_close(first[1], other[1], atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(first[0].float(), other[0].float(), atol=2e-2, rtol=2e-2)


def test_the_sources_are_the_ones_that_passed_on_a_gpu():
    verified = json.loads((Path(__file__).parent.parent / "nbs/results/h200/verified.json").read_text())
    assert verified["cuda_small"] == small_forward_hash(), "the kernels were edited since they last passed on a GPU: run pytest -m cuda there"
