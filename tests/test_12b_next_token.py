"Tests of 12b_next_token. Generated from nbs/12b_next_token.ipynb: edit that, then run pythia_book build."
import math
import pytest
import torch
from pythia_nb.next_token import KVCache, keep_top_k, keep_top_p, sample_next, toy_model


@pytest.mark.parametrize("chunks", [[1] * 9, [9], [4, 5], [1, 7, 1], [3, 1, 1, 4]])
@pytest.mark.parametrize("overrides", [{}, dict(rotary_pct=1.0, parallel_residual=False), dict(tie_embeddings=True)])
def test_cache_equals_the_whole_pass(chunks, overrides):
    model = toy_model(**overrides)
    ids, cache, start, out = torch.randint(320, (2, 9)), KVCache(model.config, 2, 12), 0, []
    with torch.no_grad():
        for n in chunks:
            out.append(model(ids[:, start:start + n], cache=cache))
            start += n
            assert cache.length == start
        torch.testing.assert_close(torch.cat(out, 1), model(ids), atol=2e-4, rtol=2e-4)


def test_cache_truncate_and_limits():
    model = toy_model()
    a, b = torch.randint(320, (1, 6)), torch.randint(320, (1, 3))
    cache = KVCache(model.config, 1, 9)
    with torch.no_grad():
        first = model(a, cache=cache)
        model(b, cache=cache)
        cache.truncate(4)
        torch.testing.assert_close(model(a[:, 4:], cache=cache), first[:, 4:], atol=2e-4, rtol=2e-4)
    with pytest.raises(ValueError, match="cannot cut a cache of 6 tokens to 7"): cache.truncate(7)
    full = "the cache is full: it holds 6 tokens, 4 more do not fit into 9"
    with pytest.raises(ValueError, match=full), torch.no_grad(): model(torch.zeros(1, 4, dtype=torch.long), cache=cache)
    for batch, n in ((2, 1), (1, 2)):
        with pytest.raises(ValueError, match=f"the cache is for {batch} sequences, {n} were given"), torch.no_grad():
            model(torch.zeros(n, 2, dtype=torch.long), cache=KVCache(model.config, batch, 9))
    assert KVCache(model.config).max_length == model.config.max_position_embeddings
    assert KVCache(model.config, dtype=torch.bfloat16).keys[0].dtype == torch.bfloat16


def test_top_k_and_top_p_keep_exactly_the_right_tokens():
    probs = torch.tensor([[.5, .25, .125, .0625, .0625], [.0625, .0625, .125, .25, .5]])
    def kept(logits): return [[i for i, x in enumerate(row) if x > -math.inf] for row in logits.tolist()]
    assert kept(keep_top_k(probs.log(), 2)) == [[0, 1], [3, 4]]
    assert kept(keep_top_k(probs.log(), 99)) == [[0, 1, 2, 3, 4]] * 2
    assert [len(r) for r in kept(keep_top_k(torch.zeros(2, 5), 3))] == [3, 3]
    for p, n in [(1e-9, 1), (.5, 1), (.500001, 2), (.75, 2), (.76, 3), (.875, 3), (.88, 4), (1.0, 5)]:
        assert [len(r) for r in kept(keep_top_p(probs.log(), p))] == [n, n], p
    torch.testing.assert_close(keep_top_p(probs.log(), .75)[:, [0, 4]],
                               probs.log()[:, [0, 4]].where(probs[:, [0, 4]] > .1, torch.tensor(-math.inf)))


def test_sampling_follows_the_distribution():
    z = torch.tensor([2., 1., 0., -1., -2.]).expand(40_000, -1)
    def frequencies(**kw):
        return sample_next(z, generator=torch.Generator().manual_seed(1), **kw).bincount(minlength=5) / len(z)
    for kw, p in [({}, z[0].softmax(-1)), (dict(temperature=2.), (z[0] / 2).softmax(-1)),
                  (dict(top_k=2), torch.tensor([2., 1.]).softmax(-1).tolist() + [0, 0, 0]),
                  (dict(top_p=.8), torch.tensor([2., 1.]).softmax(-1).tolist() + [0, 0, 0]),
                  (dict(temperature=1e-9), [1, 0, 0, 0, 0]), (dict(temperature=0.), [1, 0, 0, 0, 0])]:
        p, f = torch.as_tensor(p), frequencies(**kw)
        assert (f - p).abs().max() < 5 * 0.5 / math.sqrt(len(z)), kw
        assert (f[p == 0] == 0).all()

def test_sampling_is_repeatable_and_checked():
    z = torch.randn(64, 100)
    a, b, c = (sample_next(z, generator=torch.Generator().manual_seed(s)) for s in (3, 3, 4))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(sample_next(z, 0), z.argmax(-1)) and torch.equal(sample_next(z, top_k=1), z.argmax(-1))
    assert sample_next(z.bfloat16(), top_p=.9).dtype == torch.int64
    for kw, message in [(dict(temperature=-1.), "temperature is -1"),
                        (dict(temperature=math.nan), "temperature is nan"),
                        (dict(top_k=0), "top_k is 0"), (dict(top_k=1.5), "top_k is 1.5"),
                        (dict(top_p=0.), "top_p is 0"), (dict(top_p=1.1), "top_p is 1.1")]:
        with pytest.raises(ValueError, match=message): sample_next(z, **kw)
    with pytest.raises(ValueError, match="the logits contain NaN"): sample_next(torch.full((1, 3), math.nan))
