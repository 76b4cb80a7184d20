"Tests of 22d_traps. Generated from nbs/22d_traps.ipynb: edit that, then run pythia_book build."
import json
import pytest
from execnb.nbio import mk_cell, new_nb
from nbdev.process import NBProcessor
from pythia_nb.book import small_book, write_whole
from pythia_nb.made import unclean
from pythia_nb.traps import lint, picture_traps, source_traps


def code_cell(source, *outputs):
    cell = NBProcessor(nb=new_nb([mk_cell(source, id="x1")]), rm_directives=False).nb.cells[0]
    cell.outputs = outputs
    return cell


@pytest.mark.parametrize("source, message", [
    ("#| bench\ndef f():\n    import os", "an import in a cell marked bench"),
    ("#| demo\nimport os", "an import in a cell marked demo"),
    ("#| exports\n#| cuda\nx = 1", "an exported cell is marked cuda"),
    ("y = (7\n%3)", "a line begins with %"),
    ("from os import *", "a star import")])
def test_source_traps(source, message):
    assert message in source_traps(code_cell(source), ["cuda", "bench"])[0]


@pytest.mark.parametrize("source", [
    "#| test\ndef test_f():\n    import os", "%timeit f()", "x = 7 % 3", "#| hide\nimport os"])
def test_no_traps(source): assert source_traps(code_cell(source), ["cuda", "bench"]) == []


PICTURE = {"output_type": "display_data", "data": {"image/png": "iVBORw0KGgo=", "text/plain": "<Figure>"}, "metadata": {}}

@pytest.mark.parametrize("source, silent", [("plot()", True), ('#| fig-alt: ""\nplot()', True), ('#| fig-alt: "A line that falls"\nplot()', False), ("#| hide\nplot()", False)])
def test_a_picture_needs_a_text(source, silent):
    assert bool(picture_traps(code_cell(source, PICTURE))) == silent and picture_traps(code_cell(source)) == []

def test_a_picture_in_text_needs_one_too():
    for text, silent in (("![](a.png)", True), ("![A line](a.png)", False), ('<img src="a.png">', True), ('<img src="a.png" alt="A line">', False), ("no picture", False)):
        assert bool(picture_traps(mk_cell(text, "markdown"))) == silent


def test_source_stored_as_one_string(tmp_path):
    book = small_book(tmp_path / "b")
    nb = json.loads((book.nbs / "index.ipynb").read_text())
    nb["cells"][3]["source"] = "1 + 1"
    write_whole(book.nbs / "index.ipynb", json.dumps(nb))
    assert lint(book) == ["index.ipynb: cell 4: its source is one string, not a list of lines"]
    assert list(unclean(book)) == ["nbs/index.ipynb"]


def test_lint_looks_at_pictures(tmp_path):
    book = small_book(tmp_path / "b")
    nb = json.loads((book.nbs / "00_area.ipynb").read_text())
    nb["cells"][-1]["outputs"] = [PICTURE]
    write_whole(book.nbs / "00_area.ipynb", json.dumps(nb))
    assert [line.partition(": ")[2] for line in lint(book)] == ['a picture without alternative text; begin the cell with #| fig-alt: "what it shows"']
