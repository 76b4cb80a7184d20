"Tests of 09c_hopper_backward. Generated from nbs/09c_hopper_backward.ipynb: edit that, then run pythia_book build."
import functools
import json
import pytest
import torch
from hypothesis import given, settings, strategies as st
from pathlib import Path
from pythia_nb import patterns as P
from pythia_nb.cuda_basics import Kernel, check_compiles
from pythia_nb.cuda_forward import make_plan
from pythia_nb.cuda_hopper import HOPPER_TILES, forward_on_gpu, hopper_shared
from pythia_nb.cuda_small_backward import backward_in_two, side_recipe
from pythia_nb.emulator import EmulationError, emulated_gpu
from pythia_nb.grouped import torch_backward, torch_forward
from pythia_nb.hopper_backward import (
    COLUMN_TILES, HOPPER_RECIPES, column_kernels, column_shared, column_source, hopper_backward, hopper_backward_hash,
)
from pythia_nb.hopper_rows import ROW_TILES, row_kernels, row_shared, row_source
from pythia_nb.reference import as_function, check_attention, hard_problem, sized_problem
from pythia_nb.schedule import compile_report


@pytest.mark.parametrize("D, N", COLUMN_TILES)
@pytest.mark.parametrize("bf16", [True, False])
def test_every_variant_compiles_without_spills_and_runs_its_products_by_themselves(D, N, bf16):
    source = column_source(D, N, bf16)
    check_compiles(source, ("sm_90a",))
    _, log = compile_report(source, "sm_90a")
    assert "C75" not in log, f"the compiler serialises products or ignores setmaxnreg: {log}"

@pytest.mark.parametrize("D, N", COLUMN_TILES)
def test_launch_parameters(D, N):
    t = COLUMN_TILES[D, N]
    assert max(column_shared(t, D), row_shared(ROW_TILES[D, N], D)) <= hopper_shared(HOPPER_TILES[D, N], D) <= 227 * 1024, "`takes_hopper` speaks for both passes"
    assert t.threads <= 1024 and t.BN == 64 and t.BM in (64, 128) and max(N, 64) % t.BM == 0 and t.TEAMS <= 4
    at_start, groups = 65536 // t.threads // 8 * 8, t.threads // 128    # registers of a thread when the kernel starts
    assert (groups - 1) * t.REGS + t.LOADER_REGS <= groups * at_start, "asks for more registers than there are, and would wait for ever"


@pytest.mark.parametrize("kind, dtype, about", [(0, torch.bfloat16, (64, 64)), (1, torch.float16, (64, 128)), (2, torch.bfloat16, (128, 64)), (1, torch.bfloat16, (128, 128)), (2, torch.bfloat16, (64, 32)), (1, torch.float16, (128, 16)), (0, torch.bfloat16, (64, 16))])
def test_the_source_computes_gradients_on_a_cpu(kind, dtype, about):
    (q, k, v), layout, kw = hard_problem(*about, dtype, kind, blocks=3, device="cpu")
    with emulated_gpu(): check_attention(as_function(torch_forward, hopper_backward), q, k, v, layout, **kw)

@pytest.mark.parametrize("D, N", COLUMN_TILES)
def test_rows_and_columns_in_parts(D, N, monkeypatch):
    "Long lists; and the same bits in another order of events"
    monkeypatch.setitem(make_plan.__globals__, "chunk_size", lambda *about: 2)
    layout = (P.strided(3) | P.local(1)).layout(5 * N - 5, block=N)
    q, k, v, do = (torch.randn(1, 3, layout.L, D, dtype=torch.bfloat16) for _ in range(4))
    o, lse = torch_forward(q, k, v, layout, D**-0.5, None, None)
    with emulated_gpu(): ours, again = (hopper_backward(do, None, q, k, v, o, lse, layout, D**-0.5, None, None) for _ in range(2))
    expected = torch_backward(do, None, q, k, v, o, lse, layout, D**-0.5, None, None)
    for a, b, e in zip(ours, again, expected):
        assert torch.equal(a, b)
        torch.testing.assert_close(a.float(), e.float(), atol=3e-2, rtol=2e-2)

