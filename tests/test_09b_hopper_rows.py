"Tests of 09b_hopper_rows. Generated from nbs/09b_hopper_rows.ipynb: edit that, then run pythia_book build."
import pytest
import torch
from pythia_nb import patterns as P
from pythia_nb.cuda_basics import check_compiles, masks_for, recipe_for
from pythia_nb.cuda_forward import make_plan
from pythia_nb.emulator import emulated_gpu
from pythia_nb.grouped import torch_backward, torch_forward
from pythia_nb.hopper_rows import ROW_TILES, row_recipe, row_shared, row_source
from pythia_nb.reference import hard_problem
from pythia_nb.schedule import compile_report


@pytest.mark.parametrize("D, N", ROW_TILES)
@pytest.mark.parametrize("bf16", [True, False])
def test_every_variant_compiles_without_spills_and_runs_its_products_by_themselves(D, N, bf16):
    source = row_source(D, N, bf16)
    check_compiles(source, ("sm_90a",))
    _, log = compile_report(source, "sm_90a")
    assert "C75" not in log, f"the compiler serialises products or ignores setmaxnreg: {log}"

@pytest.mark.parametrize("D, N", ROW_TILES)
def test_launch_parameters(D, N):
    t = ROW_TILES[D, N]
    assert row_shared(t, D) <= 227 * 1024 and t.threads <= 1024 and t.BN == 64 and t.BM in (64, 128) and max(N, 64) % t.BM == 0 and t.TEAMS <= 4
    assert t.STAGES >= 3, "a team holds a tile's keys while it waits for the next keys and values"
    at_start, groups = 65536 // t.threads // 8 * 8, t.threads // 128    # registers of a thread when the kernel starts
    assert (groups - 1) * t.REGS + t.LOADER_REGS <= groups * at_start, "asks for more registers than there are, and would wait for ever"


def emulated_rows(do, dlse, q, k, v, o, lse, layout, scale, segments=None, kv_lengths=None):
    "dq, and lse in base 2 and delta of each query"
    recipe = recipe_for(row_recipe, layout, segments is not None, q, k, v, o, do)
    kept, masks = masks_for(recipe, layout, segments, kv_lengths, len(q))
    dq, rows, work = torch.full_like(q, float("nan")), lse.new_full((*lse.shape, 4), float("nan")), torch.empty(recipe.sizes["parts"] + 256, dtype=torch.uint8)
    with emulated_gpu(): recipe.launch(scale, masks, *(t.data_ptr() for t in (q, k, v, o, do, dq, lse)), 0 if dlse is None else dlse.data_ptr(), *(t.data_ptr() for t in (rows, work, work[256:])))
    return dq, rows

@pytest.mark.parametrize("D, N, kind", [(64, 64, 0), (128, 64, 1), (128, 128, 2)])
def test_rows_make_dq_on_a_cpu(D, N, kind):
    (q, k, v), layout, kw = hard_problem(D, N, torch.bfloat16, kind, blocks=3, device="cpu")
    masks = D**-0.5, kw.get("segment_ids"), kw.get("kv_lengths")
    o, lse = torch_forward(q, k, v, layout, *masks)
    do, dlse = torch.randn_like(o), torch.randn_like(lse).masked_fill(lse == -torch.inf, 0)
    with emulated_gpu(): dq, rows = emulated_rows(do, dlse, q, k, v, o, lse, layout, *masks)
    torch.testing.assert_close(dq.float(), torch_backward(do, dlse, q, k, v, o, lse, layout, *masks)[0].float(), atol=3e-2, rtol=2e-2)
    seen = ~rows[..., 0].isnan()    # of a block of queries that sees nothing nobody asks
    torch.testing.assert_close(rows[..., 1][seen & (lse > -torch.inf)], ((do.float() * o.float()).sum(-1) - dlse)[seen & (lse > -torch.inf)], atol=1e-3, rtol=1e-3)
    assert (rows[..., 0][seen & (lse == -torch.inf)] == torch.inf).all()

@pytest.mark.parametrize("D, N", ROW_TILES)
def test_long_rows_in_parts(D, N, monkeypatch):
    monkeypatch.setitem(make_plan.__globals__, "chunk_size", lambda *about: 2)
    layout = (P.strided(3) | P.local(1)).layout(5 * N - 5, block=N)
    q, k, v, do = (torch.randn(1, 2, layout.L, D, dtype=torch.bfloat16) for _ in range(4))
    o, lse = torch_forward(q, k, v, layout, D**-0.5, None, None)
    with emulated_gpu(): dq, _ = emulated_rows(do, None, q, k, v, o, lse, layout, D**-0.5)
    torch.testing.assert_close(dq.float(), torch_backward(do, None, q, k, v, o, lse, layout, D**-0.5, None, None)[0].float(), atol=3e-2, rtol=2e-2)
