"Tests of 03_patterns. Generated from nbs/03_patterns.ipynb: edit that, then run pythia_book build."
import pytest
import torch
from hypothesis import given, settings, strategies as st
from pythia_nb.patterns import (
    Difference, Grid, Intersection, Union, bigbird, dense, dilated, document, fixed, from_mask, from_predicate,
    global_tokens, local, longformer, mixed, parse, per_head, random_blocks, sinks, strided,
)


def token_rules(N):
    "name -> (pattern, rule on token positions q, k); window, stride and so on in blocks of N tokens"
    qb, kb = (lambda q: q // N), (lambda k: k // N)
    return {
        "dense": (dense(), lambda q, k: True),
        "local": (local(3), lambda q, k: abs(qb(q) - kb(k)) < 3),
        "strided": (strided(3), lambda q, k: kb(k) % 3 == 0),
        "mixed": (mixed(2, 3), lambda q, k: abs(qb(q) - kb(k)) < 2 or kb(k) % 3 == 0),
        "fixed": (fixed(4, 2), lambda q, k: q // (4 * N) == k // (4 * N) or kb(k) % 4 >= 2),
        "dilated": (dilated(3, 2), lambda q, k: abs(qb(q) - kb(k)) in (0, 2, 4)),
        "dilated_all": (dilated(None, 3), lambda q, k: (qb(q) - kb(k)) % 3 == 0),
        "sinks": (sinks(2), lambda q, k: k < 2 * N),
        "global_tokens": (global_tokens(2), lambda q, k: k < 2 * N or q < 2 * N),
        "longformer": (longformer(2, 1), lambda q, k: abs(qb(q) - kb(k)) < 2 or k < N or q < N),
        "minus": (dense() - local(2), lambda q, k: abs(qb(q) - kb(k)) >= 2),
        "and": (dilated(None, 2) & strided(3), lambda q, k: (qb(q) - kb(k)) % 2 == 0 and kb(k) % 3 == 0),
    }


@pytest.mark.parametrize("name", token_rules(16))
@settings(max_examples=20, deadline=None)
@given(nQ=st.integers(1, 14), nK=st.integers(1, 14), causal=st.booleans(), data=st.data())
def test_patterns_follow_their_token_rule(name, nQ, nK, causal, data):
    N = 16
    pattern, rule = token_rules(N)[name]
    mask = pattern.mask(nQ, nK, causal=causal)[0]
    for i in range(nQ):
        for j in range(nK):
            q = i * N + data.draw(st.integers(0, N - 1)) if i == nQ - 1 else i * N + (i * 7) % N
            k = j * N + (j * 5) % N
            assert mask[i, j] == (bool(rule(q, k)) and (not causal or j <= i)), (i, j)


def simple_patterns():
    "Hypothesis strategy: any named pattern with small numbers"
    n = st.integers(1, 5)
    return st.one_of(
        st.just(dense()), st.builds(local, n), st.builds(strided, n), st.builds(mixed, n, n), st.builds(sinks, n),
        st.builds(global_tokens, n), st.builds(dilated, st.one_of(st.none(), n), n), st.builds(longformer, n, n),
        st.builds(lambda b, s: fixed(b, min(b, s)), n, n), st.builds(random_blocks, n, n, st.integers(0, 3), st.integers(0, 3)),
        st.builds(bigbird, n, n, n, n))

def any_pattern():
    "Hypothesis strategy: expressions of named patterns"
    return st.recursive(simple_patterns(), lambda p: st.one_of(
        st.builds(Union, p, p), st.builds(Intersection, p, p), st.builds(Difference, p, p)), max_leaves=4)


@settings(max_examples=150, deadline=None)
@given(pattern=any_pattern(), n_keys=st.integers(1, 20), causal=st.booleans(),
       rows=st.lists(st.integers(0, 19), min_size=1, max_size=20, unique=True))
def test_listing_testing_and_counting_agree(pattern, n_keys, causal, rows):
    grid, i = Grid(n_keys, causal), torch.tensor(rows)
    keys = pattern.keys(i, grid)
    assert torch.equal(keys, keys.unique()), "sorted and without repeats"
    listed = torch.zeros(len(i) * n_keys, dtype=torch.bool)
    listed[keys] = True
    r, j = torch.arange(len(i)).repeat_interleave(n_keys), torch.arange(n_keys).repeat(len(i))
    assert torch.equal(listed, pattern.contains(i[r], j, grid))
    assert (listed.view(len(i), -1).sum(1) <= pattern.count(i, grid)).all()
    assert torch.equal(listed.view(len(i), -1), pattern.mask(20, n_keys, causal)[0][i])


@settings(max_examples=100, deadline=None)
@given(pattern=any_pattern())
def test_patterns_print_as_what_parse_reads(pattern):
    again = parse(repr(pattern))
    assert again == pattern and hash(again) == hash(pattern) and repr(again) == repr(pattern)

def test_global_is_read_as_a_name():
    assert parse("global") == strided() and parse("global(3) | local(2)") == strided(3) | local(2)
    assert parse("longformer(window=2, global=1)") == longformer(2, 1)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 6), seed=st.integers(0, 99), window=st.integers(0, 4), skip=st.integers(0, 4), causal=st.booleans())
