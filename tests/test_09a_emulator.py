"Tests of 09a_emulator. Generated from nbs/09a_emulator.ipynb: edit that, then run pythia_book build."
import functools
import pytest
import torch
from pythia_nb import patterns as P, warpgroups
from pythia_nb.cuda_backward import cuda_backward
from pythia_nb.cuda_basics import Kernel, forward_call
from pythia_nb.cuda_float32 import float32_backward, float32_forward
from pythia_nb.cuda_forward import FORWARD, cuda_forward, forward_recipe, forward_shared, forward_tiles, kernel_source
from pythia_nb.cuda_hopper import HOPPER_SCORES as SCORES, HOPPER_TILES, forward_on_gpu, hopper_shared, hopper_source
from pythia_nb.cuda_small import forward_by_block
from pythia_nb.cuda_small_backward import backward_by_block
from pythia_nb.emulator import EmulationError, emulated_gpu
from pythia_nb.reference import (
    as_function, attention_oracle, check_attention, check_forward, hard_problem, past_the_diagonal,
)


CASES = [(cuda_forward, cuda_backward, torch.bfloat16, D, N) for D, N in ((64, 64), (128, 128), (80, 32), (256, 64))] + [(cuda_forward, cuda_backward, torch.float16, 32, 128)]
CASES += [(forward_by_block, backward_by_block, torch.bfloat16, 64, 16), (forward_by_block, backward_by_block, torch.float16, 128, 32), (float32_forward, float32_backward, torch.float32, 64, 64)]

@pytest.mark.parametrize("kind, case", [(i % 3, case) for i, case in enumerate(CASES)])
def test_the_sources_of_all_kernels_compute_attention_on_a_cpu(kind, case):
    forward, backward, dtype, D, N = case
    (q, k, v), layout, kw = hard_problem(D, N, dtype, kind, blocks=2 if N == 128 else 3, device="cpu")
    with emulated_gpu(): check_attention(as_function(forward, backward), q, k, v, layout, **kw)

@pytest.mark.parametrize("kind, about", list(enumerate(HOPPER_TILES)))
def test_the_source_for_hopper_computes_attention_on_a_cpu(kind, about):
    D, N = about
    (q, k, v), layout, kw = hard_problem(D, N, torch.float16 if kind == 3 else torch.bfloat16, kind, blocks=3, device="cpu")
    with emulated_gpu(): o, lse = forward_on_gpu(q, k, v, layout, D**-0.5, kw.get("segment_ids"), kw.get("kv_lengths"))
    check_forward(o, lse, q, k, v, layout, **kw)

@pytest.mark.parametrize("D, N", HOPPER_TILES)
def test_tiles_that_nobody_sees_do_not_stop_the_ring(D, N):
    layout = past_the_diagonal(P.dense().layout(7 * N, block=N, causal=False))
    q, k, v = (torch.randn(1, 1, layout.L, D, dtype=torch.bfloat16) for _ in range(3))
    with emulated_gpu(): o, lse = forward_on_gpu(q, k, v, layout, D**-0.5, None, None)
    check_forward(o, lse, q, k, v, layout)


def with_one_tile(source, t, shared): return lambda *about: (t, Kernel(source, "attention_forward", t.threads, shared, torch.device("cpu")), lambda *arguments: None)
def hopper_with(old, new, **other):
    "The forward kernel for Hopper with a changed line, or with other numbers"
    t, source = HOPPER_TILES[64, 64], hopper_source(64, 64)
    for name, x in other.items(): old, new = f"#define {name} {getattr(t, name)}\n", f"#define {name} {x}\n"
    assert source.count(old) >= 1, f"there is no {old!r} any more"
    return with_one_tile(source.replace(old, new), t, hopper_shared(t, 64)), True
def ampere_with(old, new):
    "The same of the kernel with mma.sync"
    t = forward_tiles(64, 64)[0]
    source = kernel_source(FORWARD, 64, 64, t)
    assert source.count(old) >= 1, f"there is no {old!r} any more"
    return with_one_tile(source.replace(old, new), t, forward_shared(t, 64)), False

HOLES = {
    "Hopper: no fence before the product": lambda: hopper_with("    fence_copies();\n    my_turn();", "    my_turn();"),
    "Hopper: a tile of keys is never given back": lambda: hopper_with("    pin(s);\n    release(k_full + STAGES * 8);", "    pin(s);"),
    "Hopper: a tile is given back before its product was waited for": lambda: hopper_with(SCORES, SCORES.replace("    pin(s);\n    release(k_full + STAGES * 8);", "    pin(s);").replace("    wgmma_commit();\n", "    wgmma_commit(); release(k_full + STAGES * 8);\n", 1)),
    "Hopper: scores are used without waiting": lambda: hopper_with("    } else {\n      wgmma_wait<0>();\n      pin(acc);", "    } else {\n      pin(acc);"),
    "Hopper: warps ask for more registers than were given up": lambda: hopper_with("", "", REGS=120),
    "mma.sync: no barrier between tiles": lambda: ampere_with("wait<0>(); __syncthreads();                       // tile t is there", "wait<0>();    // tile t is there"),
    "mma.sync: the copy of a tile is not waited for": lambda: ampere_with("wait<0>(); __syncthreads();                       // tile t is there", "__syncthreads();    // tile t is there"),
}

@functools.cache
def small_problem():
    "A layout, queries, keys and values, how many keys exist, and the right output"
    torch.manual_seed(0)
    layout, keys = P.bigbird(1, 1, 1).layout(300, block=64), torch.tensor([290])    # the last tile is not whole: threads copy it
    q, k, v = (torch.randn(1, 2, 300, 64, dtype=torch.bfloat16) for _ in range(3))
    return layout, q, k, v, keys, attention_oracle(*(t.double() for t in (q, k, v)), layout, kv_lengths=keys)[0]

def what_happens(hole, seed: int) -> str:
    "What the emulator says of a kernel, or what became of its numbers"
    layout, q, k, v, keys, expected = small_problem()
    with emulated_gpu(seed):
        kernels, stay = hole()
        try: o, _ = forward_call(functools.partial(forward_recipe, kernels=kernels, stay=stay, map_of=warpgroups.tensor_map), False, q, k, v, layout, 0.125, None, keys)
        except EmulationError as e: return e.what
    return "right" if (o - expected).abs().max() < 0.05 else "wrong numbers"


@pytest.mark.parametrize("name", HOLES)
def test_each_hole_is_found(name): assert any(what_happens(HOLES[name], seed) != "right" for seed in range(6))

def test_without_a_hole_it_is_right():
    for build, old in ((hopper_with, "fence_copies();"), (ampere_with, "__syncthreads();")): assert what_happens(lambda: build(old, old), 0) == "right"
