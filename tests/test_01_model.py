"Tests of 01_model. Generated from nbs/01_model.ipynb: edit that, then run pythia_book build."
import copy
import io
import math
import pytest
import torch
import torch.nn.functional as F
from pythia_nb.config import PythiaConfig
from pythia_nb.model import Pythia, dense_attention
from pythia_nb.rotary import SCALINGS
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM


@pytest.mark.parametrize("masks", [{}, {"segments": True}, {"lengths": True}, {"segments": True, "lengths": True}])
@pytest.mark.parametrize("L, S, q_start", [(7, 7, None), (3, 7, None), (1, 7, None), (1, 7, 3), (2, 9, 4),
                                           (5, 3, None)])
def test_dense_attention(L, S, q_start, masks):
    "Against the definition, with heads that differ; rows that see nothing are zero, with zero gradients."
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 16, dtype=torch.float64, requires_grad=True) for n in (L, S, S))
    kwargs = dict(q_start=q_start)
    segments = torch.tensor([[0] * S, [0] * (S // 2) + [1] * (S - S // 2)])
    lengths = torch.tensor([0, S - 2])
    if "segments" in masks: kwargs["segment_ids"] = segments
    if "lengths" in masks: kwargs["kv_lengths"] = lengths
    start = S - L if q_start is None else q_start
    expected = torch.zeros(2, 3, L, 16, dtype=torch.float64)
    for b in range(2):
        for i in range(L):
            seen = [j for j in range(S) if j <= start + i and ("lengths" not in masks or j < lengths[b])
                    and ("segments" not in masks or segments[b, start + i] == segments[b, j])]
            if seen: expected[b, :, i] = ((q[b, :, i:i + 1] @ k[b, :, seen].mT / 4).softmax(-1) @ v[b, :, seen])[:, 0]
    got = dense_attention(q, k, v, **kwargs)
    assert torch.allclose(got, expected)
    weights = torch.randn_like(got)
    ours = torch.autograd.grad((got * weights).sum(), [q, k, v])
    theirs = torch.autograd.grad((expected * weights).sum(), [q, k, v], materialize_grads=True)
    for a, b in zip(ours, theirs): assert torch.allclose(a, b)


def test_documents_do_not_see_each_other():
    "Two documents in one sequence: changing the first leaves the second's logits; padding changes nothing."
    torch.manual_seed(0)
    model = Pythia(PythiaConfig(vocab_size=50, hidden_size=32, num_layers=2, num_heads=2)).eval()
    ids = torch.randint(0, 50, (1, 12))
    segments = torch.tensor([[0] * 5 + [1] * 7])
    other = ids.clone()
    other[0, :5] = torch.randint(0, 50, (5,))
    a, b = model(ids, segment_ids=segments), model(other, segment_ids=segments)
    assert torch.equal(a[:, 5:], b[:, 5:]) and not torch.allclose(a[:, :5], b[:, :5])
    # a segment numbered 0 and padding stay apart
    a = model(ids, torch.tensor([[0, 0] + [1] * 10]), segment_ids=torch.zeros(1, 12, dtype=torch.long))
    b = model(other, torch.tensor([[0, 0] + [1] * 10]), segment_ids=torch.zeros(1, 12, dtype=torch.long))
    ids2 = ids.clone()
    ids2[0, :2] = 3
    c = model(ids2, torch.tensor([[0, 0] + [1] * 10]), segment_ids=torch.zeros(1, 12, dtype=torch.long))
    assert torch.equal(a[:, 2:], c[:, 2:]) and not torch.allclose(a[:, 5:], b[:, 5:])


class GrowingCache:
    "The smallest cache that the model accepts."
    def __init__(self): self.length, self.held = 0, {}
    def update(self, layer, k, v):
        old = self.held.get(layer)
        self.held[layer] = (k, v) if old is None else (torch.cat([old[0], k], 2), torch.cat([old[1], v], 2))
        return self.held[layer]
    def advance(self, n): self.length += n

@torch.no_grad()
def test_cache_equals_recomputation():
    "Fed in pieces of different lengths, with padding on the left, the logits are those of the whole sequence."
    torch.manual_seed(0)
    model = Pythia(PythiaConfig(vocab_size=50, hidden_size=32, num_layers=2, num_heads=2, rotary_pct=1.0)).eval()
    ids, mask = torch.randint(0, 50, (2, 12)), torch.tensor([[1] * 12, [0] * 3 + [1] * 9])
    for attention_mask in (None, mask):
        whole, cache, pieces = model(ids, attention_mask), GrowingCache(), []
        for a, b in [(0, 5), (5, 6), (6, 10), (10, 12)]:
            pieces.append(model(ids[:, a:b], None if attention_mask is None else mask[:, :b], cache=cache))
        assert cache.length == 12 and torch.allclose(torch.cat(pieces, 1)[mask.bool()], whole[mask.bool()], atol=1e-5)


@pytest.mark.parametrize("call, words", [
    (lambda m: m(torch.tensor([[0, 50]])), ["50", "vocabulary of 50", "tokenizer"]),
    (lambda m: m(torch.tensor([[-1, 3]])), ["-1", "vocabulary"]),
    (lambda m: m(torch.zeros(2, 0, dtype=torch.long)), ["empty", "[2, 0]"]),
    (lambda m: m(torch.zeros(0, 2, dtype=torch.long)), ["empty"]),
    (lambda m: m(torch.zeros(3, dtype=torch.long)), ["[3]", "[batch, length]"]),
    (lambda m: m(torch.zeros(1, 3)), ["float32", "integers"]),
    (lambda m: m([[1, 2]]), ["list", "tensor"]),
    (lambda m: m(torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 4)), ["attention_mask", "[1, 4]", "[1, 3]"]),
    (lambda m: m(torch.zeros(1, 3, dtype=torch.long), segment_ids=torch.ones(3)), ["segment_ids", "[3]"]),
    (lambda m: m.loss(torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 2, dtype=torch.long)), ["targets", "[1, 2]"]),
    (lambda m: m.loss(torch.zeros(1, 1, dtype=torch.long), torch.full((1, 1), 99)), ["targets hold 99", "50"]),
    (lambda m: m.loss(*torch.zeros(2, 1, 1, dtype=torch.long), chunk=0), ["chunk is 0"]),
])
def test_bad_calls(call, words):
    "One sentence that names what was given."
    model = Pythia(PythiaConfig(vocab_size=50, hidden_size=32, num_layers=1, num_heads=2))
    with pytest.raises(ValueError) as e: call(model)
    assert "\n" not in str(e.value) and all(word in str(e.value) for word in words), str(e.value)


def test_bad_configuration():
    "A name in the place of a configuration."
    with pytest.raises(TypeError, match="preset"): Pythia("70m")


def test_attention_is_handed_in():
    "One function for all, one for each layer; none of it in the state dict; a bare signature without dropout suffices."
    calls = []
    def function(name):
        def attend(q, k, v, *, segment_ids=None, q_start=None): # no dropout parameter
            calls.append(name)
            return dense_attention(q, k, v, segment_ids=segment_ids, q_start=q_start)
        return attend
    config = PythiaConfig(vocab_size=50, hidden_size=32, num_layers=3, num_heads=2)
    model = Pythia(config, pattern=function("all"))
    ids = torch.randint(0, 50, (2, 9))
    expected = model(ids)
    assert calls == ["all"] * 3 and torch.equal(model.set_pattern(None)(ids), expected) and len(calls) == 3
    model.set_pattern([function("a"), None, function("b")])(ids)
    assert calls[3:] == ["a", "b"]
    keys = set(model.state_dict())
    assert set(model.set_pattern(nn.Identity()).state_dict()) == keys
    with pytest.raises(ValueError, match="for 2 layers|for 3 layers"): model.set_pattern([None, None])


def test_dropout():
    "Dropout works in training only, on attention and on the residual branches, and keeps the mean."
    torch.manual_seed(0)
    ids = torch.randint(0, 50, (2, 9))
    for field in ("hidden_dropout", "attention_dropout"):
        config = PythiaConfig.from_dict(dict(vocab_size=50, hidden_size=32, num_layers=2, num_heads=2) | {field: 0.5})
        model = Pythia(config)
        assert not torch.equal(model.train()(ids), model(ids))
        assert torch.equal(model.eval()(ids), model(ids))
    o = dense_attention(*torch.ones(3, 300, 1, 8, 16), dropout=0.5)
    assert o.mean().item() == pytest.approx(1.0, abs=0.05) and o.std() > 0.1


@pytest.mark.parametrize("init", ["small", "normal"])
def test_init_distribution(init):
    "Standard deviations, zeros and ones are where they belong; a seed fixes every number."
    config = PythiaConfig(vocab_size=1000, hidden_size=256, num_layers=3, num_heads=4, init=init)
    model = Pythia(config).init_weights(seed=3)
    std, output_std = (math.sqrt(2 / (5 * 256)), 2 / 3 / 16) if init == "small" else (0.02, 0.02 / math.sqrt(6))
    for name, p in model.named_parameters():
        if p.ndim == 1: assert (p == (1.0 if name.endswith("norm.weight") else 0.0)).all()
        else:
            wanted = output_std if "attention.dense" in name or "4h_to_h" in name else std
            assert p.std().item() == pytest.approx(wanted, rel=0.02) and abs(p.mean().item()) < 0.01 * wanted * 5
    again = Pythia(config, device="meta").to_empty(device="cpu").init_weights(seed=3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    assert not torch.equal(again.init_weights(seed=4).embed_in.weight, model.embed_in.weight)


@pytest.mark.parametrize("name", ["14m", "31m", "70m", "160m", "410m", "1b", "1.4b", "2.8b", "6.9b", "12b"])
def test_counts_on_meta(name):
    "A model on the meta device has the parameters that the formula says, and allocates none."
    for tied in (False, True):
        config = PythiaConfig.preset(name, tie_embeddings=tied)
        model = Pythia(config, device="meta")
        assert model.num_parameters() == config.num_parameters()
        assert model.num_parameters(embeddings=False) == config.num_parameters(embeddings=False)
        assert all(p.is_meta for p in model.parameters()) and not list(model.buffers())


def reference_config(config):
    "The same shape as a transformers configuration."
    rope = {"rope_type": "default", "rope_theta": config.rotary_base, "partial_rotary_factor": config.rotary_pct}
    if config.rope_scaling: rope |= {"rope_type" if k == "type" else k: v for k, v in config.rope_scaling.items()}
    return GPTNeoXConfig(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads, intermediate_size=config.intermediate, rope_parameters=rope,
        max_position_embeddings=config.max_position_embeddings, use_parallel_residual=config.parallel_residual,
        tie_word_embeddings=config.tie_embeddings, attention_bias=config.attention_bias, hidden_act=config.hidden_act,
        layer_norm_eps=config.layer_norm_eps)

def twins(config, seed=0):
    "A transformers model with random parameters, and a Pythia with the same."
    theirs = GPTNeoXForCausalLM(reference_config(config)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            std = 0.3 if p.ndim == 1 else 0.7 / p.shape[1]**0.5
            p.normal_(1.0 if name.endswith("norm.weight") else 0.0, std, generator=generator)
    ours = Pythia(config).eval()
    names = {"lm_head.weight": "embed_out.weight"}
    state = {names.get(k, k.removeprefix("gpt_neox.")): v for k, v in theirs.state_dict().items()}
    if config.tie_embeddings: del state["embed_out.weight"]
    ours.load_state_dict(state)
    return ours, theirs


@torch.no_grad()
def logits_of_both(ours, theirs, dtype=torch.float32, lengths=(37, 19)):
    "Logits of real tokens in a batch padded on the left, from both models, in fp32."
    # transformers keeps theta in a buffer, which must not be rounded to bf16 with the weights
    theta = theirs.gpt_neox.rotary_emb.inv_freq.clone()
    ours, theirs = copy.deepcopy(ours).to(dtype), copy.deepcopy(theirs).to(dtype)
    theirs.gpt_neox.rotary_emb.inv_freq = theta
    L = max(lengths)
    ids = torch.randint(0, ours.config.vocab_size, (len(lengths), L), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(L) >= L - torch.tensor(lengths)[:, None]).long()
    return ours(ids, mask)[mask.bool()].float(), theirs(ids, attention_mask=mask).logits[mask.bool()].float()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("head_dim", [32, 64, 80, 128, 256])
@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("rotary_pct", [0.25, 1.0])
def test_logits_equal_transformers(rotary_pct, parallel, head_dim, tied):
    "The same logits within 1e-5 (fp32) and 2e-2 (bf16), at odd lengths, with padding on the left."
    config = PythiaConfig(vocab_size=97, hidden_size=2 * head_dim, num_layers=2, num_heads=2,
                          intermediate_size=head_dim, rotary_pct=rotary_pct,
                          parallel_residual=parallel, tie_embeddings=tied)
    models = twins(config)
    for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        ours, theirs = logits_of_both(*models, dtype)
        assert theirs.std() > 0.2 and (ours - theirs).abs().max() <= limit


@pytest.mark.parametrize("lengths", [(1,), (2, 1), (63, 64, 1), (129,)])
def test_logits_at_other_lengths(lengths):
    "One token, one token behind much padding, no padding at all."
    models = twins(PythiaConfig(vocab_size=97, hidden_size=64, num_layers=2, num_heads=2))
    ours, theirs = logits_of_both(*models, lengths=lengths)
    assert (ours - theirs).abs().max() <= 1e-5


@pytest.mark.parametrize("changes", [dict(attention_bias=False), dict(hidden_act="gelu_new"), dict(hidden_act="relu"),
                                     dict(layer_norm_eps=1e-2), dict(rotary_base=500.0), dict(intermediate_size=77)])
def test_other_fields(changes):
    "The fields that Pythia leaves at their defaults."
    config = PythiaConfig.from_dict(dict(vocab_size=97, hidden_size=64, num_layers=2, num_heads=2) | changes)
    ours, theirs = logits_of_both(*twins(config))
    assert (ours - theirs).abs().max() <= 1e-5


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("rotary_pct", [0.25, 1.0])
def test_scaled_rotary_equals_transformers(scaling, rotary_pct):
    "linear and yarn have transformers' logits."
    config = PythiaConfig(vocab_size=97, hidden_size=128, num_layers=2, num_heads=2, rotary_pct=rotary_pct,
                          max_position_embeddings=256, rope_scaling=scaling)
    ours, theirs = logits_of_both(*twins(config), lengths=(151, 90))
    assert (ours - theirs).abs().max() <= 1e-5


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_loss_equals_cross_entropy(chunk, tied):
    "Value and gradients of every parameter, with ignored targets."
    torch.manual_seed(0)
    model = Pythia(PythiaConfig(vocab_size=211, hidden_size=32, num_layers=2, num_heads=2, tie_embeddings=tied))
    ids = torch.randint(0, 211, (3, 22))
    targets = ids[:, 1:].clone()
    targets[0, :9], targets[2, 20] = -100, -100
    expected = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), targets.flatten())
    got = model.loss(ids[:, :-1], targets, chunk=chunk)
    assert torch.allclose(got, expected, atol=1e-6)
    parameters = list(model.parameters())
    for a, b in zip(torch.autograd.grad(got * 3, parameters), torch.autograd.grad(expected * 3, parameters)):
        assert torch.allclose(a, b, atol=1e-6, rtol=1e-4)
    with torch.no_grad(): assert torch.allclose(model.loss(ids[:, :-1], targets, chunk=chunk), expected, atol=1e-6)


class TensorSizes(TorchDispatchMode):
    "Remembers the number of elements of the largest tensor that any operation made."
    largest = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor): self.largest = max(self.largest, x.numel())
        return out

