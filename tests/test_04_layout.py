"Tests of 04_layout. Generated from nbs/04_layout.ipynb: edit that, then run pythia_book build."
import pytest
import subprocess
import sys
import torch
from hypothesis import given, settings, strategies as st
from pythia_nb import patterns as P
from pythia_nb.layout import BlockLayout


def some_pattern():
    "Hypothesis strategy: patterns of all kinds, with one list or one for each of three heads"
    n = st.integers(1, 4)
    one = st.one_of(st.just(P.dense()), st.builds(P.local, n), st.builds(P.strided, n), st.builds(P.mixed, n, n),
                    st.builds(P.bigbird, n, n, n, n), st.builds(P.dilated, n, n), st.builds(lambda a: P.dense() - P.local(a), n))
    return st.one_of(one, st.lists(one, min_size=3, max_size=3).map(P.per_head))


@settings(max_examples=120, deadline=None)
@given(pattern=some_pattern(), L=st.integers(1, 150), S=st.integers(1, 150), block=st.sampled_from([16, 32]),
       causal=st.booleans(), start=st.one_of(st.none(), st.integers(-40, 150)))
def test_lists_follow_the_pattern(pattern, L, S, block, causal, start):
    layout = pattern.layout(L, S, block, causal, q_start=start)
    first = layout.q_start // block
    n = max(first + layout.nQ, layout.nK, 1)
    mask = pattern.mask(n, layout.nK, causal)
    for head in range(layout.heads):
        for r in range(layout.nQ):
            expected = mask[head, first + r].nonzero().flatten() if first + r >= 0 else torch.arange(0)
            if first + r < 0 and not causal: continue    # nothing is promised of positions before the first
            assert layout.row(r, head).tolist() == expected.tolist()


@settings(max_examples=120, deadline=None)
@given(pattern=some_pattern(), L=st.integers(1, 150), S=st.integers(1, 150), block=st.sampled_from([16, 32]), causal=st.booleans())
def test_columns_are_the_transpose_of_rows(pattern, L, S, block, causal):
    layout = pattern.layout(L, S, block, causal)
    assert layout.row_ptr[-1] == layout.col_ptr[-1] == layout.visible == len(layout.col_rows)
    codes = torch.zeros(layout.heads * layout.nK, layout.nQ, dtype=torch.int32)
    codes[torch.repeat_interleave(layout.col_ptr.diff().long()), layout.col_rows.long()] = 1 + layout.col_full.int()
    assert torch.equal(codes.view(layout.heads, layout.nK, layout.nQ).mT, layout.codes())
    for at in range(layout.heads * layout.nK):
        rows = layout.col_rows[layout.col_ptr[at]:layout.col_ptr[at + 1]]
        assert (rows.diff() > 0).all()


@settings(max_examples=120, deadline=None)
@given(pattern=some_pattern(), lengths=st.lists(st.integers(1, 60), min_size=1, max_size=5), queries=st.integers(1, 200),
       block=st.sampled_from([16, 32]), causal=st.booleans(), documents=st.booleans())
def test_full_blocks_are_full_and_partial_ones_are_not(pattern, lengths, queries, block, causal, documents):
    S = sum(lengths)
    L = min(queries, S)
    if documents: pattern = pattern & P.document(torch.repeat_interleave(torch.tensor(lengths)))
    layout = pattern.layout(L, S, block, causal)
    mask, codes, first = layout.token_mask(), layout.codes(), layout.q_start // block
    for r in range(layout.nQ):
        q = slice(max((first + r) * block - layout.q_start, 0), (first + r + 1) * block - layout.q_start)
        for j in range(layout.nK):
            seen = mask[:, q, j * block:(j + 1) * block]
            whole = seen.flatten(1).all(1) & (seen.shape[2] == block)
            assert (whole | (codes[:, r, j] != 2)).all(), "a full block hides a pair"
            complete = seen.shape[1] == block    # a ragged row may see all of a block that its missing queries would not
            if complete: assert (~whole | (codes[:, r, j] == 2)).all(), "a block without hidden pairs is marked partial"


