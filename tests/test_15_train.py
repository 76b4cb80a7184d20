"Tests of 15_train. Generated from nbs/15_train.ipynb: edit that, then run pythia_book build."
import math
import matplotlib.pyplot as plt
import numpy as np
import pytest
from pythia_nb.checkpoint import checkpoints, read_checkpoint, read_log
from pythia_nb.data import split
from pythia_nb.recipe import toy_config, toy_data, toy_model
from pythia_nb.train import plot_history, running_mean, train


def test_reports(tmp_path, capsys):
    tokens = toy_data(tmp_path)
    train(toy_model(), tokens, toy_config()); out = capsys.readouterr()
    assert out.out.count("step ") == 3 and "val" in out.out and "tok/s" in out.out and not out.err
    train(toy_model(), tokens, toy_config(), progress=True, name="dense"); out = capsys.readouterr()
    assert not out.out and "dense: 100%" in out.err and "loss=" in out.err
    train(toy_model(), tokens, toy_config(), progress=False); out = capsys.readouterr()
    assert not out.out and not out.err

def test_tensorboard_gets_the_log(tmp_path):
    pytest.importorskip("tensorboard")
    out = tmp_path/"run"
    train(toy_model(), toy_data(tmp_path), toy_config(out=str(out), tensorboard=True), progress=False)
    data = b"".join(p.read_bytes() for p in (out/"tensorboard").iterdir())
    assert b"val_loss" in data and b"grad_norm" in data


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


def test_plot_history(tmp_path):
    history = train(toy_model(), toy_data(tmp_path), toy_config(), progress=False)
    ax = plot_history({"a": history, "b": history}, x="tokens")
    assert ax.get_legend_handles_labels()[1] == ["a training", "a validation", "b training", "b validation"]
    assert ax.get_xlabel() == "tokens"
    plot_history(history, ax=plt.subplots()[1], x="seconds")
    plt.close("all")
    assert running_mean([1, 2, 3, 4], 1).tolist() == [1.5, 2, 3, 3.5] and running_mean([1., 5.], 0).tolist() == [1, 5]


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
