"Tests of 15_train. Generated from nbs/15_train.ipynb: edit that, then run pythia_book build."
import math
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from pythia_nb.config import PythiaConfig
from pythia_nb.data import Batches, split, write_tokens
from pythia_nb.model import Pythia
from pythia_nb.train import (
    TrainConfig, checkpoints, evaluate, load_checkpoint, lr_at, make_optimizer, newest_checkpoint, plot_history,
    read_log, restore, running_mean, save_checkpoint, train, train_step,
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

@pytest.mark.parametrize("options", [dict(steps=0), dict(steps=1.5), dict(batch_size=-1), dict(micro_batch=0),
                                     dict(lr=0), dict(lr=math.nan), dict(clip=0), dict(warmup=2),
                                     dict(betas=(0.9, 1.0)), dict(dtype="float16"), dict(weight_decay=-1), dict(keep=0),
                                     dict(seed=-1)])
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


def toy_model(seed=0, **overrides):
    "A model that trains in milliseconds"
    return Pythia(PythiaConfig(**{**dict(vocab_size=100, hidden_size=32, num_layers=2, num_heads=2,
                                         max_position_embeddings=64), **overrides})).init_weights(seed)

def toy_data(folder, n=4000, vocab_size=100, name="toy"):
    "A token file with a pattern to learn: counting, with a random beginning for each of its documents"
    rng = np.random.default_rng(0)
    return write_tokens(folder/name, [(rng.integers(1, vocab_size) + np.arange(40)) % (vocab_size - 1) + 1
                                      for _ in range(n // 40)], vocab_size)

def toy_config(**options):
    return TrainConfig(**{**dict(steps=12, batch_size=4, seq_len=16, lr=3e-3, warmup=0.2, eval_every=4, eval_batches=2),
                          **options})

@pytest.mark.parametrize("micro_batch", [1, 3, 8])
def test_micro_batches_add_up(micro_batch, tmp_path):
    batch, c = Batches(toy_data(tmp_path), 16, 8, documents=True)[0], toy_config()
    a, b = toy_model(), toy_model()
    whole = train_step(a, make_optimizer(a, c), batch, 1e-3, c)
    parts = train_step(b, make_optimizer(b, c), batch, 1e-3, toy_config(micro_batch=micro_batch))
    assert whole == pytest.approx(parts, rel=1e-4)
    for p, q in zip(a.parameters(), b.parameters()): torch.testing.assert_close(p, q, atol=2e-5, rtol=1e-3)

def test_gradient_is_clipped(tmp_path):
    batch, model = Batches(toy_data(tmp_path), 16, 8)[0], toy_model()
    optimizer, seen = make_optimizer(model, toy_config()), []
    length = lambda: math.sqrt(sum((p.grad ** 2).sum() for p in model.parameters()))
    optimizer.register_step_pre_hook(lambda *_: seen.append(length()))
    norm = train_step(model, optimizer, batch, 1e-3, toy_config(clip=0.01))["grad_norm"]
    assert norm > 0.1 and seen == pytest.approx([0.01], rel=1e-3)

def test_bfloat16_keeps_fp32_weights(tmp_path):
    batch, c = Batches(toy_data(tmp_path), 16, 8)[0], toy_config(dtype="bfloat16")
    a, b = toy_model(), toy_model()
    low = train_step(a, make_optimizer(a, c), batch, 1e-3, c)
    full = train_step(b, make_optimizer(b, c), batch, 1e-3, toy_config())
    assert low["loss"] == pytest.approx(full["loss"], rel=0.02) and low["loss"] != full["loss"]
    assert all(p.dtype == torch.float32 for p in a.parameters())


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


def test_checkpoint_round_trip_and_damage(tmp_path):
    model, c = toy_model(), toy_config()
    optimizer = make_optimizer(model, c)
    train_step(model, optimizer, Batches(toy_data(tmp_path), 16, 4)[0], 1e-3, c)
    paths = [tmp_path/f"checkpoints/step-{s:08}.pt" for s in (1, 2)]
    for s, path in enumerate(paths, 1): save_checkpoint(path, model, optimizer, s, c)
    other = toy_model(1)
    other_optimizer = make_optimizer(other, c)
    assert restore(load_checkpoint(paths[0]), other, other_optimizer, c) == 1
    for p, q in zip(model.parameters(), other.parameters()):
        assert torch.equal(p, q)
        assert all(torch.equal(optimizer.state[p][k], other_optimizer.state[q][k])
                   for k in ("step", "exp_avg", "exp_avg_sq"))
    whole, weights = paths[1].read_bytes(), model.embed_in.weight.detach().numpy().tobytes()
    flipped = bytearray(whole); flipped[whole.index(weights[:64]) + 5] ^= 4
    for damaged in (whole[:-100], whole[:1000], b"", bytes(flipped)):
        paths[1].write_bytes(damaged)
        with pytest.warns(UserWarning, match="step-00000002.pt is damaged .*; trying the one before it"):
            assert newest_checkpoint(tmp_path)["step"] == 1
    paths[0].write_bytes(b"x")
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="all 2 checkpoints in .* are damaged"):
        newest_checkpoint(tmp_path)
    assert newest_checkpoint(tmp_path/"empty") is None
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"): load_checkpoint(tmp_path/"none.pt")

def test_a_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    model, c = toy_model(), toy_config()
    save_checkpoint(tmp_path/"a.pt", model, make_optimizer(model, c), 1, c)
    def full_disk(state, path):
        path.write_bytes(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file: No space left on device")
    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="cannot write the checkpoint .*No space left.*earlier checkpoints are intact"):
        save_checkpoint(tmp_path/"a.pt", model, make_optimizer(model, c), 2, c)
    assert load_checkpoint(tmp_path/"a.pt")["step"] == 1 and [p.name for p in tmp_path.iterdir()] == ["a.pt"]

def test_changed_settings_are_named(tmp_path):
    model, c = toy_model(), toy_config()
    save_checkpoint(tmp_path/"a.pt", model, make_optimizer(model, c), 1, c)
    state = load_checkpoint(tmp_path/"a.pt")
    with pytest.raises(ValueError, match="lr was 0.003 and is 0.1, seed was 0 and is 1; use the old ones"):
        restore(state, model, make_optimizer(model, c), toy_config(lr=0.1, seed=1))
    with pytest.raises(ValueError, match="num_layers was 2 and is 1"):
        restore(state, toy_model(num_layers=1), make_optimizer(model, c), c)
    assert restore(state, model, make_optimizer(model, c), toy_config(eval_every=1, keep=5, out="elsewhere")) == 1

def test_log_survives_a_torn_line(tmp_path):
    (tmp_path/"log.jsonl").write_text('{"step": 0, "val_loss": 4.6}\n{"step": 1, "loss": 4.5}\n{"step": 2, "lo')
    assert [r["step"] for r in read_log(tmp_path)] == [0, 1]
    assert len(read_log(tmp_path, 0)) == 1 and read_log(tmp_path/"none") == []


def without_times(history):
    return [{k: v for k, v in r.items() if k not in ("seconds", "tokens_per_s")} for r in history]

def interrupt_at(step):
    def callback(row):
        if row["step"] == step: raise KeyboardInterrupt
    return callback

@pytest.mark.parametrize("options, shape", [({}, {}),
                                            (dict(micro_batch=3, documents=True),
                                             dict(hidden_dropout=0.2, attention_dropout=0.1)),
                                            (dict(dtype="bfloat16", save_every=3), dict(tie_embeddings=True))])
def test_resume_is_bit_identical(tmp_path, options, shape):
    tokens = toy_data(tmp_path)
    whole = toy_model(**shape)
    history = train(whole, tokens, toy_config(**options), progress=False)
    for n, stop in enumerate((5, 8)):
        out = str(tmp_path/f"run{n}")
        with pytest.raises(KeyboardInterrupt):
            train(toy_model(**shape), tokens, toy_config(**options, out=out), progress=False,
                  callback=interrupt_at(stop))
        torch.manual_seed(99)
        resumed = toy_model(seed=5, **shape)
        again = train(resumed, tokens, toy_config(**options, out=out), resume=True, progress=False)
        assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters()))
        assert without_times(again) == without_times(history) == without_times(read_log(out))
        assert sorted(again[-1]["seconds"] >= r.get("seconds", 0) for r in again)[0]

def test_resume_passes_over_a_damaged_checkpoint(tmp_path):
    tokens, out, whole = toy_data(tmp_path), str(tmp_path/"run"), toy_model()
    train(whole, tokens, toy_config(), progress=False)
    train(toy_model(), tokens, toy_config(out=out), progress=False)
    assert [p.name for p in checkpoints(out)] == ["step-00000008.pt", "step-00000012.pt"]  # keep=2
    checkpoints(out)[-1].write_bytes(checkpoints(out)[-1].read_bytes()[:-1000])
    resumed = toy_model(3)
    with pytest.warns(UserWarning, match="step-00000012.pt is damaged"):
        train(resumed, tokens, toy_config(out=out), resume=True, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters()))
    finished = train(resumed, tokens, toy_config(out=out), resume=True, progress=False)  # nothing left to do
    assert finished[-1]["step"] == 12 and len(finished) == 13

