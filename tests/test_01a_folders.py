"Tests of 01a_folders. Generated from nbs/01a_folders.ipynb: edit that, then run pythia_book build."
import importlib
import os
import pytest
from contextlib import nullcontext
from pythia_nb.folders import _install, fetch, replacing


def test_replacing_keeps_the_old_file(tmp_path):
    "An error inside the block changes nothing and leaves nothing."
    path = tmp_path / "f"
    with replacing(path) as t: t.write_bytes(b"old")
    with pytest.raises(RuntimeError):
        with replacing(path) as t:
            t.write_bytes(b"ne")
            raise RuntimeError
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def make_save(folder, text, *names):
    "A folder with the files of a save, all of the same content."
    folder.mkdir()
    for name in (*names, "config.json"): (folder / name).write_text(text)
    return folder

ONE, TWO = ["model.safetensors"], ["model-1-of-2.safetensors", "model-2-of-2.safetensors", "model.safetensors.index.json"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_install_keeps_the_old_save(tmp_path, monkeypatch, error):
    "Stopped at any renaming, the earlier files are back with their content, and only they; not stopped, the new ones are there."
    real = os.replace
    for stop in range(len(TWO) + 2):
        old, new = make_save(tmp_path / f"old{stop}", "old", *ONE), make_save(tmp_path / f"new{stop}", "new", *TWO)
        (old / "tokenizer.json").write_text("mine")
        calls, done = [], stop > len(TWO)
        def replace_or_stop(a, b):
            calls.append(b)
            if len(calls) == stop + 1: raise error
            real(a, b)
        with monkeypatch.context() as m:
            m.setattr(os, "replace", replace_or_stop)
            with nullcontext() if done else pytest.raises(error): _install(new, old)
        wanted = dict.fromkeys([*TWO, "config.json"], "new") if done else dict.fromkeys([*ONE, "config.json"], "old")
        assert {p.name: p.read_text() for p in old.iterdir()} == wanted | {"tokenizer.json": "mine"}


def test_names_that_lead_nowhere(tmp_path, monkeypatch):
    "No folder, a file, no huggingface_hub, no network."
    with pytest.raises(FileNotFoundError, match="no folder"): fetch(tmp_path / "none")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"): fetch(tmp_path / "file")
    class Hub:
        calls = []
        @staticmethod
        def snapshot_download(name, revision=None, allow_patterns=None):
            Hub.calls.append((name, revision))
            raise ConnectionError("no route\nto host")
    monkeypatch.setattr(importlib, "import_module", lambda name: Hub)
    with pytest.raises(OSError, match="EleutherAI/pythia-70m.*step3000.*no route to host") as e:
        fetch("EleutherAI/pythia-70m", revision="step3000")
    assert "\n" not in str(e.value) and Hub.calls == [("EleutherAI/pythia-70m", "step3000")]
    def missing(name): raise ImportError(name)
    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ImportError, match="pip install"): fetch("EleutherAI/pythia-70m")
