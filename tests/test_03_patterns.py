"Tests of 03_patterns. Generated from nbs/03_patterns.ipynb: edit that, then run pythia_book build."
import pytest
import torch
from hypothesis import given, settings, strategies as st
from pythia_nb.data_patterns import document, from_mask, from_predicate
from pythia_nb.named_patterns import (
    Grid, check_rule, dense, dilated, fixed, global_tokens, local, per_head, random_blocks, sinks, strided,
)
from pythia_nb.patterns import Difference, Intersection, Union, bigbird, longformer, mixed, parse


def token_rules(N):
    "name -> (pattern, rule on token positions q, k); window, stride and so on in blocks of N tokens"
    qb, kb = (lambda q: q // N), (lambda k: k // N)
    return {
        "mixed": (mixed(2, 3), lambda q, k: abs(qb(q) - kb(k)) < 2 or kb(k) % 3 == 0),
        "longformer": (longformer(2, 1), lambda q, k: abs(qb(q) - kb(k)) < 2 or k < N or q < N),
        "minus": (dense() - local(2), lambda q, k: abs(qb(q) - kb(k)) >= 2),
        "and": (dilated(None, 2) & strided(3), lambda q, k: (qb(q) - kb(k)) % 2 == 0 and kb(k) % 3 == 0),
    }


@pytest.mark.parametrize("name", token_rules(16))
@settings(max_examples=20, deadline=None)
@given(nQ=st.integers(1, 14), nK=st.integers(1, 14), causal=st.booleans(), data=st.data())
def test_patterns_follow_their_token_rule(name, nQ, nK, causal, data):
    check_rule(*token_rules(16)[name], nQ, nK, causal, lambda: data.draw(st.integers(0, 15)))


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


def test_mask_and_predicate_patterns_join_like_others():
    table = torch.rand(3, 6, 6, generator=torch.Generator().manual_seed(0)) < 0.4
    assert torch.equal((from_mask(table) & local(2)).mask(6), (table & local(2).mask(6)))
    rule = from_predicate(lambda q, k: (q // 32 + k // 32) % 3 == 0)
    i, j = torch.arange(6)[:, None], torch.arange(6)[None]
    assert torch.equal((local(3) & rule).mask(6, block=32)[0], (((i + j) % 3 == 0) & local(3).mask(6)[0]))
    heads = per_head([dense(), from_mask(table[0]), per_head([local(2)])])    # a list for all heads serves any head
    assert torch.equal((heads & from_mask(table[1])).mask(6), heads.mask(6) & table[1])


@pytest.mark.parametrize("make, message", [
    (lambda: local(2) | "dense", "joins two patterns"),
    (lambda: per_head([local(1)] * 2) | per_head([local(1)] * 3), "same number of heads"),
    (lambda: document(torch.zeros(64, dtype=torch.int64)) | local(1), "& document"),
    (lambda: dense() - document(torch.zeros(64, dtype=torch.int64)), "right of -"),
    (lambda: (dense() - from_mask(torch.ones(2, 4, dtype=torch.bool))).mask(4), "larger mask"),
])
def test_mistakes_get_one_sentence(make, message):
    with pytest.raises((ValueError, TypeError), match=message) as error: make()
    assert "\n" not in str(error.value)


@settings(max_examples=100, deadline=None)
@given(pattern=any_pattern())
def test_patterns_print_as_what_parse_reads(pattern):
    again = parse(repr(pattern))
    assert again == pattern and hash(again) == hash(pattern) and repr(again) == repr(pattern)

def test_global_is_read_as_a_name():
    assert parse("global") == strided() and parse("global(3) | local(2)") == strided(3) | local(2)
    assert parse("longformer(window=2, global=1)") == longformer(2, 1)


@pytest.mark.parametrize("make, message", [
    (lambda: parse("bigbrd"), "did you mean 'bigbird'"),
    (lambda: parse("open('x')"), "unknown pattern 'open'"),
    (lambda: parse("local(2"), "can't be read"),
    (lambda: parse("local(-1)"), "window is -1"),
    (lambda: parse("local(wide=3)"), r"takes \(window\), and got \(wide=3\)"),
    (lambda: parse("local(99999999999999999999)"), "below 2"),
    (lambda: parse(repr(from_mask(torch.ones(2, 2, dtype=torch.bool)))), "holds data"),
])
def test_mistakes_in_text_get_one_sentence(make, message):
    with pytest.raises((ValueError, TypeError), match=message) as error: make()
    assert "\n" not in str(error.value)
