"Tests of 21b_prepare_cli. Generated from nbs/21b_prepare_cli.ipynb: edit that, then run pythia_book build."
import contextlib
import io
import json
import multiprocessing
import os
import pytest
import random
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from pythia_nb.data import open_tokens
from pythia_nb.prepare_cli import main
from pythia_nb.tokenizer import END_OF_TEXT


def write_text(folder, documents=400):
    "JSON lines and text made of the standard library"
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = [text for p in paths if (text := p.read_text(encoding="utf-8")).strip()][:documents]
    assert len(texts) == documents
    folder.mkdir()
    (folder/"a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts[::2]))
    (folder/"b.txt").write_text(END_OF_TEXT.join(texts[1::2]), encoding="utf-8")
    return folder

def finished(folder):
    "How many shards are there"
    return len(list(Path(folder).glob("*.safetensors")))

def content(folder):
    "Every file and its bytes"
    return {p.name: p.read_bytes() for p in sorted(Path(folder).iterdir())}

def kill_and_compare(folder, kills, documents, workers, seed=0):
    "Kill a preparation so many times, let it end, and compare with one in peace; gives how many were still at work"
    rng, text, killed = random.Random(seed), write_text(folder/"text", documents), 0
    argv = [str(a) for a in (text/"a.jsonl", text/"b.txt", "--tokenizer", "train", "--vocab_size", 400, "--shard_tokens", 10_000,
                             "--workers", workers, "--out")]
    context = multiprocessing.get_context("forkserver")  # a server that has imported all, and forks for each run
    context.set_forkserver_preload(["pythia_nb.prepare_cli"])
    def run(out):
        process = context.Process(target=main, args=([*argv, str(folder/out)],))
        process.start()
        return process
    run("peace").join()
    assert open_tokens(folder/"peace").documents == documents
    for _ in range(kills):
        have, process = finished(folder/"out"), run("out")
        while process.is_alive() and finished(folder/"out") <= have: time.sleep(0.002)
        time.sleep(rng.random() * 0.1)
        killed += process.is_alive()
        process.kill(); process.join()
        with pytest.raises((ValueError, OSError)): open_tokens(folder/"out")
    run("out").join()
    assert content(folder/"out") == content(folder/"peace") and finished(folder/"out") > 2 * kills
    return killed

def test_killed_and_run_again(tmp_path):
    assert kill_and_compare(tmp_path, kills=3, documents=90, workers=1) == 3

def test_sigterm_ends_it_in_order(tmp_path):
    text, out = write_text(tmp_path/"text", 150), tmp_path/"out"
    code = "import sys; from pythia_nb.prepare_cli import main; sys.exit(main())"
    process = subprocess.Popen([sys.executable, "-c", code, str(text), *"--tokenizer train --vocab_size 400 --shard_tokens 10000".split(),
                                "--workers", "1", "--out", str(out)], stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not finished(out): time.sleep(0.002)
    process.terminate()
    _, err = process.communicate()
    assert process.returncode == 130 and "pythia_prepare: interrupted; what was saved so far is whole" in err
    assert finished(out) and not list(out.glob(".*")) and "Traceback" not in err
    with pytest.raises(ValueError, match="are not finished"): open_tokens(out)


@pytest.mark.slow
def test_ten_kills_and_two_workers(tmp_path):
    assert kill_and_compare(tmp_path, kills=10, documents=160, workers=2, seed=1) >= 8


def run_command(argv):
    "Exit code, standard output and standard error"
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err): code = main([str(a) for a in argv])
    return code, out.getvalue(), err.getvalue()

def test_mistakes_are_one_sentence(tmp_path):
    (tmp_path/"a.jsonl").write_text('{"text": "a text"}\n{"body": "x"}\n')
    (tmp_path/"empty.txt").write_text("")
    (tmp_path/"latin.txt").write_bytes("Köln".encode("latin-1"))
    (tmp_path/"tok.json").write_text("{}")
    (tmp_path/"ok.txt").write_text("some text " * 99)
    train = ["--tokenizer", "train", "--vocab_size", "257", "--workers", "1"]
    for argv, message in [
            ([tmp_path/"none", *train], "there is no file or folder"), ([tmp_path/"a.jsonl", *train], "line 2 has no field 'text', it has 'body'"),
            ([tmp_path/"empty.txt", *train], "the sources hold no text"), ([tmp_path/"latin.txt", *train], "is not UTF-8 text"),
            ([tmp_path/"ok.txt", "--tokenizer", tmp_path/"tok.json"], "is not a readable tokenizer file"),
            ([tmp_path/"ok.txt", *train, "--weights", "1", "2"], "there are 2 weights for 1 sources"),
            ([tmp_path/"ok.txt", *train, "--out", tmp_path/"ok.txt"/"x"], "can't be written (Not a directory); choose another one with --out")]:
        code, out, err = run_command([*argv, *([] if "--out" in argv else ["--out", tmp_path/"out"])])
        assert (code, out) == (2, "") and message in err and err.startswith("pythia_prepare: ") and err.count("\n") == 1, err
    code, out, err = run_command([tmp_path/"ok.txt", *train, "--out", tmp_path/"good"])
    assert code == 0 and out.startswith(f"{tmp_path/'good'}: 1 documents, ") and "257 ids in 1 shards" in out and not err

@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path/"ok.txt").write_text("some text " * 99)
    (tmp_path/"locked").mkdir(mode=0o500)
    code, _, err = run_command([tmp_path/"ok.txt", "--tokenizer", "train", "--vocab_size", "257", "--out", tmp_path/"locked"])
    assert code == 2 and "can't be written (Permission denied); choose another one with --out" in err

def test_a_real_limit_on_file_size(tmp_path):
    resource = pytest.importorskip("resource")
    (tmp_path/"ok.txt").write_text("some text " * 20_000)
    argv = [tmp_path/"ok.txt", "--tokenizer", "train", "--vocab_size", "257", "--workers", "1", "--out", tmp_path/"out"]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try: code, _, err = run_command(argv)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 2 and "cannot write to" in err and "File too large; make room and run the same command again" in err
    assert run_command(argv)[0] == 0
