"Tests of 13_generate. Generated from nbs/13_generate.ipynb: edit that, then run pythia_book build."
import math
import pytest
import tokenizers
import torch
import torch.nn.functional as F
from pythia_nb.config import PythiaConfig
from pythia_nb.generate import (
    END_OF_TEXT, KVCache, Tokenizer, generate, generate_text, keep_top_k, keep_top_p, left_pad, next_tokens,
    sample_next, stream, whole_characters,
)
from pythia_nb.model import Pythia
from tokenizers import decoders, models, pre_tokenizers, trainers


def toy_tokenizer(vocab_size=320):
    "A byte-level BPE tokenizer trained on three lines"
    text = ["The quick brown fox jumps over the lazy dog. ", "Grüße aus Köln, 日本語 🙂 ",
            "def fox(dog): return dog + 1\n"] * 4
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(text, trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END_OF_TEXT],
                                                      initial_alphabet=alphabet, show_progress=False))
    return Tokenizer(bpe)


def test_tokenizer_round_trip_and_files(tmp_path):
    tok = toy_tokenizer()
    for text in ["", "plain", "tabs\tand\r\nnewlines\n", "🦊 ünï 日本", "\x00\x7f"]:
        assert tok.decode(tok.encode(text)) == text
    assert tok.encode_batch(["a fox", "dog"]) == [tok.encode("a fox"), tok.encode("dog")]
    tok.save(tmp_path/"t"/"tokenizer.json")
    for path in (tmp_path/"t", tmp_path/"t"/"tokenizer.json"):
        again = Tokenizer.from_file(path)
        assert again.hash == tok.hash and again.encode("lazy fox") == tok.encode("lazy fox") and again.eos_id == 0
    assert toy_tokenizer(300).hash != tok.hash

def test_tokenizer_file_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer at"): Tokenizer.from_file(tmp_path/"nothing.json")
    (tmp_path/"broken.json").write_text("{")
    with pytest.raises(ValueError, match="broken.json is not a readable tokenizer file"):
        Tokenizer.from_file(tmp_path/"broken.json")


def toy_model(seed=0, vocab_size=320, **overrides):
    "A small model with weights so large that its next token depends on the whole text"
    torch.manual_seed(seed)
    config = PythiaConfig(**{**dict(vocab_size=vocab_size, hidden_size=64, num_layers=3, num_heads=4,
                                    max_position_embeddings=96), **overrides})
    model = Pythia(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1: p.normal_(0, 2 / math.sqrt(p.shape[1]))
            else: p.add_(0.1 * torch.randn_like(p))
    return model

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


@torch.no_grad()
def generate_slowly(model, ids, n):
    "Greedy generation that recomputes the whole text for every token"
    for _ in range(n): ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], 1)
    return ids


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("overrides", [{}, dict(rotary_pct=1.0), dict(parallel_residual=False),
                                       dict(tie_embeddings=True, num_heads=2)])
def test_cached_generation_equals_full_recomputation(seed, overrides):
    model = toy_model(seed, **overrides)
    prompts = [torch.randint(1, 320, (n,)).tolist() for n in (1, 5, 17, 8)]
    alone = [generate_slowly(model, torch.tensor([p]), 30)[0] for p in prompts]
    assert len({t for row in alone for t in row[-30:].tolist()}) > 20  # a test on one token repeated would test little
    for p, row in zip(prompts, alone): assert torch.equal(generate(model, p, 30, temperature=0)[0], row)
    ids, mask = left_pad(prompts)
    for out, row in zip(generate(model, ids, 30, attention_mask=mask, temperature=0), alone):
        assert torch.equal(out[-len(row):], row)

