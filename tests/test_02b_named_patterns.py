"Tests of 02b_named_patterns. Generated from nbs/02b_named_patterns.ipynb: edit that, then run pythia_book build."
import pytest
import torch
from hypothesis import given, settings, strategies as st
from pythia_nb.named_patterns import (
    Grid, check_rule, dense, dilated, fixed, global_tokens, local, per_head, random_blocks, sinks, strided,
)


def token_rules(N):
    "name -> (pattern, rule on token positions q, k); window, stride and so on in blocks of N tokens"
    qb, kb = (lambda q: q // N), (lambda k: k // N)
    return {
        "dense": (dense(), lambda q, k: True),
        "local": (local(3), lambda q, k: abs(qb(q) - kb(k)) < 3),
        "strided": (strided(3), lambda q, k: kb(k) % 3 == 0),
        "fixed": (fixed(4, 2), lambda q, k: q // (4 * N) == k // (4 * N) or kb(k) % 4 >= 2),
        "dilated": (dilated(3, 2), lambda q, k: abs(qb(q) - kb(k)) in (0, 2, 4)),
        "dilated_all": (dilated(None, 3), lambda q, k: (qb(q) - kb(k)) % 3 == 0),
        "sinks": (sinks(2), lambda q, k: k < 2 * N),
        "global_tokens": (global_tokens(2), lambda q, k: k < 2 * N or q < 2 * N),
    }


@pytest.mark.parametrize("name", token_rules(16))
@settings(max_examples=20, deadline=None)
@given(nQ=st.integers(1, 14), nK=st.integers(1, 14), causal=st.booleans(), data=st.data())
def test_patterns_follow_their_token_rule(name, nQ, nK, causal, data):
    check_rule(*token_rules(16)[name], nQ, nK, causal, lambda: data.draw(st.integers(0, 15)))


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


@pytest.mark.parametrize("make, message", [
    (lambda: local(1.5), "whole number of at least 1"),
    (lambda: per_head([]), "empty list"),
])
def test_mistakes_get_one_sentence(make, message):
    with pytest.raises((ValueError, TypeError), match=message) as error: make()
    assert "\n" not in str(error.value)