def odd(t):
    "The same numbers in rows that the copy engine can't read, or from an address that it can't begin at"
    wide = torch.cat([t, t[..., :1]], -1)
    return wide[..., :-1], wide.flatten()[1:1 + t.numel()].copy_(t.flatten()).view_as(t)

@pytest.mark.parametrize("which", ["expanded", "odd rows", "odd start", "one sequence, one head"])
def test_views_of_all_kinds(which, L=150, D=64):
    q, k, v, do = (torch.randn(2, 2, L, D, dtype=torch.bfloat16) for _ in range(4))
    if which == "expanded": k, v, do = k[:1].expand(2, -1, -1, -1), v[:, :1].expand(-1, 2, -1, -1), do[:1, :1].expand(2, 2, -1, -1)
    elif which == "one sequence, one head": q, k, v, do = (t[1:, :1] for t in (q, k, v, do))
    else: q, k, do = (odd(t)[which == "odd start"] for t in (q, k, do))
    layout, rest = P.local(2).layout(L, block=64), (D**-0.5, None, None)
    expected = torch_forward(q, k, v, layout, *rest)
    with emulated_gpu():
        o, lse = forward_on_gpu(q, k, v, layout, *rest)
        got = hopper_backward(do, None, q, k, v, *expected, layout, *rest)
    for a, e in zip((o, lse, *got), (*expected, *torch_backward(do, None, q, k, v, *expected, layout, *rest))): torch.testing.assert_close(a.float(), e.float(), atol=3e-2, rtol=2e-2)

@pytest.mark.parametrize("D, N", [(64, 64), (128, 64)])
@pytest.mark.parametrize("chunk", [40, 80])
def test_lists_that_a_loader_reads_in_several_pieces(D, N, chunk, monkeypatch):
    "A column of 70 entries, whole and in two parts; a loader warp reads 32 at a time"
    monkeypatch.setitem(make_plan.__globals__, "chunk_size", lambda *about: chunk)
    layout = (P.sinks(1) | P.local(1)).layout(70 * N, block=N)
    q, k, v, do = (torch.randn(1, 1, layout.L, D, dtype=torch.bfloat16) for _ in range(4))
    o, lse = torch_forward(q, k, v, layout, D**-0.5, None, None)
    with emulated_gpu(): got = hopper_backward(do, None, q, k, v, o, lse, layout, D**-0.5, None, None)
    for a, e in zip(got, torch_backward(do, None, q, k, v, o, lse, layout, D**-0.5, None, None)):
        torch.testing.assert_close(a.float(), e.float(), atol=3e-2, rtol=2e-2)


HOLES = {    # kernel, line, what stands there instead
    "columns: no fence between copy and product": (1, "await(full, ring.phase); fence_copies();\n", "await(full, ring.phase);\n"),
    "columns: weights from scores that are not there": (1, "    wgmma_wait<1>();\n    pin(s);", "    pin(s);"),
    "columns: a tile is given back before the products that read it are done": (1, "    wgmma_wait<0>();\n    pin(dv); pin(dk);\n    release(full + STAGES * 8);", "    release(full + STAGES * 8);\n    wgmma_wait<0>();\n    pin(dv); pin(dk);"),
    "columns: a tile is never given back": (1, "    release(full + STAGES * 8);\n", ""),
    "columns: the place of keys is given back before they are read": (1, "  float dk[1][DT][4], dv[1][DT][4];\n", "  release(barriers + 8);\n  float dk[1][DT][4], dv[1][DT][4];\n"),
    "rows: no fence between copy and product": (0, "await(v_full, v_phase); fence_copies();", "await(v_full, v_phase);"),
    "rows: values are not waited for": (0, "await(v_full, v_phase); fence_copies();", "fence_copies();"),
    "rows: a tile of values is never given back": (0, "    release(v_full + STAGES * 8);\n    held", "    held"),
    "rows: the output is not waited for": (0, "      await(full, ring.phase);\n      if (g == group)", "      if (g == group)"),
}

