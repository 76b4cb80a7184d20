"Tests of 13_generate. Generated from nbs/13_generate.ipynb: edit that, then run pythia_book build."
import pytest
import torch
import torch.nn.functional as F
from pythia_nb.generate import generate, generate_text, left_pad, next_tokens, stream
from pythia_nb.next_token import toy_model
from pythia_nb.tokenizer import toy_tokenizer


def test_left_pad_mistakes():
    for prompts in ([], [[1], []]):
        with pytest.raises(ValueError, match="a prompt is empty"): left_pad(prompts)


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

def test_the_last_position_of_the_context_can_be_reached():
    assert generate(toy_model(), [1] * 90, 6, temperature=0).shape == (1, 96)


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