def test_random_blocks_are_distinct_and_outside(n, seed, window, skip, causal):
    mask = random_blocks(n, seed, window, skip).mask(24, causal=causal)[0]
    i, j = torch.arange(24)[:, None], torch.arange(24)[None]
    candidate = (j >= skip) & ((i - j).abs() >= window) & ((j <= i) if causal else torch.ones_like(j <= i))
    assert not (mask & ~candidate).any()
    assert torch.equal(mask.sum(1), candidate.sum(1).clamp(max=n))

def test_random_blocks_spread_evenly():
    draws = torch.cat([random_blocks(3, seed).chosen(torch.full((1,), 99), Grid(100))[0] for seed in range(2000)])
    count = draws.bincount(minlength=100).float()
    assert (count - 60).abs().max() < 39    # 60 expected, five standard deviations of sqrt(60 * 0.97)


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


@pytest.mark.parametrize("make, message", [
    (lambda: local(2) | "dense", "joins two patterns"),
    (lambda: local(1.5), "whole number of at least 1"),
    (lambda: per_head([local(1)] * 2) | per_head([local(1)] * 3), "same number of heads"),
    (lambda: per_head([]), "empty list"),
    (lambda: document(torch.tensor([0, 1, 0])), "one stretch"),
    (lambda: document(torch.zeros(2, 3, dtype=torch.int64)), "one whole number for each token"),
    (lambda: document(torch.zeros(64, dtype=torch.int64)) | local(1), "& document"),
    (lambda: dense() - document(torch.zeros(64, dtype=torch.int64)), "right of -"),
    (lambda: (dense() - from_mask(torch.ones(2, 4, dtype=torch.bool))).mask(4), "larger mask"),
    (lambda: document(torch.zeros(64, dtype=torch.int64)).mask(4, block=32), "an id for each token"),
    (lambda: from_mask(torch.ones(2, 2)), "boolean matrix"),
    (lambda: from_mask(torch.ones(2, 2, dtype=torch.bool)).mask(3), "larger mask"),
    (lambda: parse("bigbrd"), "did you mean 'bigbird'"),
    (lambda: parse("open('x')"), "unknown pattern 'open'"),
    (lambda: parse("local(2"), "can't be read"),
    (lambda: parse("local(-1)"), "window is -1"),
    (lambda: parse("local(wide=3)"), r"takes \(window\), and got \(wide=3\)"),
    (lambda: parse("local(99999999999999999999)"), "below 2"),
    (lambda: parse(repr(from_mask(torch.ones(2, 2, dtype=torch.bool)))), "holds data"),
])
def test_mistakes_get_one_sentence(make, message):
    with pytest.raises((ValueError, TypeError), match=message) as error: make()
    assert "\n" not in str(error.value)


def test_mask_and_predicate_patterns_agree_with_their_source():
    table = torch.rand(3, 6, 6, generator=torch.Generator().manual_seed(0)) < 0.4
    assert torch.equal(from_mask(table).mask(6, causal=False), table)
    assert torch.equal(from_mask(table).mask(6), table.tril())
    assert torch.equal((from_mask(table) & local(2)).mask(6), (table & local(2).mask(6)))
    rule = from_predicate(lambda q, k: (q // 32 + k // 32) % 3 == 0)
    i, j = torch.arange(6)[:, None], torch.arange(6)[None]
    assert torch.equal(rule.mask(6, causal=False, block=32)[0], (i + j) % 3 == 0)
    assert torch.equal((local(3) & rule).mask(6, block=32)[0], (((i + j) % 3 == 0) & local(3).mask(6)[0]))
    assert torch.equal(from_predicate(lambda q, k: True).mask(6, block=32), dense().mask(6))
    heads = per_head([dense(), from_mask(table[0]), per_head([local(2)])])    # a list for all heads serves any head
    assert torch.equal(heads.mask(6), torch.stack([dense().mask(6)[0], table[0].tril(), local(2).mask(6)[0]]))
    assert torch.equal((heads & from_mask(table[1])).mask(6), heads.mask(6) & table[1])
    rounded = from_predicate(lambda q, k: q - k < 40, exact=False)
    assert torch.equal(rounded.mask(6, block=32), local(3).mask(6))    # 40 tokens reach into the second block before