@functools.cache
def small_problem(D: int, N: int):
    "A layout, what a backward pass takes, and what it should give"
    torch.manual_seed(0)
    layout, keys = P.bigbird(1, 1, 1).layout(5 * N, block=N), torch.tensor([5 * N - 5])    # the last tile of keys is not whole: threads copy it
    q, k, v, do = (torch.randn(1, 4, layout.L, D, dtype=torch.bfloat16) for _ in range(4))
    o, lse = torch_forward(q, k, v, layout, 0.125, None, keys)
    given = do, None, q, k, v, o, lse, layout, 0.125, None, keys
    return given, torch_backward(*given)

def with_hole(which: int, old: str, new: str, seed: int, D: int = 64, N: int = 64) -> str:
    "What happens to a small problem if a line of one of the kernels is another one"
    (given, expected), makes = small_problem(D, N), list(HOPPER_RECIPES)
    source = (row_source, column_source)[which](D, N)
    assert source.count(old) == 1, f"{old!r} is not there once"
    def kernels(*about):
        t, kernel, combine = (row_kernels, column_kernels)[which](*about)
        return t, Kernel(source.replace(old, new), ("attention_rows", "attention_columns")[which], t.threads, kernel.shared, given[0].device), combine
    makes[which] = functools.partial(side_recipe, bool(which), **{**makes[which].keywords, "kernels": kernels})
    with emulated_gpu(seed):
        try: got = backward_in_two(makes, *given)
        except EmulationError as e: return e.what
    return "right" if all((a.float() - b.float()).abs().max() < 0.05 for a, b in zip(got, expected)) else "wrong numbers"


@pytest.mark.parametrize("D, N", [(64, 64), (128, 128)])
@pytest.mark.parametrize("name", HOLES)
def test_each_of_these_lines_is_needed(name, D, N): assert any(with_hole(*HOLES[name], seed, D, N) != "right" for seed in range(30))

def test_the_whole_kernels_are_right(): assert all(with_hole(which, "wgmma_wait<1>();", "wgmma_wait<1>();", seed) == "right" for which in (0, 1) for seed in range(4))


@functools.cache
def needs_hopper():
    if torch.cuda.get_device_capability() != (9, 0): pytest.skip("needs a GPU with compute capability 9.0")

def on_hopper(*arguments):
    needs_hopper()
    return hopper_backward(*arguments)


@pytest.mark.cuda
@pytest.mark.parametrize("kind", range(3))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("D, N", COLUMN_TILES)
def test_gradients_within_budget(D, N, dtype, kind):
    (q, k, v), layout, kw = hard_problem(D, N, dtype, kind)
    poison = torch.full((64 << 20,), float("nan"), device="cuda"); del poison    # freed memory that the outputs will be made from
    check_attention(as_function(forward_on_gpu, on_hopper), q, k, v, layout, **kw)

@pytest.mark.cuda
@settings(max_examples=100, deadline=None)
@given(D=st.sampled_from([64, 128]), N=st.sampled_from([16, 32, 64, 128]), L=st.integers(1, 900), S=st.integers(1, 900), H=st.integers(1, 3), causal=st.booleans(), per_head=st.booleans(),
       density=st.floats(0, 1), dtype=st.sampled_from([torch.bfloat16, torch.float16]), seed=st.integers(0, 1 << 30))
def test_gradients_of_random_layouts(**about):
    (q, k, v), layout = sized_problem(**about)
    check_attention(as_function(forward_on_gpu, on_hopper), q, k, v, layout)

@pytest.mark.cuda
@pytest.mark.parametrize("D, N", COLUMN_TILES)
def test_twenty_runs_of_a_crowded_problem_agree(D, N):
    layout = (P.strided(2) | P.sinks(2)).layout(4096, block=N, device="cuda")
    q, k, v, do = (torch.randn(2, 8, 4096, D, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    o, lse = forward_on_gpu(q, k, v, layout, D**-0.5, None, None)
    first = on_hopper(do, None, q, k, v, o, lse, layout, D**-0.5, None, None)
    for _ in range(20): assert all(torch.equal(a, b) for a, b in zip(first, on_hopper(do, None, q, k, v, o, lse, layout, D**-0.5, None, None)))


def test_the_sources_are_the_ones_that_passed_on_a_gpu():
    verified = json.loads((Path(__file__).parent.parent / "nbs/results/h200/verified.json").read_text())
    assert verified["hopper_backward"] == hopper_backward_hash(), "the kernels were edited since they last passed on a GPU: run pytest -m cuda there"
