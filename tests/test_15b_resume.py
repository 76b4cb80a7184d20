"Tests of 15b_resume. Generated from nbs/15b_resume.ipynb: edit that, then run pythia_book build."
import os
import pytest
import signal
import subprocess
import sys
import torch
from pythia_nb import checkpoint
from pythia_nb.checkpoint import checkpoints, read_log
from pythia_nb.recipe import toy_config, toy_data, toy_model
from pythia_nb.train import train


def without_times(history):
    return [{k: v for k, v in r.items() if k not in ("seconds", "tokens_per_s", "memory_gib")} for r in history]

def test_seed_sets_everything(tmp_path):
    tokens, shape, losses = toy_data(tmp_path), dict(hidden_dropout=0.1), []
    for seed in (0, 0, 1):
        torch.rand(seed + 3)
        losses.append(without_times(train(toy_model(seed, **shape), tokens, toy_config(seed=seed), progress=False)))
    assert losses[0] == losses[1] != losses[2]


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

def test_pythia_steps_are_kept(tmp_path):
    out = tmp_path/"run"
    train(toy_model(), toy_data(tmp_path), toy_config(out=str(out), pythia_steps=True, keep=1), progress=False)
    assert [int(p.name[5:]) for p in checkpoints(out)] == [0, 1, 2, 4, 8, 12]


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
