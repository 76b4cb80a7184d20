"Tests of 14d_checkpoint. Generated from nbs/14d_checkpoint.ipynb: edit that, then run pythia_book build."
import numpy as np
import pytest
import resource
import torch
import torch.distributed.checkpoint as dcp
from pythia_nb.checkpoint import (
    check_unchanged, checkpoint_path, checkpoints, newest_checkpoint, open_run, prune, read_checkpoint, read_log,
    restore, save_checkpoint, save_due, state_tensors, write_log,
)
from pythia_nb.data import Batches
from pythia_nb.recipe import TrainConfig, make_optimizer, toy_model, train_step


def toy_run(seed=0, **shape):
    "A model and its optimizer after one step"
    model, c = toy_model(seed, **shape), TrainConfig()
    optimizer = make_optimizer(model, c)
    train_step(model, optimizer, Batches(np.arange(500) % 97, 16, 4)[0], 1e-3, c)
    return model, optimizer

@pytest.mark.parametrize("shape", [{}, dict(tie_embeddings=True)])
def test_round_trip(shape, tmp_path):
    model, optimizer = toy_run(**shape)
    torch.manual_seed(7)
    save_checkpoint(tmp_path/"a", model, optimizer, 1, TrainConfig(), note={"x": 1})
    expected = torch.rand(3)
    other = toy_model(1, **shape)
    other_optimizer = make_optimizer(other, TrainConfig())
    state = read_checkpoint(tmp_path/"a")
    assert state["note"] == {"x": 1} and restore(state, other, other_optimizer) == 1
    assert torch.equal(torch.rand(3), expected)
    ours, theirs = state_tensors(model, optimizer), state_tensors(other, other_optimizer)
    assert set(ours) == set(theirs) and all(torch.equal(ours[k], theirs[k]) for k in ours)
    weights_only = toy_model(2, **shape)
    restore(state, weights_only, None)
    assert torch.equal(weights_only.embed_in.weight, model.embed_in.weight)

def test_damage_is_named(tmp_path):
    model, optimizer = toy_run()
    for step in (1, 2): save_checkpoint(checkpoint_path(tmp_path, step), model, optimizer, step, TrainConfig())
    newest = checkpoint_path(tmp_path, 2)
    for name in ("__0_0.distcp", ".metadata", "random-0.pt", "run.json"):
        whole = (newest/name).read_bytes()
        flipped = bytearray(whole); flipped[len(whole) // 2] ^= 4
        for damaged in (whole[:-10], b"", bytes(flipped) if name != "run.json" else whole.replace(b"step", b"stop")):
            (newest/name).write_bytes(damaged)
            with pytest.warns(UserWarning, match="step-00000002 is damaged .*; trying the one before it"):
                assert newest_checkpoint(tmp_path)["step"] == 1
        (newest/name).unlink()
        with pytest.warns(UserWarning, match=f"{name} is missing"): newest_checkpoint(tmp_path)
        (newest/name).write_bytes(whole)
    assert newest_checkpoint(tmp_path)["step"] == 2
    for path in checkpoints(tmp_path): (path/"run.json").write_text("x")
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="all 2 checkpoints in .* are damaged"):
        newest_checkpoint(tmp_path)
    assert newest_checkpoint(tmp_path/"empty") is None
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"): read_checkpoint(tmp_path/"none")

@pytest.mark.parametrize("error", [OSError(28, "No space left on device"),
                                   RuntimeError("PytorchStreamWriter failed writing file: No space left on device")])
def test_a_failed_save_leaves_the_old_checkpoints(error, tmp_path, monkeypatch):
    model, optimizer = toy_run()
    save_checkpoint(tmp_path/"a", model, optimizer, 1, TrainConfig())
    def full_disk(tensors, checkpoint_id, **_):
        (checkpoint_id/"__0_0.distcp").write_bytes(b"half")
        raise error
    monkeypatch.setattr(dcp, "save", full_disk)
    for name in ("a", "b"):
        with pytest.raises(OSError, match="cannot write the checkpoint .*No space left.*earlier checkpoints are intact"):
            save_checkpoint(tmp_path/name, model, optimizer, 2, TrainConfig())
    assert read_checkpoint(tmp_path/"a")["step"] == 1 and [p.name for p in tmp_path.iterdir()] == ["a"]

def test_a_disk_that_is_full_in_earnest(tmp_path):
    "The operating system refuses to write more than so many bytes into a file, in the middle of the weights."
    model, optimizer = toy_run(hidden_size=128)
    save_checkpoint(tmp_path/"a", model, optimizer, 1, TrainConfig())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(OSError, match="cannot write the checkpoint .*earlier checkpoints are intact") as e:
            save_checkpoint(tmp_path/"b", model, optimizer, 2, TrainConfig())
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(e.value) and read_checkpoint(tmp_path/"a")["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a"]

def test_changed_settings_are_named(tmp_path):
    model, optimizer = toy_run()
    save_checkpoint(tmp_path/"a", model, optimizer, 1, TrainConfig(), data="x")
    state = read_checkpoint(tmp_path/"a")
    with pytest.raises(ValueError, match="lr was 0.001 and is 0.1, seed was 0 and is 1; use the old ones"):
        check_unchanged(state, model, TrainConfig(lr=0.1, seed=1))
    with pytest.raises(ValueError, match="num_layers was 2 and is 1"):
        check_unchanged(state, toy_model(num_layers=1), TrainConfig())
    with pytest.raises(ValueError, match="data was 'x' and is 'y'"): check_unchanged(state, model, TrainConfig(), data="y")
    check_unchanged(state, model, TrainConfig(eval_every=1, keep=5, out="elsewhere", micro_batch=2), data="x")


@pytest.mark.parametrize("options, expected", [(dict(keep=2), [50, 60]), (dict(keep=1, keep_every=20), [20, 40, 60]),
                                               (dict(keep=1, pythia_steps=True), [0, 1, 2, 4, 8, 16, 32, 60])])
def test_which_checkpoints_are_kept(options, expected, tmp_path):
    c = TrainConfig(steps=60, save_every=10, **options)
    for step in range(61):
        if save_due(step, c):
            (checkpoint_path(tmp_path, step)).mkdir(parents=True)
            prune(tmp_path, c)
    assert [int(p.name[5:]) for p in checkpoints(tmp_path)] == expected
    assert not list(tmp_path.glob("checkpoints/.*"))

def test_log_survives_a_torn_line(tmp_path):
    (tmp_path/"log.jsonl").write_text('{"step": 0, "val_loss": 4.6}\n{"step": 1, "loss": 4.5}\n{"step": 2, "lo')
    assert [r["step"] for r in read_log(tmp_path)] == [0, 1]
    assert len(read_log(tmp_path, 0)) == 1 and read_log(tmp_path/"none") == []
    write_log(tmp_path, read_log(tmp_path))
    write_log(tmp_path, [{"step": 2}], append=True)
    assert [r["step"] for r in read_log(tmp_path)] == [0, 1, 2]
    with pytest.raises(OSError, match="cannot write the log"): write_log(tmp_path/"none", [{"step": 2}], append=True)

def test_leftovers_are_removed(tmp_path):
    for name in (".step-00000004.new", ".step-00000002.old", "step-00000003"):
        (tmp_path/"checkpoints"/name).mkdir(parents=True)
    with pytest.raises(FileExistsError, match="holds a run already; use resume=True .* overwrite=True"): open_run(tmp_path)
    assert [p.name for p in (tmp_path/"checkpoints").iterdir()] == ["step-00000003"]