def test_seed_sets_everything(tmp_path):
    tokens, shape, losses = toy_data(tmp_path), dict(hidden_dropout=0.1), []
    for seed in (0, 0, 1):
        torch.rand(seed + 3)
        losses.append(without_times(train(toy_model(seed, **shape), tokens, toy_config(seed=seed), progress=False)))
    assert losses[0] == losses[1] != losses[2]

def test_it_learns(tmp_path):
    history = train(toy_model(), toy_data(tmp_path), toy_config(steps=80, batch_size=16, lr=1e-2), progress=False)
    assert history[0]["val_loss"] == pytest.approx(math.log(100), abs=0.2) and history[-1]["val_loss"] < 1.5
    assert [r["step"] for r in history if "val_loss" in r] == list(range(0, 81, 4))
    assert history[-1]["tokens"] == 80 * 256
    assert all(set(r) >= {"loss", "lr", "grad_norm", "tokens", "seconds", "tokens_per_s"} for r in history[1:])

def test_training_without_validation_and_with_a_pair(tmp_path):
    tokens = toy_data(tmp_path)
    history = train(toy_model(), (tokens, None), toy_config(steps=3), progress=False)
    assert len(history) == 3 and "val_loss" not in history[-1]
    assert len(train(toy_model(), split(tokens, 0.2), toy_config(steps=3), progress=False)) == 4

