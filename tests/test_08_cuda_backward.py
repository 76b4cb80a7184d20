"Tests of 08_cuda_backward. Generated from nbs/08_cuda_backward.ipynb: edit that, then run pythia_book build."
import json
import math
import pytest
import torch
import types
from hypothesis import given, settings, strategies as st
from pathlib import Path
from pythia_nb import patterns as P
from pythia_nb.cuda_backward import (
    FINISH, MAIN, backward_hash, backward_parts, backward_shared, backward_tiles, cuda_backward, heads_at_once,
    simulate_backward,
)
from pythia_nb.cuda_basics import HEAD_DIMS, Operations, check_compiles, params_at
from pythia_nb.cuda_forward import cuda_forward, kernel_source
from pythia_nb.layout import BlockLayout
from pythia_nb.reference import (
    as_function, attention_oracle, check_attention, gradients, hard_problem, sized_problem, split_segments,
)
from pythia_nb.schedule import schedule
from unittest import mock


def backward_problem(N, causal, H=2, D=32):
    "A small problem with a row that sees nothing, a long column, ragged ends and lists for each head; and what the oracle says"
    L, S = 3 * N + 7, 5 * N - 3
    start = S - L if causal else 0
    nQ = -(-(start + L) // N) - start // N
    mask = torch.rand(H, nQ, -(-S // N)) < 0.6
    mask[:, :, 0] = True; mask[0, 1] = False
    layout = BlockLayout.from_block_mask(mask, N, causal, L, S)
    q, k, v, do, dlse = torch.randn(1, H, L, D), torch.randn(1, H, S, D), torch.randn(1, H, S, D), torch.randn(1, H, L, D), torch.randn(1, H, L)
    exact = gradients(attention_oracle, q.double(), k.double(), v.double(), do, dlse, layout)
    dlse = dlse.masked_fill(exact["lse"] == -math.inf, 0)
    return layout, [t[0] for t in (q, k, v, do, dlse, exact["o"].float(), exact["lse"].float())], {n: exact[n][0] for n in ("dq", "dk", "dv")}

@pytest.mark.parametrize("N, BN, causal", [(16, 32, True), (32, 64, False), (64, 32, True)])
def test_the_simulated_kernel_equals_the_oracle(N, BN, causal):
    layout, tensors, exact = backward_problem(N, causal)
    for head in range(2):
        got = simulate_backward(*(t[head] for t in tensors), layout, 32**-0.5, head, BN=BN, chunk=2)
        for name, result in zip(("dq", "dk", "dv"), got): torch.testing.assert_close(result.double(), exact[name][head], atol=2e-5, rtol=1e-4)

def test_the_order_of_the_thread_blocks_does_not_show_in_dq():
    layout, tensors, _ = backward_problem(32, True)
    one, other = (simulate_backward(*(t[0] for t in tensors), layout, 0.2, chunk=1, order=order)[0] for order in (range, torch.randperm))
    assert torch.equal(one, other)


@pytest.mark.parametrize("N", [16, 32, 64, 128])
@pytest.mark.parametrize("D", HEAD_DIMS)
def test_every_variant_compiles_without_spills(D, N):
    for t in backward_tiles(D, N):
        for part in backward_parts(D): check_compiles(kernel_source(MAIN, D, N, t, part=part))
        check_compiles(kernel_source(FINISH, D, N, t))

def test_fp16_compiles(): check_compiles(kernel_source(MAIN, 64, 64, backward_tiles(64, 64)[0], bf16=False))

@pytest.mark.parametrize("N", [16, 32, 64, 128])
@pytest.mark.parametrize("D", HEAD_DIMS)
def test_launch_parameters_fit_every_gpu(D, N):
    for t in backward_tiles(D, N):
        assert t.threads in (64, 128, 256) and t.BN <= t.threads and t.BN % t.BS == 0 and (t.BM % N == 0 or N % t.BM == 0) and t.group(N) <= 8
        assert 16 * t.MT <= max(N, 16) and (backward_shared(t, D) + 1152) * t.CTAS <= 228 * 1024
    assert backward_shared(backward_tiles(D, N)[-1], D) <= 99 * 1024 - 128


@given(L=st.integers(16, 1 << 20), D=st.sampled_from(HEAD_DIMS), wide=st.integers(1, 300), megabytes=st.integers(1, 126))
def test_groups_of_heads_are_few_and_none_is_small(L, D, wide, megabytes):
    gpu = types.SimpleNamespace(L2_cache_size=megabytes << 20)
    with mock.patch.object(torch.cuda, "get_device_properties", lambda device: gpu): n = heads_at_once.__wrapped__(L, D, wide, None)
    most = max(1, (1 if D <= 64 else 2) * (megabytes << 20) // (12 * L * D))    # what the cache holds
    groups = -(-wide // n)
    assert 1 <= n <= max(1, min(most, wide)) and groups <= -(-wide // min(most, wide)) and n * groups - wide < groups


def test_a_call_does_only_what_it_must(monkeypatch):
    "Without a GPU: the second call makes the gradients and one piece of memory, and asks for nothing else"
    launches, layout = [], P.local(1).layout(300, block=64)
    def kernel(blocks, arguments): launches.append((blocks, params_at(arguments)))
    for name, function in dict(backward_kernels=lambda *about: (backward_tiles(64, 64)[0], kernel, [kernel], kernel), heads_at_once=lambda *about: 6,
                               make_plan=lambda *about: schedule(layout, True, 1, 8), multiprocessors=lambda device: 132, combine_blocks=lambda *about: 0, clear=lambda work, size: launches.append(size)).items():
        monkeypatch.setitem(cuda_backward.__globals__, name, function)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, raising=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    q, k, v, o, do = (torch.randn(2, 300, 3, 64, dtype=torch.bfloat16).transpose(1, 2) for _ in range(5))
    lse, rest = torch.randn(2, 3, 300), (layout, 0.125, None, None)
    cuda_backward(do, lse, q, k, v, o, lse, *rest)
    for name in ("backward_kernels", "multiprocessors", "heads_at_once", "make_plan", "pack_params"): monkeypatch.setitem(cuda_backward.__globals__, name, None)
    launches.clear()
    with Operations() as seen: dq, dk, dv = cuda_backward(do, None, q, k, v, o, lse, *rest)
    assert seen.names == ["aten::empty_like"] * 3 + ["aten::new_empty"] and dq.stride() == q.stride()
    cleared, (_, params), (blocks, main), (finish, _) = launches
    assert main == params and blocks >= 5 * 2 * 3 and finish == 2 * 3 * 20 * 2 * 64 // 256 and cleared == 4 * 2 * 3 * 65 // 256 * 256 + 256
    assert params[:5] == tuple(t.data_ptr() for t in (q, k, v, o, do)) and params[5] == 0 == params[10]
    assert params[6:10] == (dq.data_ptr(), dk.data_ptr(), dv.data_ptr(), lse.data_ptr()) and params[11] - params[12] == cleared


@pytest.mark.cuda
@pytest.mark.parametrize("kind", range(3))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("N", [16, 32, 64, 128])
@pytest.mark.parametrize("D", HEAD_DIMS)
def test_gradients_on_the_gpu_within_budget(D, N, dtype, kind):
    (q, k, v), layout, kw = hard_problem(D, N, dtype, kind)
    check_attention(as_function(cuda_forward, cuda_backward), q, k, v, layout, **kw)


@pytest.mark.cuda
def test_gradients_have_the_same_bits_in_every_run():
    (q, k, v), layout, kw = hard_problem(64, 64, torch.bfloat16, 2)
    rest = (layout, 0.125, split_segments(layout, kw["segment_ids"]), kw["kv_lengths"])
    o, lse = cuda_forward(q, k, v, *rest)
    do, dlse = torch.randn_like(o), torch.randn_like(lse)
    first = cuda_backward(do, dlse, q, k, v, o, lse, *rest)
    for _ in range(20): assert all(torch.equal(a, b) for a, b in zip(first, cuda_backward(do, dlse, q, k, v, o, lse, *rest)))


@pytest.mark.cuda
def test_twenty_runs_of_a_crowded_problem_agree():
    "Long columns, many thread blocks that add to the same sums"
    layout = (P.strided(2) | P.sinks(2)).layout(4096, block=64, device="cuda")
    q, k, v, do = (torch.randn(2, 8, 4096, 64, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    o, lse = cuda_forward(q, k, v, layout, 0.125, None, None)
    first = cuda_backward(do, None, q, k, v, o, lse, layout, 0.125, None, None)
    for _ in range(20): assert all(torch.equal(a, b) for a, b in zip(first, cuda_backward(do, None, q, k, v, o, lse, layout, 0.125, None, None)))

@st.composite
def random_problem(draw):
    "Sizes, block, head dim, type and pattern of a random problem"
    return dict(N=draw(st.sampled_from([16, 32, 64, 128])), D=draw(st.sampled_from([32, 64, 80, 128])), L=draw(st.integers(1, 700)), S=draw(st.integers(1, 700)),
                H=draw(st.integers(1, 3)), causal=draw(st.booleans()), per_head=draw(st.booleans()), density=draw(st.floats(0, 1)),
                dtype=draw(st.sampled_from([torch.bfloat16, torch.float16])), seed=draw(st.integers(0, 1 << 30)))

@pytest.mark.cuda
@settings(max_examples=200, deadline=None)
@given(random_problem())
def test_random_layouts_on_the_gpu(c):
    (q, k, v), layout = sized_problem(**c)
    check_attention(as_function(cuda_forward, cuda_backward), q, k, v, layout)

@pytest.mark.cuda
def test_one_large_value_does_not_spoil_the_others():
    layout = P.dense().layout(512, block=64, device="cuda")
    q, k, v = (torch.randn(1, 2, 512, 64, device="cuda") for _ in range(3))
    v[:, :, 100] *= 30; k[..., 7] *= 20
    check_attention(as_function(cuda_forward, cuda_backward), *(t.bfloat16() for t in (q, k, v)), layout)

@pytest.mark.cuda
def test_nan_is_not_hidden():
    layout = P.dense().layout(128, block=64, device="cuda")
    q, k, v, do = (torch.randn(1, 1, 128, 64, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    k[0, 0, 5, 5] = float("nan")
    o, lse = cuda_forward(q, k, v, layout, 0.125, None, None)
    assert cuda_backward(do, None, q, k, v, o, lse, layout, 0.125, None, None)[0][0, 0, 5:].isnan().any()


def test_the_sources_are_the_ones_that_passed_on_a_gpu():
    verified = json.loads((Path(__file__).parent.parent / "nbs/results/h200/verified.json").read_text())
    assert verified["cuda_backward"] == backward_hash(), "the kernels were edited since they last passed on a GPU: run pytest -m cuda there"
