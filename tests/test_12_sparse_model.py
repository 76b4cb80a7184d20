"Tests of 12_sparse_model. Generated from nbs/12_sparse_model.ipynb: edit that, then run pythia_book build."
import pytest
import pythia_nb.sparse_model
import torch
from pythia_nb import patterns as P
from pythia_nb.config import PythiaConfig
from pythia_nb.model import Pythia
from transformers import GPTNeoXForCausalLM


TINY = PythiaConfig(vocab_size=97, hidden_size=48, num_layers=4, num_heads=3, max_position_embeddings=512)
SPECS = {"pattern": P.bigbird(1, 1, 1), "text": "mixed(window=1, stride=3)", "alternating": [[["local(2)", "dense"], 2]],
         "per head": P.per_head([P.local(1), P.strided(2), P.dense()]), "flat": [P.local(1), None, "strided(3)", "dense"]}

@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_logits_do_not_depend_on_how_the_sequence_is_cut(spec):
    "A prefix gives the same logits, and so does a batch with padding on the left of a dense model"
    model = Pythia(TINY, pattern=spec, block=16).eval()
    ids = torch.randint(97, (2, 75))
    with torch.no_grad():
        whole = model(ids)
        for n in (1, 16, 33, 74): torch.testing.assert_close(model(ids[:, :n]), whole[:, :n], atol=1e-5, rtol=1e-4)

def test_the_dense_pattern_equals_dense_attention():
    torch.manual_seed(0)
    model = Pythia(TINY)
    ids, targets = torch.randint(97, (2, 3, 77))
    loss = model.loss(ids, targets)
    gradients = torch.autograd.grad(loss, model.parameters())
    again = model.set_pattern(P.dense(), block=16).loss(ids, targets)
    torch.testing.assert_close(again, loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(again, model.parameters()), gradients, atol=1e-5, rtol=1e-3)

def test_masks_reach_every_layer():
    model = Pythia(TINY, pattern=P.local(2) | P.sinks(1), block=16)
    ids, documents = torch.randint(97, (1, 64)), torch.repeat_interleave(torch.tensor([0, 1]), torch.tensor([20, 44]))[None]
    changed = ids.clone(); changed[:, :20] = 0
    with torch.no_grad():
        a, b = (model(x, segment_ids=documents) for x in (ids, changed))
        assert torch.equal(a[:, 20:], b[:, 20:]) and not torch.equal(a[:, :20], b[:, :20])


def test_the_last_token_alone_sees_what_it_saw_in_the_whole():
    class Cache:
        "The smallest cache: lists of keys and values that grow"
        def __init__(self): self.length, self.held = 0, {}
        def update(self, layer, k, v):
            if layer in self.held: k, v = (torch.cat(pair, 2) for pair in zip(self.held[layer], (k, v)))
            self.held[layer] = k, v
            return k, v
        def advance(self, n): self.length += n
    for spec in SPECS.values():
        model, ids, cache = Pythia(TINY, pattern=spec, block=16), torch.randint(97, (2, 60)), Cache()
        with torch.no_grad():
            whole = model(ids)
            parts = [model(part, cache=cache) for part in ids.split([37, 1, 1, 10, 1, 10], 1)]
        torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-4)


def test_pattern_survives_saving(tmp_path):
    for i, spec in enumerate(SPECS.values()):
        model = Pythia(TINY, pattern=spec, block=32)
        model.save_pretrained(tmp_path / str(i))
        again = Pythia.from_pretrained(tmp_path / str(i))
        ids = torch.randint(97, (1, 70))
        with torch.no_grad(): assert torch.equal(again(ids), model(ids))
        assert again.block == 32

def test_a_pattern_with_data_is_left_out_with_a_warning(tmp_path):
    model = Pythia(TINY, pattern=P.from_mask(torch.ones(8, 8, dtype=torch.bool)), block=16)
    with pytest.warns(UserWarning, match="give pattern= when you load it"): model.save_pretrained(tmp_path / "model")
    assert Pythia.from_pretrained(tmp_path / "model").pattern is None

@pytest.mark.parametrize("method", ["linear", "yarn"])
def test_extended_context_equals_transformers(method, tmp_path):
    torch.manual_seed(0)
    model = Pythia(TINY).extend_context(2048, method)
    model.save_pretrained(tmp_path / "model")
    other = GPTNeoXForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert other.config.rope_parameters["rope_type"] == method
    ids = torch.randint(97, (1, 1500))
    with torch.no_grad(): torch.testing.assert_close(model(ids), other(ids).logits, atol=1e-4, rtol=1e-4)


def test_layers_share_layouts_and_old_ones_are_forgotten():
    model = Pythia(TINY, pattern=P.local(2), block=16)
    functions = {id(layer.attention.attend) for layer in model.layers}
    assert len(functions) == 1
    with torch.no_grad():
        for n in range(20, 40): model(torch.randint(97, (1, n)))
    assert len(model.layers[0].attention.attend.layouts) == 8

@pytest.mark.parametrize("make, message", [
    (lambda: Pythia(TINY, pattern=P.per_head([P.local(1)] * 2)), "lists for 2 heads, and the model has 3"),
    (lambda: Pythia(TINY, pattern=["local"] * 3), "patterns for 3 layers, and the model has 4"),
    (lambda: Pythia(TINY, pattern=P.local(1), block=48), "choose 32 or 64"),
    (lambda: Pythia(TINY, pattern=1.5), "is no pattern"),
    (lambda: Pythia(TINY, pattern="[['local'"), "can't be read"),
    (lambda: Pythia(TINY, pattern=[[[], "all"]]), "no pair of patterns"),
    (lambda: Pythia(PythiaConfig(hidden_size=64, num_heads=2, attention_dropout=0.1), P.local(1), device="meta"), "set attention_dropout=0"),
    (lambda: Pythia(TINY).extend_context(100), "is not longer"),
    (lambda: Pythia(TINY).extend_context(1024).extend_context(2048), "already stretched"),
])
def test_mistakes_get_one_sentence(make, message):
    with pytest.raises(ValueError, match=message) as error: make()
    assert "\n" not in str(error.value)


def test_compiles_without_graph_breaks():
    torch._dynamo.reset()
    model = Pythia(TINY, pattern=[[["bigbird(1, 1, 1)", "dense"], 2]], block=16)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for n in (40, 64):
        ids = torch.randint(97, (1, n))
        torch.testing.assert_close(compiled(ids), model(ids), atol=1e-5, rtol=1e-4)
