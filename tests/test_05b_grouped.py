"Tests of 05b_grouped. Generated from nbs/05b_grouped.ipynb: edit that, then run pythia_book build."
import pytest
import torch
from hypothesis import given, settings, strategies as st
from pythia_nb import patterns as P
from pythia_nb.grouped import pieces, torch_backward, torch_forward
from pythia_nb.reference import as_function, check_attention, hard_problem


@settings(max_examples=60, deadline=None)
@given(B=st.integers(1, 3), H=st.sampled_from([1, 4]), per_head=st.booleans(), L=st.integers(1, 200), budget=st.integers(1, 200_000))
def test_pieces_cover_every_block_once(B, H, per_head, L, budget):
    pattern = P.per_head([P.local(h + 1) | P.strided(3) for h in range(H)]) if per_head else P.bigbird(2, 1, 1)
    layout = pattern.layout(L, block=16)
    seen = torch.zeros(B, H, layout.nQ, layout.nK, dtype=torch.int32)
    for b, h, rows, cols, full in pieces(layout, B, H, 8, budget):
        for r, c in zip(rows, cols): seen[b, h, r, c] += 1
    assert torch.equal(seen, (layout.codes() > 0).int().expand(B, H, -1, -1))


@pytest.mark.parametrize("budget", [1, 10_000, 300_000, 10**8])
def test_pieces_keep_to_the_budget(budget):
    B, H, D = 3, 4, 32
    for pattern in (P.bigbird(2, 1, 1), P.per_head([P.local(h + 1) for h in range(H)])):
        layout = pattern.layout(700, block=16)
        for b, h, rows, cols, _ in pieces(layout, B, H, D, budget):
            row = cols.shape[1] * layout.block * (layout.block + 2 * D)
            assert len(range(B)[b]) * len(range(H)[h]) * len(rows) * row <= max(budget, row)


@pytest.mark.parametrize("kind", range(4))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_groups_stay_within_the_budget(dtype, kind):
    for seed in range(4):
        torch.manual_seed(seed)
        tensors, layout, masks = hard_problem(32, 16, dtype, kind, device="cpu")
        check_attention(as_function(torch_forward, torch_backward), *tensors, layout, **masks)

def test_documents_of_the_layout_are_kept_apart():
    ids = torch.repeat_interleave(torch.tensor([100, 57]))
    tensors = torch.randn(3, 2, 2, 157, 32)
    for pattern in (P.document(ids), P.local(2) & P.document(ids), P.per_head([P.local(2), P.dense()]) & P.document(ids)):
        check_attention(as_function(torch_forward, torch_backward), *tensors, pattern.layout(157, block=32))
