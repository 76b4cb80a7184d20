"Tests of 14c_recipe. Generated from nbs/14c_recipe.ipynb: edit that, then run pythia_book build."
import copy
import math
import numpy as np
import pytest
import torch
from pythia_nb.config import PythiaConfig
from pythia_nb.data import Batches
from pythia_nb.model import Pythia
from pythia_nb.recipe import (
    CHOICES, TrainConfig, batch_loss, evaluate, lr_at, make_optimizer, make_scaler, prepare_model, toy_data, toy_model,
    train_step, usual_dtype,
)
from torch import nn


def test_lr_schedule():
    c = TrainConfig(steps=100, lr=2.0, warmup=0.1, min_lr_ratio=0.25)
    rates = [lr_at(s, c) for s in range(100)]
    assert rates[:10] == pytest.approx([0.2 * k for k in range(1, 11)]) and rates[10] == pytest.approx(2.0)
    assert rates[-1] == pytest.approx(0.5) == lr_at(500, c) and all(a >= b for a, b in zip(rates[10:], rates[11:]))
    assert rates[10 + 45] == pytest.approx(0.5 + 0.75 * (1 + math.cos(math.pi * 45 / 89)))
    assert lr_at(0, TrainConfig(steps=1)) == 1e-3 and lr_at(0, TrainConfig(steps=10, warmup=0)) == 1e-3
    assert all(lr_at(s, TrainConfig(steps=4, warmup=1.0)) > 0 for s in range(4))

def test_the_other_schedules():
    rates = {s: [lr_at(i, TrainConfig(steps=101, lr=1.0, warmup=0, min_lr_ratio=0, decay=0.25, schedule=s))
                 for i in range(101)] for s in CHOICES["schedule"]}
    assert rates["linear"] == pytest.approx([1 - i / 100 for i in range(101)]) and set(rates["constant"]) == {1.0}
    assert set(rates["wsd"][:76]) == {1.0} and rates["wsd"][88] == pytest.approx(0.48) and rates["wsd"][-1] == 0
    assert lr_at(9, TrainConfig(steps=10, schedule="wsd", decay=0)) == 1e-3
    for schedule in CHOICES["schedule"]:
        c = TrainConfig(steps=50, schedule=schedule, warmup=0.5, decay=0.5)
        assert [lr_at(s, c) for s in range(25)] == pytest.approx([1e-3 * (s + 1) / 25 for s in range(25)])

@pytest.mark.parametrize("options", [dict(steps=0), dict(steps=1.5), dict(batch_size=-1), dict(micro_batch=0),
                                     dict(lr=0), dict(lr=math.nan), dict(clip=0), dict(warmup=2), dict(decay=-0.1),
                                     dict(betas=(0.9, 1.0)), dict(dtype="half"), dict(weight_decay=-1), dict(keep=0),
                                     dict(schedule="step"), dict(on_nonfinite="ignore"), dict(keep_every=0),
                                     dict(patterns=((-1, "local"),)), dict(seed=-1)])
def test_settings_that_make_no_sense(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} is .*; give") as e: TrainConfig(**options)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("tied", [False, True])
def test_weight_decay_groups_are_neox(tied):
    model = Pythia(PythiaConfig(vocab_size=64, hidden_size=32, num_layers=2, num_heads=2, tie_embeddings=tied))
    spare = {id(p) for m in model.modules() for n, p in m._parameters.items() if p is not None
             and (isinstance(m, nn.LayerNorm) or n == "bias")}
    decay, rest = make_optimizer(model, TrainConfig()).param_groups
    assert {id(p) for p in rest["params"]} == spare and rest["weight_decay"] == 0 and decay["weight_decay"] == 0.1
    assert {id(p) for p in decay["params"]} == {id(p) for p in model.parameters()} - spare
    assert any(p is model.embed_in.weight for p in decay["params"])

def test_decay_shrinks_matrices_only():
    model = Pythia(PythiaConfig(vocab_size=64, hidden_size=32, num_layers=1, num_heads=2)).init_weights(0)
    before = {n: p.clone() for n, p in model.named_parameters()}
    for p in model.parameters(): p.grad = torch.zeros_like(p)
    make_optimizer(model, TrainConfig(lr=0.5, weight_decay=0.1)).step()
    for n, p in model.named_parameters(): torch.testing.assert_close(p, before[n] * (0.95 if p.ndim == 2 else 1.0))


@pytest.mark.parametrize("micro_batch", [1, 3, 8])
def test_micro_batches_add_up(micro_batch, tmp_path):
    batch, c = Batches(toy_data(tmp_path), 16, 8, documents=True)[0], TrainConfig()
    a, b = toy_model(), toy_model()
    whole = train_step(a, make_optimizer(a, c), batch, 1e-3, c)
    parts = train_step(b, make_optimizer(b, c), batch, 1e-3, TrainConfig(micro_batch=micro_batch))
    assert whole == pytest.approx(parts, rel=1e-4)
    for p, q in zip(a.parameters(), b.parameters()): torch.testing.assert_close(p, q, atol=2e-5, rtol=1e-3)

