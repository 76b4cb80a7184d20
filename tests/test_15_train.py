"Tests of 15_train. Generated from nbs/15_train.ipynb: edit that, then run pythia_book build."
import math
import matplotlib.pyplot as plt
import numpy as np
import os
import pytest
import signal
import subprocess
import sys
import torch
from pythia_nb import checkpoint
from pythia_nb.checkpoint import checkpoints, read_checkpoint, read_log
from pythia_nb.config import PythiaConfig
from pythia_nb.data import split
from pythia_nb.model import Pythia
from pythia_nb.recipe import TrainConfig
from pythia_nb.tokens import write_tokens
from pythia_nb.train import plot_history, running_mean, train


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

def without_times(history):
    return [{k: v for k, v in r.items() if k not in ("seconds", "tokens_per_s", "memory_gib")} for r in history]

def interrupt_at(step):
    def callback(row):
        if row["step"] == step: raise KeyboardInterrupt
    return callback

@pytest.mark.parametrize("options, shape", [({}, {}),
                                            (dict(micro_batch=3, documents=True),
                                             dict(hidden_dropout=0.2, attention_dropout=0.1)),
                                            (dict(dtype="bfloat16", save_every=3), dict(tie_embeddings=True)),
                                            (dict(dtype="float16", schedule="wsd"), {}),
                                            (dict(patterns=((0, "local"), (6, "dense"))), {})])
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
    assert [p.name for p in checkpoints(out)] == ["step-00000008", "step-00000012"]  # keep=2
    weights = checkpoints(out)[-1]/"__0_0.distcp"
    weights.write_bytes(weights.read_bytes()[:-1000])
    resumed = toy_model(3)
    with pytest.warns(UserWarning, match="step-00000012 is damaged"):
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
    assert history[0]["val_loss"] == pytest.approx(math.log(100) + 0.2, abs=0.2) and history[-1]["val_loss"] < 1.5
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
                                                 r"checkpoint is .*step-00000004"):
        train(model, tokens, toy_config(out=out), progress=False, callback=poison)
    assert read_checkpoint(checkpoints(out)[-1])["step"] == 4 and not model.embed_out.weight.isnan().any()

def test_a_loss_that_is_no_number_can_be_skipped(tmp_path):
    tokens, model, kept = toy_data(tmp_path), toy_model(), {}
    def poison(row):
        kept[row["step"]] = model.embed_in.weight.detach().clone()
        if row["step"] == 6: model.embed_in.weight.data[:] = math.nan
        if row["step"] == 8: model.embed_in.weight.data.copy_(kept[6])
    history = train(model, tokens, toy_config(on_nonfinite="skip"), progress=False, callback=poison)
    assert [r["step"] for r in history if "skipped" in r] == [7, 8] and math.isfinite(history[-1]["loss"])
    def ruin(row): model.embed_in.weight.data[:] = math.nan
    with pytest.raises(FloatingPointError, match="20 updates in a row were left out, the last at step 21 of 40"):
        train(model, tokens, toy_config(steps=40, on_nonfinite="skip"), progress=False, callback=ruin)

def test_pattern_changes_in_mid_training(tmp_path):
    tokens, seen = toy_data(tmp_path), {}
    model = toy_model().set_pattern("local(2)", 16)
    switching = toy_config(patterns=((5, "dense"), (9, "strided")), seq_len=64)
    train(model, tokens, switching, progress=False, callback=lambda row: seen.update({row["step"]: str(model.pattern)}))
    assert [seen[k] for k in (4, 5, 6, 9, 10, 12)] == ["local(2)"] * 2 + ["dense"] * 2 + ["strided"] * 2
    with pytest.raises(ValueError, match="unknown pattern 'locale'"):
        train(model, tokens, toy_config(patterns=((5, "locale"),)), progress=False)

def test_pythia_steps_are_kept(tmp_path):
    out = tmp_path/"run"
    train(toy_model(), toy_data(tmp_path), toy_config(out=str(out), pythia_steps=True, keep=1), progress=False)
    assert [int(p.name[5:]) for p in checkpoints(out)] == [0, 1, 2, 4, 8, 12]

def test_tensorboard_gets_the_log(tmp_path):
    pytest.importorskip("tensorboard")
    out = tmp_path/"run"
    train(toy_model(), toy_data(tmp_path), toy_config(out=str(out), tensorboard=True), progress=False)
    data = b"".join(p.read_bytes() for p in (out/"tensorboard").iterdir())
    assert b"val_loss" in data and b"grad_norm" in data

