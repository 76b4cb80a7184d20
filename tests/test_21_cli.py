"Tests of 21_cli. Generated from nbs/21_cli.ipynb: edit that, then run pythia_book build."
import contextlib
import io
import json
import matplotlib.pyplot as plt
import os
import pytest
import subprocess
import sys
import time
from pythia_nb.cli import agreement, generate, model_config, pattern_pictures, quickstart, quickstart_parser
from pythia_nb.config import PythiaConfig
from pythia_nb.model import Pythia


def write_corpus(folder):
    "A small corpus of Python-like text"
    folder.mkdir()
    for i in range(40):
        lines = [f"def function_{i}_{j}(value_{j}, other={i * j}):\n    return value_{j} + {j} * other\n" for j in range(40)]
        (folder / f"file_{i}.py").write_text("\n".join(lines))
    return folder

SMALL = ["--size", "1m", "--vocab_size", "400", "--seq_len", "64", "--block", "16", "--steps", "12", "--batch_size", "4"]

def run_command(main, argv):
    "Exit code, standard output and standard error of a command's function"
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err): code = main(argv)
    return code, out.getvalue(), err.getvalue()


def test_quickstart_from_end_to_end(tmp_path):
    data, out = write_corpus(tmp_path / "text"), tmp_path / "out"
    command = [sys.executable, "-c", "import sys; from pythia_nb.cli import quickstart; sys.exit(quickstart())"]
    done = subprocess.run([*command, *SMALL, "--data", str(data), "--out", str(out)], capture_output=True, text=True, env=dict(os.environ, PYTHONWARNINGS="ignore"))
    assert done.returncode == 0, done.stderr[-2000:]
    for name in ("patterns.png", "loss.png", "report.md", "report.json", "dense/log.jsonl", "sparse/model/model.safetensors", "sparse/model/tokenizer.json"):
        assert (out / name).stat().st_size > 0, name
    report = json.loads((out / "report.json").read_text())
    dense, sparse = report["comparison"]
    assert dense["parameters"] == sparse["parameters"] and dense["density"] == 1 > sparse["density"]
    first = report["histories"]["dense"][0]["val_loss"]
    assert dense["val_loss"] < first and sparse["val_loss"] < first
    assert {p.name for p in out.glob("**/.*")} <= {".metadata"}, "no temporary file is left behind"
    code, text, err = run_command(generate, [str(out / "sparse" / "model"), "--prompt", "def ", "--max_new_tokens", "20", "--seed", "1", "--device", "cpu"])
    assert code == 0 and text.startswith("def ") and len(text) > 10
    assert run_command(generate, [str(out / "sparse" / "model"), "--prompt", "def ", "--max_new_tokens", "20", "--seed", "1", "--device", "cpu"])[1] == text


@pytest.mark.parametrize("options, message", [
    (["--size", "13b"], "not one of 14m"), (["--pattern", "locale"], "unknown pattern 'locale'"), (["--block", "24"], "choose 16 or 32"),
    (["--seq_len", "16"], "too short"), (["--lr", "-1"], "lr is -1.0"), (["--device", "tpu"], "not one of auto"), (["--out", "/proc/nowhere"], "can't be written"),
    (["--data", "/nowhere/at/all"], "there is no file or folder"), (["--pattern", "[['local'], ['dense']]"], "pattern"),
])
def test_mistakes_get_one_sentence(options, message, tmp_path):
    start = time.perf_counter()
    code, out, err = run_command(quickstart, ["--out", str(tmp_path / "out"), *options])
    assert code == 2 and message in err and err.count("\n") == 1 and "Traceback" not in err, err
    assert time.perf_counter() - start < 5

def test_an_empty_and_an_unreadable_corpus_get_one_sentence(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "binary.txt").write_bytes(b"abc\0def")
    (tmp_path / "short.txt").write_text("too short")
    for data in ("empty", "binary.txt", "short.txt"):
        code, out, err = run_command(quickstart, [*SMALL, "--data", str(tmp_path / data), "--out", str(tmp_path / "out")])
        assert code == 2 and err.count("\n") == 1, err

def test_a_prompt_that_is_too_long_is_told_before_the_training(tmp_path):
    data = write_corpus(tmp_path / "text")
    code, out, err = run_command(quickstart, [*SMALL, "--data", str(data), "--out", str(tmp_path / "out"), "--prompt", "x y " * 3000])
    assert code == 2 and "shorten --prompt" in err and err.count("\n") == 1 and "2/5" not in out

def test_a_text_that_is_too_short_is_told_before_the_training(tmp_path):
    data = write_corpus(tmp_path / "text")
    code, out, err = run_command(quickstart, [*SMALL, "--data", str(data), "--out", str(tmp_path / "out"), "--seq_len", "300000"])
    assert code == 2 and "smaller seq_len" in err and err.count("\n") == 1 and "2/5" not in out

@pytest.mark.parametrize("pattern, title", [
    ("mixed", "the model's layout, 64 tokens"), ("[[['dense', 'local'], 2]]", "layout of layer 1, 64"), ("per_head([local, dense])", "the model's layout, head 0"),
])
def test_the_fourth_picture_says_what_it_shows(pattern, title):
    args = quickstart_parser().parse_args([*SMALL, "--pattern", pattern])
    figure = pattern_pictures(args, Pythia(model_config(args), pattern=pattern, block=16, device="meta"))
    assert figure.axes[3].get_title().startswith(title)
    plt.close(figure)

def test_generate_mistakes_get_one_sentence(tmp_path):
    code, out, err = run_command(generate, [str(tmp_path / "nothing"), "--prompt", "x"])
    assert code == 2 and err.count("\n") == 1 and "nothing" in err


def test_agreement_leaves_the_model_as_it_was():
    model = Pythia(PythiaConfig.preset("1m", vocab_size=300), pattern="[local(2), None, 'strided(3)', None]", block=16)
    attends = [layer.attention.attend.pattern if hasattr(layer.attention.attend, "pattern") else None for layer in model.layers]
    assert agreement(model, 100, 32) < 1e-4
    assert [layer.attention.attend.pattern if hasattr(layer.attention.attend, "pattern") else None for layer in model.layers] == attends
    assert model.block == 16
