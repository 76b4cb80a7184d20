"Tests of 09_cuda_hopper. Generated from nbs/09_cuda_hopper.ipynb: edit that, then run pythia_book build."
import functools
import json
import pytest
import torch
from hypothesis import given, settings, strategies as st
from pathlib import Path
from pythia_nb import patterns as P
from pythia_nb.cuda_backward import cuda_backward
from pythia_nb.cuda_basics import check_compiles, params_at
from pythia_nb.cuda_forward import check_end_of_long_sequence, chunk_size, cuda_forward
from pythia_nb.cuda_hopper import (
    HOPPER_TILES, forward_on_gpu, hopper_hash, hopper_recipe, hopper_shared, hopper_source, shares_of_64, takes_hopper,
)
from pythia_nb.reference import (
    as_function, check_attention, check_forward, hard_problem, past_the_diagonal, sized_problem,
)
from pythia_nb.schedule import compile_report
from pythia_nb.warpgroups import tensor_map


def test_lanes_exchange_until_each_has_one_tile():
    "transpose_quad, lane by lane: v[k] of lane i becomes v[i] of lane k"
    v = [[(lane, k) for k in range(4)] for lane in range(4)]
    for bit, pairs in ((2, ((0, 2), (1, 3))), (1, ((0, 1), (2, 3)))):
        sent = {(lane, a): v[lane][a if lane & bit else b] for lane in range(4) for a, b in pairs}
        for lane in range(4):
            for a, b in pairs: v[lane][a if lane & bit else b] = sent[lane ^ bit, a]
    assert v == [[(k, lane) for k in range(4)] for lane in range(4)]


@pytest.mark.parametrize("D, N", HOPPER_TILES)
@pytest.mark.parametrize("bf16", [True, False])
def test_every_variant_compiles_without_spills_and_runs_its_products_by_themselves(D, N, bf16):
    source = hopper_source(D, N, bf16)
    check_compiles(source, ("sm_90a",))
    _, log = compile_report(source, "sm_90a")
    assert "C75" not in log, f"the compiler serialises products or ignores setmaxnreg: {log}"

@pytest.mark.parametrize("D, N", HOPPER_TILES)
def test_launch_parameters(D, N):
    t = HOPPER_TILES[D, N]
    assert t.STAGES >= 3, "a team holds a tile of values while it waits for the next keys and values"
    assert hopper_shared(t, D) <= 227 * 1024 and t.threads <= 1024 and t.BM in (64, 128) and max(N, 64) % t.BM == max(N, 64) % t.BN == 0 and t.TEAMS in (1, 2, 4)
    at_start = 65536 // t.threads // 8 * 8    # registers of a thread when the kernel starts
    groups = t.threads // 128
    assert (groups - 1) * t.REGS + t.LOADER_REGS <= groups * at_start, "asks for more registers than there are, and would wait for ever"


@pytest.mark.parametrize("D, N", [about for about in HOPPER_TILES if about[1] >= 64])
def test_a_dense_layout_of_4096_tokens_is_split(D, N):
    "What the GPU tests below rely on, for 8 heads and the multiprocessors of an H100 or H200"
    layout = P.dense().layout(4096, block=N)
    assert layout.nQ > chunk_size(layout.visible * 8, HOPPER_TILES[D, N].TEAMS * 132)


def test_other_gpus_and_shapes_stay_with_the_kernels_before(monkeypatch):
    seen = []
    for name, capability in (("old", (8, 0)), ("hopper", (9, 0)), ("new", (10, 0))):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        monkeypatch.setitem(takes_hopper.__wrapped__.__globals__, "max_shared_memory", lambda device: 227 * 1024)
        seen.append([(D, N) for D in (32, 64, 80, 128, 256) for N in (16, 32, 64, 128) if takes_hopper.__wrapped__(name, D, N)])
    assert seen == [[], [(D, N) for D in (64, 128) for N in (16, 32, 64, 128)], []]


@pytest.mark.parametrize("D, N", HOPPER_TILES)
def test_a_call_launches_at_most_a_thread_block_for_each_multiprocessor(D, N, monkeypatch):
    "Without a GPU: how many thread blocks, and where they find queries, results and the number of items"
    launches = []
    def kernel(blocks, arguments): launches.append((blocks, params_at(arguments)))
    monkeypatch.setitem(tensor_map.__globals__, "encode_map", lambda *about: bytes(128))
    monkeypatch.setitem(hopper_recipe.keywords, "kernels", lambda *about: (HOPPER_TILES[D, N], kernel, lambda *arguments: None))
    monkeypatch.setitem(cuda_forward.__globals__, "multiprocessors", lambda device: 132)
    monkeypatch.setitem(forward_on_gpu.__globals__, "takes_hopper", lambda *about: True)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, raising=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for L, blocks in ((100, 2 * 3 * (1 if N == 128 else 2)), (40_000, 132)):
        q = torch.randn(2, 3, L, D, dtype=torch.bfloat16)
        o, lse = forward_on_gpu(q, q, q, P.local(1).layout(L, block=N), 0.125, None, None)
        got, params = launches.pop()
        assert got == blocks and (params[0], params[5], params[9]) == (q.data_ptr(), o.data_ptr(), lse.data_ptr())


@functools.cache
def needs_hopper():
    if torch.cuda.get_device_capability() != (9, 0): pytest.skip("needs a GPU with compute capability 9.0")