def test_a_full_disk_in_mid_training(tmp_path, monkeypatch):
    tokens, out, write = toy_data(tmp_path), str(tmp_path/"run"), checkpoint._write_parts
    def full(folder, *rest):
        if "00000008" in folder.name: raise OSError(28, "No space left on device")
        write(folder, *rest)
    monkeypatch.setattr(checkpoint, "_write_parts", full)
    with pytest.raises(OSError, match="cannot write the checkpoint .*step-00000008 .*No space left"):
        train(toy_model(), tokens, toy_config(out=out), progress=False)
    monkeypatch.undo()
    whole, resumed = toy_model(), toy_model(4)
    train(whole, tokens, toy_config(), progress=False)
    train(resumed, tokens, toy_config(out=out), resume=True, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters()))

def test_plot_history(tmp_path):
    history = train(toy_model(), toy_data(tmp_path), toy_config(), progress=False)
    ax = plot_history({"a": history, "b": history}, x="tokens")
    assert ax.get_legend_handles_labels()[1] == ["a training", "a validation", "b training", "b validation"]
    assert ax.get_xlabel() == "tokens"
    plot_history(history, ax=plt.subplots()[1], x="seconds")
    plt.close("all")
    assert running_mean([1, 2, 3, 4], 1).tolist() == [1.5, 2, 3, 3.5] and running_mean([1., 5.], 0).tolist() == [1, 5]


CHILD = """
import os, random, signal, sys, time
import torch
from pythia_nb.config import PythiaConfig
from pythia_nb.tokens import TokenFile
from pythia_nb.model import Pythia
from pythia_nb.train import TrainConfig, train
folder, kills = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
def live():
    model = Pythia(PythiaConfig(vocab_size=100, hidden_size=32, num_layers=2, num_heads=2, hidden_dropout=0.1)).init_weights(0)
    config = TrainConfig(steps=240, batch_size=4, seq_len=16, eval_every=3, eval_batches=1, out=folder + "/run", keep=2)
    train(model, TokenFile(folder + "/toy"), config, resume=True, progress=False)
    torch.save(model.state_dict(), folder + "/end.pt")
random.seed(int(sys.argv[3]))
for _ in range(kills):
    child = os.fork()
    if not child: live(); os._exit(0)
    time.sleep(random.uniform(0.03, 0.4))
    os.kill(child, signal.SIGKILL)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), len(os.listdir(folder + "/run/checkpoints")) if os.path.exists(folder + "/run/checkpoints") else 0)
live()
"""

def test_killed_twenty_times(tmp_path):
    toy_data(tmp_path)
    ends = []
    for n, kills in enumerate((0, 20)):
        folder = tmp_path/f"{n}"
        folder.mkdir()
        os.link(tmp_path/"toy", folder/"toy")
        done = subprocess.run([sys.executable, "-c", CHILD, str(folder), str(kills), "0"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        ends.append(torch.load(folder/"end.pt", weights_only=True))
        assert [r["step"] for r in read_log(folder/"run")] == list(range(241))
        lives = [line.split() for line in done.stdout.splitlines()]
        assert len(lives) == kills and sum(code == "-9" for code, _ in lives) >= kills // 2, done.stdout
    assert all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])

def test_sigterm_saves_and_ends(tmp_path):
    tokens, out, whole = toy_data(tmp_path), str(tmp_path/"run"), toy_model()
    train(whole, tokens, toy_config(), progress=False)
    def terminate(row):
        if row["step"] == 5: os.kill(os.getpid(), signal.SIGTERM)
    before = signal.getsignal(signal.SIGTERM)
    history = train(toy_model(), tokens, toy_config(out=out, save_every=100), progress=False, callback=terminate)
    assert history[-1]["step"] in (5, 6) and signal.getsignal(signal.SIGTERM) is before
    assert [int(p.name[5:]) for p in checkpoints(out)] == [history[-1]["step"]]
    resumed = toy_model(3)
    train(resumed, tokens, toy_config(out=out, save_every=100), resume=True, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters()))


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
    assert read_checkpoint(checkpoints(out)[-1])["config"]["out"] == str(out)
    train(toy_model(), tokens, toy_config(out=str(out)), resume=True, progress=False)
    before = {p.name: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    with pytest.raises(FileExistsError, match="holds a run already; use resume=True .* overwrite=True"):
        train(toy_model(), tokens, toy_config(out=str(out)), progress=False)
    assert {p.name: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    with pytest.raises(ValueError, match="data was .* tokens with the fingerprint .* and is"):
        train(toy_model(), toy_data(tmp_path, 2000, name="other"), toy_config(out=str(out)), resume=True,
              progress=False)
    train(toy_model(), tokens, toy_config(out=str(out), steps=4), overwrite=True, progress=False)
    assert [p.name for p in checkpoints(out)] == ["step-00000004"] and len(read_log(out)) == 5
