"Tests of 22a_first_pages. Generated from nbs/22a_first_pages.ipynb: edit that, then run pythia_book build."
import importlib.util
import json
import pytest
import subprocess
import sys
import types
from execnb.nbio import mk_cell, nb2str, new_nb
from nbdev.process import NBProcessor
from pythia_nb.book import BookError, TRAIN, small_book
from pythia_nb.first_pages import INSTALL, demo_notebook, readme_cell, with_outputs


@pytest.mark.parametrize("there, cuda, wanted", [
    ({"tiny", "torch"}, "13.0", None),
    ({"torch"}, "13.0", ["git+https://x", "torch==2.11.0+cu130", "cupy-cuda13x"]),
    ({"torch"}, "12.6", ["git+https://x", "torch==2.11.0+cu130", "cupy-cuda12x"]),
    ({"torch", "cupy"}, "13.0", ["git+https://x", "torch==2.11.0+cu130"]),
    ({"torch"}, None, ["git+https://x", "torch==2.11.0+cu130"]),
    (set(), None, ["git+https://x"])])
def test_demo_installs_what_is_missing(tmp_path, monkeypatch, there, cuda, wanted):
    calls, gpu = [], types.SimpleNamespace(is_available=lambda: cuda is not None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in there else None)
    monkeypatch.setattr(subprocess, "run", lambda command, check: calls.append(command))
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(__version__="2.11.0+cu130", version=types.SimpleNamespace(cuda=cuda), cuda=gpu))
    monkeypatch.chdir(tmp_path)
    exec(INSTALL.format(package="tiny", url="https://x"), {})
    assert calls == ([] if wanted is None else [[sys.executable, "-m", "pip", "install", "-q", *wanted]])


def test_demo_uses_the_clone_it_is_in(tmp_path, monkeypatch):
    (tmp_path / "nbs").mkdir()
    (tmp_path / "tinyclone").mkdir()
    (tmp_path / "tinyclone" / "__init__.py").write_text("")
    monkeypatch.chdir(tmp_path / "nbs")
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("pip was started in a clone"))
    exec(INSTALL.format(package="tinyclone", url="https://x"), {})


def test_demo_outputs_follow_their_source():
    old = new_nb([mk_cell("a", id="1"), mk_cell("b", id="2")])
    old.cells[0].outputs = [{"output_type": "stream", "name": "stdout", "text": ["A"]}]
    nb = with_outputs(new_nb([mk_cell("b", id="3"), mk_cell("#| fig-alt: \"A\"\na", id="4"), mk_cell("a", id="5")]), nb2str(old))
    assert [bool(c.outputs) for c in nb.cells] == [False, True, False]


def test_demo_imports_keeps_flags_and_order(tmp_path):
    cells = json.loads(demo_notebook(small_book(tmp_path / "b")))["cells"]
    sources = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    assert sources[1] == "import tiny.train\nfrom tiny.area import circle"
    assert sources[2:] == ["area = circle(1.0)\narea", "#| slow\nlosses = [circle(r) for r in (3, 2, 1)]"]
    assert len({c["id"] for c in cells}) == len(cells)


@pytest.mark.parametrize("cell, message", [
    ("#| demo\nprint(losses)", "it uses losses, which only a demo cell marked slow defines"),
    ("#| demo\nprint(nowhere)", "the name nowhere is neither")])
def test_demo_refuses(tmp_path, cell, message):
    book = small_book(tmp_path / "b", **{"01_train": [*TRAIN, cell]})
    with pytest.raises(BookError, match=message): demo_notebook(book)


PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


def code_cell(source, *outputs):
    cell = NBProcessor(nb=new_nb([mk_cell(source, id="x1")]), rm_directives=False).nb.cells[0]
    cell.outputs = outputs
    return cell


def test_readme_of_outputs(tmp_path):
    book = small_book(tmp_path / "b")
    table = {"output_type": "display_data", "data": {"text/markdown": ["| a |\n", "|---|\n"], "text/plain": "x"}}
    picture = {"output_type": "display_data", "data": {"image/png": PIXEL, "text/plain": "x"}}
    stream = {"output_type": "stream", "name": "stdout", "text": ["\x1b[31mred\x1b[0m\n"]}
    cell = code_cell("#| fig-alt: \"A dot\"\nshow()", table, picture, stream)
    parts, files = readme_cell(cell, book)
    dot = "![A dot](nbs/assets/readme-x1-1.png)"
    assert parts == ["```python\nshow()\n```", "| a |\n|---|\n", dot, "```text\nred\n```"]
    assert files["nbs/assets/readme-x1-1.png"].startswith(b"\x89PNG")
    assert readme_cell(code_cell("#| echo: false\nshow()", stream), book) == (["```text\nred\n```"], {})
    assert readme_cell(code_cell("#| output: false\nshow()", stream), book) == (["```python\nshow()\n```"], {})
    assert readme_cell(code_cell("#| hide\nshow()", stream), book) == ([], {})
