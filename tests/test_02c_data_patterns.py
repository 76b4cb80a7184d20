"Tests of 02c_data_patterns. Generated from nbs/02c_data_patterns.ipynb: edit that, then run pythia_book build."
import pytest
import torch
from hypothesis import given, settings, strategies as st
from pythia_nb.data_patterns import document, from_mask, from_predicate
from pythia_nb.named_patterns import Grid, dense, local, per_head


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=8), causal=st.booleans())
def test_document_shows_exactly_the_blocks_of_the_same_document(lengths, causal):
    N, ids = 16, torch.repeat_interleave(torch.tensor(lengths))
    n = -(-len(ids) // N)
    same = torch.zeros(n * N, n * N, dtype=torch.bool)
    same[:len(ids), :len(ids)] = ids[:, None] == ids[None]
    if causal: same = same.tril()
    got = torch.zeros(n * n, dtype=torch.bool)
    got[document(ids).keys(torch.arange(n), Grid(n, causal, N, S=len(ids)))] = True
    expected = same.view(n, N, n, N).any(3).any(1)
    # A span may also hold a block between two documents of one row; it never misses one.
    assert not (expected & ~got.view(n, n)).any()
    assert (got.view(n, n) & ~expected).sum() == 0 or not causal


def test_mask_and_predicate_patterns_agree_with_their_source():
    table = torch.rand(3, 6, 6, generator=torch.Generator().manual_seed(0)) < 0.4
    assert torch.equal(from_mask(table).mask(6, causal=False), table)
    assert torch.equal(from_mask(table).mask(6), table.tril())
    rule = from_predicate(lambda q, k: (q // 32 + k // 32) % 3 == 0)
    i, j = torch.arange(6)[:, None], torch.arange(6)[None]
    assert torch.equal(rule.mask(6, causal=False, block=32)[0], (i + j) % 3 == 0)
    assert torch.equal(from_predicate(lambda q, k: True).mask(6, block=32), dense().mask(6))
    heads = per_head([dense(), from_mask(table[0]), per_head([local(2)])])    # a list for all heads serves any head
    assert torch.equal(heads.mask(6), torch.stack([dense().mask(6)[0], table[0].tril(), local(2).mask(6)[0]]))
    rounded = from_predicate(lambda q, k: q - k < 40, exact=False)
    assert torch.equal(rounded.mask(6, block=32), local(3).mask(6))    # 40 tokens reach into the second block before


@pytest.mark.parametrize("make, message", [
    (lambda: document(torch.tensor([0, 1, 0])), "one stretch"),
    (lambda: document(torch.zeros(2, 3, dtype=torch.int64)), "one whole number for each token"),
    (lambda: document(torch.zeros(64, dtype=torch.int64)).mask(4, block=32), "an id for each token"),
    (lambda: from_mask(torch.ones(2, 2)), "boolean matrix"),
    (lambda: from_mask(torch.ones(2, 2, dtype=torch.bool)).mask(3), "larger mask"),
])
def test_mistakes_get_one_sentence(make, message):
    with pytest.raises((ValueError, TypeError), match=message) as error: make()
    assert "\n" not in str(error.value)
