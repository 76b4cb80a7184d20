"Tests of 16_distributed. Generated from nbs/16_distributed.ipynb: edit that, then run pythia_book build."
import os
import pytest
import subprocess
import sys
import torch
from pythia_nb.checkpoint import checkpoints, read_checkpoint, read_log
from pythia_nb.distributed import export_checkpoint, start_team
from pythia_nb.model import Pythia
from pythia_nb.recipe import toy_data


JOBS = """
import sys, torch
from pythia_nb.config import PythiaConfig
from pythia_nb.tokens import TokenFile
from pythia_nb.distributed import start_team
from pythia_nb.model import Pythia
from pythia_nb.train import TrainConfig, train
torch.set_num_threads(1)

def job(folder, name, strategy, stop=0, meta=False):
    "Train until the end, or until a step after which it breaks off"
    team = start_team(strategy, "cpu")
    shape = PythiaConfig(vocab_size=100, hidden_size=32, num_layers=2, num_heads=2, max_position_embeddings=64)
    # copies start from the first process's weights, whatever the others have
    model = Pythia(shape, device="meta") if meta else Pythia(shape).init_weights(team.rank if strategy == "ddp" else 0)
    config = TrainConfig(steps=12, batch_size=8, seq_len=32, lr=3e-3, eval_every=4, eval_batches=2, micro_batch=2,
                         documents=True, out=f"{folder}/{name}")
    def interrupt(row):
        if row["step"] == stop: raise KeyboardInterrupt
    try: train(model.set_pattern("local(2)", 16), TokenFile(f"{folder}/toy"), config, resume=True, progress=False,
               callback=interrupt, team=team)
    except KeyboardInterrupt: pass
    return team
"""

def launch(folder, *jobs, world=2):
    "Do jobs one after the other: in one process, or in several that torchrun starts"
    (folder/"jobs.py").write_text(JOBS + "".join(f"team = job({str(folder)!r}, {job})\n" for job in jobs) +
                                   "if team.world > 1: team.close()\n")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)] if world > 1 else []
    done = subprocess.run([sys.executable, *torchrun, str(folder/"jobs.py")], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]

def curve(out):
    rows = read_log(out)
    return [r["loss"] for r in rows if "loss" in r] + [r["val_loss"] for r in rows if "val_loss" in r]

def test_teams_agree_and_checkpoints_move_between_them(tmp_path):
    toy_data(tmp_path)
    # two shards write steps 4 and 8 and break off at 9; one process goes on to 11; two copies end it
    launch(tmp_path, "'ddp', 'ddp'", "'fsdp', 'fsdp'", "'drawn', 'fsdp', meta=True", "'moved', 'fsdp', stop=9")
    assert read_checkpoint(checkpoints(tmp_path/"moved")[-1])["processes"] == 2
    launch(tmp_path, "'alone', 'ddp'", "'moved', 'ddp', stop=11", world=1)
    launch(tmp_path, "'moved', 'ddp'")
    alone = curve(tmp_path/"alone")
    assert len(alone) == 16 and alone[11] < alone[0] - 0.5
    for name in ("ddp", "fsdp", "drawn", "moved"): assert curve(tmp_path/name) == pytest.approx(alone, rel=2e-4), name
    model = export_checkpoint(checkpoints(tmp_path/"moved")[-1], tmp_path/"model")
    again, ids = Pythia.from_pretrained(tmp_path/"model"), torch.arange(32)[None]
    assert str(again.pattern) == "local(2)" and again.block == 16 and torch.equal(again(ids), model(ids))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_four_processes_follow_one(strategy, tmp_path):
    toy_data(tmp_path)
    launch(tmp_path, "'alone', 'ddp'", world=1)
    launch(tmp_path, f"'four', {strategy!r}", world=4)
    assert curve(tmp_path/"four") == pytest.approx(curve(tmp_path/"alone"), rel=2e-4)


@pytest.mark.parametrize("strategy, dtype, message", [("zero", "float32", "strategy is 'zero'; give 'ddp' or 'fsdp'"),
                                                      ("fsdp", "float16", "use bfloat16")])
def test_what_a_team_cannot_do(strategy, dtype, message, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match=message): start_team(strategy, "cpu", dtype)

def test_alone_without_torchrun(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    team = start_team()
    assert (team.rank, team.world, team.main) == (0, 1, True) and team.gather(3) == [3] and not team.any(False)