@pytest.mark.parametrize("tied", [False, True])
def test_loss_never_holds_all_logits(tied):
    "Neither pass makes a tensor larger than one chunk of logits; a plain loss does."
    model = Pythia(PythiaConfig(vocab_size=2000, hidden_size=16, num_layers=1, num_heads=2, tie_embeddings=tied))
    ids = torch.randint(0, 2000, (2, 257))
    with TensorSizes() as sizes: model.loss(ids[:, :-1], ids[:, 1:], chunk=32).backward()
    assert sizes.largest == 32 * 2000
    with TensorSizes() as sizes: F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
    assert sizes.largest == 512 * 2000


def test_padding_does_not_count():
    "A sequence padded on the left has the loss of the sequence itself."
    model = Pythia(PythiaConfig(vocab_size=50, hidden_size=32, num_layers=1, num_heads=2))
    ids = torch.randint(0, 50, (1, 9))
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
    mask = torch.tensor([[0] * 3 + [1] * 9])[:, :-1]
    got = model.loss(padded[:, :-1], padded[:, 1:], attention_mask=mask)
    assert torch.allclose(got, model.loss(ids[:, :-1], ids[:, 1:]), atol=1e-5)


def test_copies_and_types():
    "deepcopy, torch.save, bf16, the meta device and a default device."
    config = PythiaConfig(vocab_size=50, hidden_size=32, num_layers=2, num_heads=2, tie_embeddings=True)
    model, ids = Pythia(config), torch.randint(0, 50, (2, 9))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(ids), model(ids))
        assert other.unembedding is other.embed_in.weight and other.embed_in.weight is not model.embed_in.weight
    low = Pythia(config, dtype=torch.bfloat16)
    assert low(ids).dtype == low.dtype == torch.bfloat16
    low.loss(ids, ids).backward()
    assert Pythia(config, device="meta")(ids.to("meta")).shape == (2, 9, 50)
    with torch.device("meta"): assert Pythia(config).device.type == "meta"


