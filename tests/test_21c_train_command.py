"Tests of 21c_train_command. Generated from nbs/21c_train_command.ipynb: edit that, then run pythia_book build."
import contextlib
import io
import numpy as np
import pytest
import signal
import subprocess
import sys
import time
import torch
from pythia_nb.checkpoint import checkpoints, read_log
from pythia_nb.model import Pythia
from pythia_nb.tokens import write_tokens
from pythia_nb.train_command import export_main, main, make_config, train_parser


def toy_text(folder):
    "A folder of text like Python's"
    (folder/"text").mkdir()
    for i in range(30):
        lines = [f"def function_{i}_{j}(value_{j}, other={i * j}):\n    return value_{j} + {j} * other\n" for j in range(40)]
        (folder/"text"/f"file_{i}.py").write_text("\n".join(lines))
    return str(folder/"text")

SMALL = ["--size", "1m", "--vocab_size", "400", "--seq_len", "64", "--batch_size", "4", "--eval_batches", "2", "--device", "cpu"]

def run_command(command, argv):
    "Exit code, standard output and standard error of a command's function"
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err): code = command(list(map(str, argv)))
    return code, out.getvalue(), err.getvalue()

def test_the_command_from_end_to_end(tmp_path):
    data, out = toy_text(tmp_path), tmp_path/"run"
    code, text, err = run_command(main, [*SMALL, "--data", data, "--steps", 12, "--eval_every", 4, "--sparse", "--out", out])
    assert code == 0 and "attention mixed" in text and "val_bits_per_byte" in text, err
    assert (out/"loss.png").stat().st_size > 0 and (out/"model"/"tokenizer.json").exists()
    assert str(Pythia.from_pretrained(out/"model").pattern) == "mixed" and len(read_log(out)) == 13
    code, text, err = run_command(main, [*SMALL, "--data", data, "--steps", 12, "--eval_every", 4, "--sparse", "--out", out])
    assert code == 2 and "holds a run already" in err
    # a dense continuation of the sparse model, and a switch back
    again = [*SMALL, "--data", data, "--model", out/"model", "--steps", 4, "--pattern", "dense", "--switch", "2:local(2)", "--out", tmp_path/"more"]
    code, text, err = run_command(main, again)
    assert code == 0, err
    first = read_log(tmp_path/"more")[0]["val_loss"]
    assert first == pytest.approx(read_log(out)[-1]["val_loss"], rel=0.1) and first < 5.5
    code, text, err = run_command(export_main, [checkpoints(out)[-1], tmp_path/"exported", "--dtype", "bfloat16", "--pattern", "dense"])
    assert code == 0 and Pythia.from_pretrained(tmp_path/"exported").dtype == torch.bfloat16, err

def test_epochs_and_batch_tokens():
    args = train_parser().parse_args(["--epochs", "10", "--seq_len", "128", "--batch_tokens", "4096", "--device", "cpu"])
    c = make_config(args, 1_000_000, torch.device("cpu"))
    assert c.batch_size == 32 and c.steps == round(10 * (1_000_000 // 128) / 32) and c.dtype == "float32"
    assert make_config(train_parser().parse_args([]), 1_000_000, torch.device("cuda")).dtype == "bfloat16"

@pytest.mark.parametrize("options, message", [
    (["--size", "13b"], "not one of 14m"), (["--data", "/nowhere"], "there is no file or folder"), (["--lr", "-1"], "lr is -1.0"),
    (["--switch", "local"], "is not STEP:PATTERN"), (["--batch_tokens", "10"], "less than one sample"), (["--pattern", "locale"], "unknown pattern"),
    (["--device", "tpu"], "not one of auto"), (["--data", "a", "b"], "prepare them first")])
def test_mistakes_get_one_sentence(options, message, tmp_path):
    code, out, err = run_command(main, [*SMALL, "--data", toy_text(tmp_path), "--steps", 2, "--out", tmp_path/"run", *options])
    assert code == 2 and message in err and err.count("\n") == 1, err

def test_prepared_tokens_and_a_deleted_file(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path/"tokens").mkdir()
    for i in range(2): write_tokens(tmp_path/"tokens"/f"{i}.safetensors", [rng.integers(0, 300, 500) for _ in range(20)], 300)
    options = [*SMALL, "--data", tmp_path/"tokens", "--steps", 4, "--eval_every", 2, "--out", tmp_path/"run"]
    code, text, err = run_command(main, options)
    assert code == 0 and "20,000" not in err and "of 300 ids" in text, err
    (tmp_path/"tokens"/"1.safetensors").unlink()
    code, text, err = run_command(main, [*options, "--resume"])
    assert code == 2 and "data was" in err and err.count("\n") == 1

def test_sigterm_ends_with_0_and_resume_goes_on(tmp_path):
    data, out = toy_text(tmp_path), tmp_path/"run"
    command = [sys.executable, "-m", "pythia_nb.train_command", *SMALL, "--data", data, "--steps", "400", "--eval_every", "100", "--out", str(out)]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(600):
        if len(read_log(out)) > 4: break
        time.sleep(0.1)
    started.send_signal(signal.SIGTERM)
    text, err = started.communicate(timeout=60)
    assert started.returncode == 0 and "told to stop: step" in text, err
    step = read_log(out)[-1]["step"]
    assert 4 <= step < 400 and [int(p.name[5:]) for p in checkpoints(out)] == [step]
    code, text, err = run_command(main, [*command[3:], "--resume"])
    assert code == 0 and [r["step"] for r in read_log(out)] == list(range(401)), err