def test_reports(tmp_path, capsys):
    tokens = toy_data(tmp_path)
    train(toy_model(), tokens, toy_config()); out = capsys.readouterr()
    assert out.out.count("step ") == 3 and "val" in out.out and "tok/s" in out.out and not out.err
    train(toy_model(), tokens, toy_config(), progress=True, name="dense"); out = capsys.readouterr()
    assert not out.out and "dense: 100%" in out.err and "loss=" in out.err
    train(toy_model(), tokens, toy_config(), progress=False); out = capsys.readouterr()
    assert not out.out and not out.err

def test_a_loss_that_is_no_number_stops_before_the_update(tmp_path):
    tokens, model, out = toy_data(tmp_path), toy_model(), str(tmp_path/"run")
    def poison(row):
        if row["step"] == 6: model.embed_in.weight.data[:] = math.nan
    with pytest.raises(FloatingPointError, match=r"the loss is nan .* at step 7 of 12 \(batches\[6\], .*the last "
                                                 r"checkpoint is .*step-00000004.pt"):
        train(model, tokens, toy_config(out=out), progress=False, callback=poison)
    assert load_checkpoint(checkpoints(out)[-1])["step"] == 4 and not model.embed_out.weight.isnan().any()

def test_plot_history(tmp_path):
    history = train(toy_model(), toy_data(tmp_path), toy_config(), progress=False)
    ax = plot_history({"a": history, "b": history}, x="tokens")
    assert ax.get_legend_handles_labels()[1] == ["a training", "a validation", "b training", "b validation"]
    assert ax.get_xlabel() == "tokens"
    plot_history(history, ax=plt.subplots()[1], x="seconds")
    plt.close("all")
    assert running_mean([1, 2, 3, 4], 1).tolist() == [1.5, 2, 3, 3.5] and running_mean([1., 5.], 0).tolist() == [1, 5]


def test_mistakes_at_the_start(tmp_path):
    tokens = toy_data(tmp_path)
    for model, data, options, message in [
            (toy_model(vocab_size=50), tokens, {}, "the data have a vocabulary of 100 ids, the model one of 50"),
            (toy_model(), tokens, dict(seq_len=65), "seq_len is 65, but the model's context is 64"),
            (toy_model().bfloat16(), tokens, {}, "the model's weights are bfloat16"),
            (toy_model(), toy_data(tmp_path, 40, name="short"), dict(seq_len=64), "the text has 38 tokens, but"),
            (toy_model(), (np.full(500, 100), None), {}, "outside the vocabulary")]:
        with pytest.raises(ValueError, match=message) as e: train(model, data, toy_config(**options), progress=False)
        assert "\n" not in str(e.value)

def test_output_folder(tmp_path):
    tokens, out = toy_data(tmp_path), tmp_path/"run"
    (tmp_path/"file").write_text("")
    with pytest.raises(OSError, match="cannot write to the output folder .*; choose another one"):
        train(toy_model(), tokens, toy_config(out=str(tmp_path/"file"/"run")), progress=False)
    train(toy_model(), tokens, toy_config(out=out, lr=np.float64(3e-3), seed=np.int64(0)),
          progress=False)  # a Path and NumPy's numbers
    assert load_checkpoint(checkpoints(out)[-1])["config"]["out"] == str(out)
    train(toy_model(), tokens, toy_config(out=str(out)), resume=True, progress=False)
    before = {p.name: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    with pytest.raises(FileExistsError, match="holds a run already; use resume=True .* overwrite=True"):
        train(toy_model(), tokens, toy_config(out=str(out)), progress=False)
    assert {p.name: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    with pytest.raises(ValueError, match="data was .*and is"):
        train(toy_model(), toy_data(tmp_path, 2000, name="other"), toy_config(out=str(out)), resume=True,
              progress=False)
    train(toy_model(), tokens, toy_config(out=str(out), steps=4), overwrite=True, progress=False)
    assert [p.name for p in checkpoints(out)] == ["step-00000004.pt"] and len(read_log(out)) == 5