def test_gradient_is_clipped(tmp_path):
    batch, model, c = Batches(toy_data(tmp_path), 16, 8)[0], toy_model(), TrainConfig(clip=0.01)
    optimizer, seen = make_optimizer(model, c), []
    length = lambda: math.sqrt(sum((p.grad ** 2).sum() for p in model.parameters()))
    optimizer.register_step_pre_hook(lambda *_: seen.append(length()))
    norm = train_step(model, optimizer, batch, 1e-3, c)["grad_norm"]
    assert norm > 0.1 and seen == pytest.approx([0.01], rel=1e-3)

@pytest.mark.parametrize("dtype, close", [("bfloat16", 2e-2), ("float16", 2e-3)])
def test_half_precision_keeps_fp32_weights(dtype, close, tmp_path):
    batch, c = Batches(toy_data(tmp_path), 16, 8)[0], TrainConfig(dtype=dtype)
    a, b = toy_model(), toy_model()
    low = train_step(a, make_optimizer(a, c), batch, 1e-3, c)
    full = train_step(b, make_optimizer(b, c), batch, 1e-3, TrainConfig())
    assert low == pytest.approx(full, rel=close) and low != full
    assert all(p.dtype == torch.float32 for p in a.parameters())

def test_fp16_halves_the_factor_where_a_gradient_overflows(tmp_path):
    batch, c, model = Batches(toy_data(tmp_path), 16, 8)[0], TrainConfig(dtype="float16"), toy_model()
    scaler, optimizer, before = make_scaler(c, model.device), make_optimizer(model, c), toy_model()
    scaler.load_state_dict(scaler.state_dict() | {"scale": 2.0**40})
    result = train_step(model, optimizer, batch, 1e-3, c, scaler)
    assert result["skipped"] == 1 and math.isfinite(result["loss"]) and scaler.get_scale() == 2.0**39
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters()))
    scaler.load_state_dict(scaler.state_dict() | {"scale": 2.0**10})
    assert "skipped" not in train_step(model, optimizer, batch, 1e-3, c, scaler)
    assert not torch.equal(model.embed_in.weight, before.embed_in.weight)

@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_loss_that_is_no_number(dtype, tmp_path):
    batch, model = Batches(toy_data(tmp_path), 16, 8)[0], toy_model()
    with torch.no_grad(): model.embed_in.weight[:] = math.nan
    before = copy.deepcopy(model)
    with pytest.raises(FloatingPointError, match="the loss is nan"):
        train_step(model, make_optimizer(model, TrainConfig()), batch, 1e-3, TrainConfig(dtype=dtype))
    skip = TrainConfig(on_nonfinite="skip", dtype=dtype)
    assert train_step(model, make_optimizer(model, skip), batch, 1e-3, skip)["skipped"] == 1
    for p, q in zip(model.parameters(), before.parameters()):
        assert torch.equal(p.nan_to_num(), q.nan_to_num()) and p.grad is None


@pytest.mark.parametrize("pattern", [None, "local(1)"])
def test_recomputing_gives_the_same_bits(pattern, tmp_path):
    batch, results = Batches(toy_data(tmp_path), 16, 8, documents=True)[0], []
    for recompute in (False, True, False):
        c, model = TrainConfig(recompute=recompute), toy_model(hidden_dropout=0.2).train()
        prepare_model(model.set_pattern(pattern, 16), c)
        torch.manual_seed(3)
        results.append([train_step(model, make_optimizer(model, c), batch, 1e-3, c)["loss"]] +
                       [p.clone() for p in model.parameters()])
    for other in results[1:]: assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(results[0], other))

def test_recomputing_keeps_less(tmp_path):
    batch, kept = Batches(toy_data(tmp_path), 64, 8)[0], {}
    for recompute in (False, True):
        model = prepare_model(toy_model(num_layers=6), TrainConfig(recompute=recompute))
        sizes = {}
        def pack(t): sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes(); return t
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t): batch_loss(model, batch)
        kept[recompute] = sum(sizes.values())
    assert kept[True] < 0.5 * kept[False]


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("pattern", [None, "local(1)"])
def test_compiled_steps_agree(pattern, recompute, tmp_path):
    batches, losses = Batches(toy_data(tmp_path), 16, 8), {}
    for compiled in (False, True):
        c, model = TrainConfig(compile=compiled, recompute=recompute), toy_model().set_pattern(pattern, 16)
        optimizer = make_optimizer(prepare_model(model, c), c)
        losses[compiled] = [train_step(model, optimizer, batches[s], 1e-3, c)["loss"] for s in range(3)]
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)


def test_evaluate(tmp_path):
    model, batches = toy_model(hidden_dropout=0.5).train(), Batches(toy_data(tmp_path), 16, 4)
    result = evaluate(model, batches)
    losses = [nn.functional.cross_entropy(model.eval()(i).flatten(0, 1), t.flatten()).item()
              for i, t in (batches[s] for s in range(batches.steps_per_epoch))]
    assert result["val_loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert result["val_perplexity"] == pytest.approx(math.exp(result["val_loss"]))
    assert result["val_bits_per_token"] == pytest.approx(result["val_loss"] / math.log(2))
    model.train()
    assert evaluate(model, batches, 2) == evaluate(model, batches, 2) and model.training
    assert evaluate(model, batches, 10**6) == result


@pytest.mark.parametrize("capability, dtype", [((7, 5), "float16"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16")])
def test_the_usual_dtype_is_one_that_the_device_has(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert usual_dtype(torch.device("cuda")) == dtype and usual_dtype(torch.device("cpu")) == "float32"