def test_one_token_sees_what_it_sees_in_the_whole():
    pattern = P.per_head([P.bigbird(2, 1, 2), P.strided(3) | P.local(1)])
    whole = pattern.layout(300, block=32).token_mask()
    for length in (1, 31, 32, 33, 129, 300):
        assert torch.equal(pattern.layout(L=1, S=length, block=32).token_mask()[:, 0], whole[:, length - 1, :length])


def test_more_queries_than_keys_leave_the_first_rows_empty():
    layout = P.dense().layout(L=100, S=40, block=16)
    assert layout.q_start == -60 and not layout.token_mask()[0, :60].any()
    assert torch.equal(layout.token_mask()[0, 60:], torch.ones(40, 40, dtype=torch.bool).tril())
    assert (P.dense() - P.dense()).layout(64, block=16).visible == 0


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=6), L=st.integers(1, 150), S=st.integers(1, 150),
       start=st.integers(0, 100), block=st.sampled_from([16, 32]), causal=st.booleans())
def test_documents_hold_wherever_the_queries_stand(lengths, L, S, start, block, causal):
    ids = torch.repeat_interleave(torch.tensor([*lengths, 300]))    # the last document lies over all ends
    layout = P.document(ids).layout(L, S, block, causal, q_start=start)
    q, k = torch.arange(start, start + L), torch.arange(S)
    expected = (ids[q][:, None] == ids[k]) & ((k <= q[:, None]) if causal else torch.ones(L, S, dtype=torch.bool))
    assert torch.equal(layout.token_mask()[0], expected)

def test_two_document_patterns_both_hold():
    a, b = (torch.repeat_interleave(torch.tensor(lengths)) for lengths in ([50, 70], [80, 40, 10]))
    got = (P.document(a) & P.local(3) & P.document(b)).layout(120, block=32).token_mask()[0]
    same = (a[:, None] == a) & (b[:120, None] == b[:120])
    assert torch.equal(got, same & P.local(3).layout(120, block=32).token_mask()[0])


@settings(max_examples=40, deadline=None)
@given(nQ=st.integers(1, 6), nK=st.integers(1, 6), heads=st.integers(1, 3), causal=st.booleans(), seed=st.integers(0, 9))
def test_block_mask_round_trip(nQ, nK, heads, causal, seed):
    mask = torch.rand(heads, nQ, nK, generator=torch.Generator().manual_seed(seed)) < 0.5
    layout = BlockLayout.from_block_mask(mask, block=32, causal=causal)
    i = torch.arange(nQ)[:, None] + (nK - nQ if causal else 0)
    expected = mask & (torch.arange(nK) <= i) if causal else mask
    assert torch.equal(layout.codes() > 0, expected)


@pytest.mark.parametrize("make, message", [
    (lambda: P.local(1).layout(128, block=48), "block size 48 is not one of 16, 32, 64, 128; choose 32 or 64, or pad"),
    (lambda: P.local(1).layout(0), "at least one token"),
    (lambda: BlockLayout.from_block_mask(torch.ones(2, 2)), "give booleans"),
    (lambda: BlockLayout.from_block_mask(torch.ones(2, 2, dtype=torch.bool), L=300), "need"),
])
def test_mistakes_get_one_sentence(make, message):
    with pytest.raises(ValueError, match=message) as error: make()
    assert "\n" not in str(error.value)


MILLION = """
import resource, time
import pythia_nb.layout
from pythia_nb import patterns as P
P.bigbird().layout(4096)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before, start = peak(), time.perf_counter()
layout = P.bigbird().layout(1_048_576, block=64)
print(time.perf_counter() - start, peak() - before, layout.visible)
"""

def test_a_million_tokens():
    done = subprocess.run([sys.executable, "-c", MILLION], capture_output=True, text=True, check=True)
    seconds, megabytes, visible = map(float, done.stdout.split())
    assert seconds < 1 and megabytes < 300 and visible > 8 * 16000