def hopper_forward(q, k, v, layout, scale, segments=None, kv_lengths=None):
    needs_hopper()
    assert takes_hopper(q.device, q.shape[3], layout.block)
    return forward_on_gpu(q, k, v, layout, scale, segments, kv_lengths)


@pytest.mark.cuda
@pytest.mark.parametrize("kind", range(4))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("D, N", HOPPER_TILES)
def test_hopper_within_budget(D, N, dtype, kind):
    (q, k, v), layout, kw = hard_problem(D, N, dtype, kind)
    poison = torch.full((64 << 20,), float("nan"), device="cuda"); del poison    # freed memory that the outputs will be made from
    o, lse = hopper_forward(q, k, v, layout, D**-0.5, kw.get("segment_ids"), kw.get("kv_lengths"))
    check_forward(o, lse, q, k, v, layout, **kw)

@pytest.mark.cuda
@settings(max_examples=100, deadline=None)
@given(D=st.sampled_from([64, 128]), N=st.sampled_from([16, 32, 64, 128]), L=st.integers(1, 900), S=st.integers(1, 900), H=st.integers(1, 3), causal=st.booleans(), per_head=st.booleans(),
       density=st.floats(0, 1), dtype=st.sampled_from([torch.bfloat16, torch.float16]), seed=st.integers(0, 1 << 30))
def test_random_layouts_on_hopper(**about):
    (q, k, v), layout = sized_problem(**about)
    check_forward(*hopper_forward(q, k, v, layout, about["D"]**-0.5), q, k, v, layout)


@pytest.mark.cuda
@pytest.mark.parametrize("D, N", HOPPER_TILES)
def test_a_thread_block_has_many_jobs(D, N):
    "Dozens of jobs a team, and rows that are split among teams, as the kernel with mma.sync computes them; the split ones before the judge too"
    for layout, B in ((P.bigbird(1, 1, 1).layout(300, block=N, device="cuda"), 400), (P.dense().layout(4096, block=N, device="cuda"), 1), (P.strided(3).layout(5000, block=N, device="cuda"), 4)):
        q, k, v = (torch.randn(B, 8, layout.L, D, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        ours, expected = hopper_forward(q, k, v, layout, D**-0.5), cuda_forward(q, k, v, layout, D**-0.5, None, None)
        torch.testing.assert_close(ours[0].float(), expected[0].float(), atol=3e-2, rtol=2e-2)
        torch.testing.assert_close(ours[1], expected[1], atol=1e-4, rtol=1e-4)
        if layout.L == 4096: check_forward(*ours, q, k, v, layout)

@pytest.mark.cuda
@pytest.mark.parametrize("D, N", HOPPER_TILES)
def test_lists_that_go_on_past_the_diagonal(D, N):
    layout = past_the_diagonal(P.dense().layout(12 * N, block=N, causal=False, device="cuda"))
    q, k, v = (torch.randn(1, 2, layout.L, D, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    check_forward(*hopper_forward(q, k, v, layout, D**-0.5), q, k, v, layout)

@pytest.mark.cuda
@pytest.mark.parametrize("D, N", HOPPER_TILES)
def test_hopper_gives_the_same_bits_on_every_stream_and_in_graphs(D, N):
    (q, k, v), layout, _ = hard_problem(D, N, torch.bfloat16, 0)
    first = hopper_forward(q, k, v, layout, 0.125)
    for _ in range(20): assert all(torch.equal(a, b) for a, b in zip(first, hopper_forward(q, k, v, layout, 0.125)))
    other = torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(other): side = hopper_forward(q, k, v, layout, 0.125)
    other.synchronize()
    assert torch.equal(side[0], first[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph): captured = hopper_forward(q, k, v, layout, 0.125)
    new = torch.randn_like(q); expected = hopper_forward(new, k, v, layout, 0.125)[0]
    q.copy_(new); graph.replay(); torch.cuda.synchronize()
    assert torch.equal(captured[0], expected)

@pytest.mark.cuda
def test_a_million_tokens_on_hopper(): check_end_of_long_sequence(hopper_forward)

@pytest.mark.cuda
@pytest.mark.parametrize("D, N", HOPPER_TILES)
def test_gradients_behind_it_within_budget(D, N):
    "The backward pass takes this kernel's o and lse"
    (q, k, v), layout, kw = hard_problem(D, N, torch.bfloat16, 2)
    check_attention(as_function(hopper_forward, cuda_backward), q, k, v, layout, **kw)


def test_the_share_of_a_block_size_is_its_least():
    rows = [dict(name=name, pattern=p, block=N, D=D, L=8192, tflops=rate * (2 if name == "other" else 1)) for name in ("hopper", "other") for p in ("local", "strided", "bigbird")
            for D, N, rate in ((64, 64, 100), (64, 16, 60), (128, 64, 200), (128, 16, 50))]
    assert shares_of_64(rows, 16) == dict.fromkeys(("local", "strided", "bigbird"), 0.25)


def test_the_sources_are_the_ones_that_passed_on_a_gpu():
    verified = json.loads((Path(__file__).parent.parent / "nbs/results/h200/verified.json").read_text())
    assert verified["cuda_hopper"] == hopper_hash(), "the kernels were edited since they last passed on a GPU: run pytest -m cuda there"