class BlockWindow:
    "Attention to one's own block and the one before it, blocks counted from the first column"
    pattern = "local"
    def __call__(self, q, k, v, *, segment_ids=None, q_start=None, **kwargs):
        L, S = q.shape[2], k.shape[2]
        i, j = torch.arange(L)[:, None] + (S - L if q_start is None else q_start), torch.arange(S)
        mask = ((j <= i) & (j // 4 >= i // 4 - 1))[None, None].expand(len(q), 1, L, S)
        if segment_ids is not None: mask = mask & (segment_ids[:, None, i[:, 0], None] == segment_ids[:, None, None])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

def test_patterns_do_not_move_with_the_padding():
    model = toy_model().set_pattern(BlockWindow())
    prompts = [torch.randint(1, 320, (n,)).tolist() for n in (1, 5, 18, 5, 8)]
    ids, mask = left_pad(prompts)
    alone = [generate(model, p, 20, temperature=0)[0] for p in prompts]
    for row, p in zip(alone, prompts): assert torch.equal(row, generate_slowly(model, torch.tensor([p]), 20)[0])
    out = generate(model.train(), ids, 20, attention_mask=mask, temperature=0)
    assert model.training and all(torch.equal(row[-len(a):], a) for row, a in zip(out, alone))
    eos = alone[2][18 + 6].item()
    ended = generate(model, ids, 20, attention_mask=mask, temperature=0, eos_id=eos)
    for row, want in zip(ended, out):
        new = want[18:].tolist()
        keep = new.index(eos) + 1 if eos in new else 20
        assert row[18:18 + keep].tolist() == new[:keep] and set(row[18 + keep:].tolist()) <= {eos}
    a, b, c = (generate(model, ids, 20, attention_mask=mask, seed=s) for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)

def test_only_the_attention_interface_is_used():
    calls = []
    model = toy_model()
    def attention(q, k, v, *, scale=None, segment_ids=None, kv_lengths=None, q_start=None, **kwargs):
        calls.append((q.shape[2], k.shape[2], None if segment_ids is None else tuple(segment_ids.shape)))
        return torch.zeros_like(q)
    model.set_pattern(attention)
    generate(model, [1, 2, 3], 3, temperature=0)
    assert calls == [(3, 3, None)] * 3 + [(1, 4, None)] * 3 + [(1, 5, None)] * 3
    calls.clear()
    ids, mask = left_pad([[1, 2, 3], [4]])
    generate(model, ids, 2, attention_mask=mask, temperature=0)
    assert calls == [(3, 3, (2, 3))] * 3 + [(1, 4, (2, 4))] * 3

def test_generation_stops_at_the_end_of_text():
    model = toy_model(1)
    free = generate(model, [[5, 6], [7, 8]], 20, temperature=0)
    eos = free[0, 6].item()
    out = generate(model, [[5, 6], [7, 8]], 20, temperature=0, eos_id=eos)
    first = [(row[2:] == eos).nonzero()[0, 0].item() + 2 if eos in row[2:] else 22 for row in free]
    assert out.shape[1] == min(max(first) + 1, 22)
    for row, want, end in zip(out, free, first):
        assert torch.equal(row[:end + 1], want[:end + 1]) and (row[end:] == eos).all()

def test_seed_repeats_and_mode_is_restored():
    model = toy_model(hidden_dropout=0.3).train()
    a, b, c = (generate(model, [3, 4], 30, seed=s) for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c) and model.training
    torch.manual_seed(5); a = generate(model, [3, 4], 30)
    torch.manual_seed(5); b = generate(model, [3, 4], 30)
    assert torch.equal(a, b) and generate(model, [3, 4], 0).tolist() == [[3, 4]]
    next(next_tokens(model, [1], 5))
    assert model.training


@pytest.mark.parametrize("options, message", [
    (dict(ids=[]), "the prompt is empty"), (dict(ids=[320]), "id 320 is outside the model's vocabulary of 320 ids"),
    (dict(ids=[-1]), "id -1 is outside"), (dict(ids=[1.5]), "expected ids as whole numbers"),
    (dict(ids="fox"), "ids cannot be read as numbers"), (dict(ids=[[1, 2], [3]]), "different lengths through left_pad"),
    (dict(ids=[True]), "expected ids as whole numbers"), (dict(ids=[1], max_new_tokens=2.5), "max_new_tokens is 2.5"),
    (dict(ids=[[[1]]]), "expected ids as whole numbers"),
    (dict(ids=[1] * 90, max_new_tokens=7), "make 97, but the model's context is 96; ask for at most 6"),
    (dict(ids=[1], max_new_tokens=-1), "max_new_tokens is -1"), (dict(ids=[1], temperature=-.5), "temperature is -0.5"),
    (dict(ids=[1], top_p=2), "top_p is 2"), (dict(ids=[1], top_k=0), "top_k is 0"),
    (dict(ids=[[1, 2]], attention_mask=torch.tensor([[1, 0]])), "padded on the left"),
    (dict(ids=[[1, 2]], attention_mask=torch.tensor([[1]])), "they must agree")])
def test_generate_mistakes(options, message):
    with pytest.raises(ValueError, match=message) as e: generate(toy_model(), **{"max_new_tokens": 4, **options})
    assert "\n" not in str(e.value)

def test_left_pad_mistakes():
    for prompts in ([], [[1], []]):
        with pytest.raises(ValueError, match="a prompt is empty"): left_pad(prompts)

def test_the_last_position_of_the_context_can_be_reached():
    assert generate(toy_model(), [1] * 90, 6, temperature=0).shape == (1, 96)


@pytest.mark.parametrize("text", ["plain text", "🦊🙂🙃", "Grüße, 日本語!", "�", "a�b", "é" * 40, ""])
def test_pieces_are_whole_and_complete(text):
    tok = toy_tokenizer(300)
    pieces = list(whole_characters(tok, tok.encode(text)))
    assert "".join(pieces) == text and all(pieces)
    if "�" not in text: assert not any("�" in p for p in pieces)

def test_bytes_that_are_no_text_still_come_out():
    tok, generator = toy_tokenizer(), torch.Generator().manual_seed(0)
    for _ in range(200):
        ids = torch.randint(1, tok.vocab_size, (12,), generator=generator).tolist()
        assert "".join(whole_characters(tok, ids)) == tok.decode(ids)
    first_byte = tok.encode("🦊")[:1]
    assert list(whole_characters(tok, first_byte)) == ["�"]

def test_stream_equals_generate_text_and_stops():
    model, tok = toy_model(vocab_size=320), toy_tokenizer()
    for seed in range(5):
        whole = generate_text(model, tok, "The fox", 30, seed=seed)
        ids = generate(model, tok.encode("The fox"), 30, seed=seed, eos_id=tok.eos_id)[0, len(tok.encode("The fox")):]
        assert whole == "".join(stream(model, tok, "The fox", 30, seed=seed)) == tok.decode(ids)
    greedy = generate(model, tok.encode("dog"), 10, temperature=0)[0, len(tok.encode("dog")):].tolist()
    cut = generate_text(model, tok, "dog", 10, temperature=0, eos_id=greedy[4])
    assert cut == tok.decode(greedy[:greedy.index(greedy[4])])
    with pytest.raises(ValueError, match="the prompt is empty"): generate_text(model, tok, "")
