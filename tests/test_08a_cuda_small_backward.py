"Tests of 08a_cuda_small_backward. Generated from nbs/08a_cuda_small_backward.ipynb: edit that, then run pythia_book build."
import json
import math
import pytest
import torch
from hypothesis import given, settings, strategies as st
from pathlib import Path
from pythia_nb import patterns as P
from pythia_nb.cuda_backward import cuda_backward
from pythia_nb.cuda_basics import check_compiles
from pythia_nb.cuda_small import SMALL_HEAD_DIMS, forward_by_block, small_shared, small_source
from pythia_nb.cuda_small_backward import (
    simulate_small_backward, small_backward, small_backward_hash, small_bodies, small_columns_tile, small_rows_tile,
)
from pythia_nb.layout import BlockLayout
from pythia_nb.reference import as_function, attention_oracle, check_attention, gradients, hard_problem, sized_problem


@pytest.mark.parametrize("N, EN, E, causal", [(16, 4, 2, True), (16, 2, 1, False), (32, 2, 1, True), (32, 1, 1, False)])
def test_the_simulated_warps_equal_the_oracle(N, EN, E, causal, H=2, D=32):
    L, S = 5 * N + 7, 8 * N - 3
    start = S - L if causal else 0
    nQ = -(-(start + L) // N) - start // N
    mask = torch.rand(H, nQ, -(-S // N)) < 0.5
    mask[:, :, 0] = True; mask[0, 1] = False    # a long column, a row that sees nothing
    layout = BlockLayout.from_block_mask(mask, N, causal, L, S)
    q, k, v, do, dlse = torch.randn(1, H, L, D), torch.randn(1, H, S, D), torch.randn(1, H, S, D), torch.randn(1, H, L, D), torch.randn(1, H, L)
    exact = gradients(attention_oracle, q.double(), k.double(), v.double(), do, dlse, layout)
    dlse = dlse.masked_fill(exact["lse"] == -math.inf, 0)
    for head in range(H):
        got = simulate_small_backward(*(t[0, head] for t in (q, k, v, do, dlse, exact["o"].float(), exact["lse"].float())), layout, D**-0.5, head, EN, E)
        for name, result in zip(("dq", "dk", "dv"), got): torch.testing.assert_close(result.double(), exact[name][0, head], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("N", [16, 32])
@pytest.mark.parametrize("D", SMALL_HEAD_DIMS)
def test_every_variant_compiles_without_spills(D, N):
    for columns, body, t in zip((False, True), small_bodies(), (small_rows_tile(D, N), small_columns_tile(D, N))):
        check_compiles(small_source(body, D, N, t, True, columns, 2))

def test_fp16_compiles():
    for columns, body, t in zip((False, True), small_bodies(), (small_rows_tile(64, 16), small_columns_tile(64, 16))): check_compiles(small_source(body, 64, 16, t, False, columns, 2))

@pytest.mark.parametrize("N", [16, 32])
@pytest.mark.parametrize("D", SMALL_HEAD_DIMS)
def test_launch_parameters_fit_every_gpu(D, N):
    for columns, t in ((False, small_rows_tile(D, N)), (True, small_columns_tile(D, N))):
        assert t.threads == 128 and t.BN <= t.threads and small_shared(t, D, columns, 2) <= 99 * 1024 and (small_shared(t, D, columns, 2) + 1024) * t.CTAS <= 228 * 1024


@pytest.mark.cuda
@pytest.mark.parametrize("kind", range(3))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("N", [16, 32])
@pytest.mark.parametrize("D", SMALL_HEAD_DIMS)
@pytest.mark.parametrize("blocks", [12, 70])    # 70: lists of more than one window
def test_gradients_on_the_gpu_within_budget(D, N, dtype, kind, blocks):
    (q, k, v), layout, kw = hard_problem(D, N, dtype, kind, blocks)
    check_attention(as_function(forward_by_block, small_backward), q, k, v, layout, **kw)


@pytest.mark.cuda
def test_twenty_runs_agree_and_long_lists_are_split():
    layout = (P.strided(32) | P.sinks(2) | P.local(2)).layout(8192, block=16, device="cuda")
    q, k, v, do = (torch.randn(2, 8, 8192, 64, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    o, lse = forward_by_block(q, k, v, layout, 0.125, None, None)
    rest = do, torch.randn_like(lse), q, k, v, o, lse, layout, 0.125, None, None
    first = small_backward(*rest)
    for _ in range(20): assert all(torch.equal(a, b) for a, b in zip(first, small_backward(*rest)))
    for a, b in zip(first, cuda_backward(*rest)): torch.testing.assert_close(a.float(), b.float(), atol=2e-2, rtol=2e-2)

@st.composite
def random_problem(draw):
    "Sizes, block, head dim, type and pattern of a random problem"
    return dict(N=draw(st.sampled_from([16, 32])), D=draw(st.sampled_from(SMALL_HEAD_DIMS)), L=draw(st.integers(1, 700)), S=draw(st.integers(1, 700)),
                H=draw(st.integers(1, 3)), causal=draw(st.booleans()), per_head=draw(st.booleans()), density=draw(st.floats(0, 1)),
                dtype=draw(st.sampled_from([torch.bfloat16, torch.float16])), seed=draw(st.integers(0, 1 << 30)))

@pytest.mark.cuda
@settings(max_examples=100, deadline=None)
@given(random_problem())
def test_random_layouts_on_the_gpu(c):
    (q, k, v), layout = sized_problem(**c)
    check_attention(as_function(forward_by_block, small_backward), q, k, v, layout)

@pytest.mark.cuda
def test_nan_is_not_hidden():
    layout = P.dense().layout(128, block=16, device="cuda")
    q, k, v, do = (torch.randn(1, 1, 128, 64, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    k[0, 0, 5, 5] = float("nan")
    o, lse = forward_by_block(q, k, v, layout, 0.125, None, None)
    assert small_backward(do, None, q, k, v, o, lse, layout, 0.125, None, None)[0][0, 0, 5:].isnan().any()


def test_the_sources_are_the_ones_that_passed_on_a_gpu():
    verified = json.loads((Path(__file__).parent.parent / "nbs/results/h200/verified.json").read_text())
    assert verified["cuda_small_backward"] == small_backward_hash(), "the kernels were edited since they last passed on a GPU: run pytest -m cuda there"