@pytest.mark.parametrize("tied", [False, True])
def test_graph_is_whole(tied):
    "torch.compile captures logits, loss and backward in one graph each, with the same numbers."
    torch.manual_seed(0)
    model = Pythia(PythiaConfig(vocab_size=50, hidden_size=32, num_layers=2, num_heads=2, tie_embeddings=tied))
    ids = torch.randint(0, 50, (2, 17))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(ids), model(ids), atol=1e-6)
    if tied:
        mask = torch.tensor([[1] * 17, [0] * 4 + [1] * 13])
        assert torch.allclose(compiled(ids, mask), model(ids, mask), atol=1e-6)
    got = torch.compile(model.loss, fullgraph=True, backend="aot_eager")(ids, ids, chunk=8)
    expected = model.loss(ids, ids, chunk=8)
    parameters = list(model.parameters())
    for a, b in zip(torch.autograd.grad(got, parameters), torch.autograd.grad(expected, parameters)):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.slow
def test_compiled():
    "The same with the real compiler, which takes its time."
    torch.manual_seed(0)
    model = Pythia(PythiaConfig(vocab_size=50, hidden_size=32, num_layers=2, num_heads=2))
    ids = torch.randint(0, 50, (2, 17))
    assert torch.allclose(torch.compile(model, fullgraph=True)(ids), model(ids), atol=1e-5)
    torch.compile(model.loss, fullgraph=True)(ids, ids, chunk=8).backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.loss(ids, ids, chunk=8).backward()
    assert all(torch.allclose(a, p.grad, atol=1e-5) for a, p in zip(grads, model.parameters()))
