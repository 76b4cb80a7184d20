"Tests of 23_check. Generated from nbs/23_check.ipynb: edit that, then run pythia_book build."
import json
import pytest
from collections import Counter
from execnb.nbio import mk_cell, new_nb
from nbdev.process import NBProcessor
from pythia_nb.book import AREA, BookError, read_chapter, small_book, write_whole
from pythia_nb.check import (
    check, docs_problems, lint, picture_traps, run_chapter, skipped_by, source_traps, try_notebook,
)
from pythia_nb.made import build, copied, unclean


def test_runner_keeps_outputs_of_skipped_cells_and_leaves_failures_alone(tmp_path):
    cells = ["# T\n\n> t.", "x = 1", "#| cuda\nprint('from a GPU')", "print(x)"]
    book = small_book(tmp_path / "b", **{"00_area": cells})
    path = book.nbs / "00_area.ipynb"
    assert run_chapter(book, path, ["cuda"]) == Counter(run=3)
    assert run_chapter(book, path) == Counter(run=2, cuda=1)
    first = path.read_text()
    assert "from a GPU" in first
    write_whole(path, first.replace("print(x)", "x / 0"))
    broken = path.read_text()
    message = r"00_area.ipynb, cell 4 \(c3\) failed:(.|\n)*ZeroDivisionError"
    with pytest.raises(BookError, match=message): run_chapter(book, path)
    assert path.read_text() == broken


@pytest.mark.parametrize("asked", [(), ("slow", "cuda"), ("slow", "notest")])
def test_counts_are_those_of_nbdev(tmp_path, asked):
    cells = [
        *AREA[:-3], "#| notest\n1 / 0", "#| slow\n2", "#| slow\n#| notest\n3", "#| cuda\n4",
        "#| eval: false\n5", "#| hide\n"]
    book = small_book(tmp_path / "b", **{"00_area": cells})
    done = try_notebook(book, book.nbs / "00_area.ipynb", asked)
    code = read_chapter(book.nbs / "00_area.ipynb").code
    expected = Counter(flag for c in code for flag in skipped_by(c, book.flags, asked) or ["run"])
    assert done.ok == ("notest" not in asked)
    if done.ok: assert done.counts == expected
    else: assert "ZeroDivisionError" in done.error


def test_notebook_of_which_nothing_ran_fails(tmp_path):
    book = small_book(tmp_path / "b", **{"00_area": ["# T\n\n> t.", "#| cuda\n1", "#| slow\n2"]})
    done = try_notebook(book, book.nbs / "00_area.ipynb")
    assert not done.ok and done.counts == Counter(run=0, cuda=1, slow=1) and "no cell ran" in done.error


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


def test_source_stored_as_one_string(tmp_path):
    book = small_book(tmp_path / "b")
    nb = json.loads((book.nbs / "index.ipynb").read_text())
    nb["cells"][3]["source"] = "1 + 1"
    write_whole(book.nbs / "index.ipynb", json.dumps(nb))
    assert lint(book) == ["index.ipynb: cell 4: its source is one string, not a list of lines"]
    assert list(unclean(book)) == ["nbs/index.ipynb"]


PICTURE = {"output_type": "display_data", "data": {"image/png": "iVBORw0KGgo=", "text/plain": "<Figure>"}, "metadata": {}}

@pytest.mark.parametrize("source, silent", [("plot()", True), ('#| fig-alt: ""\nplot()', True), ('#| fig-alt: "A line that falls"\nplot()', False), ("#| hide\nplot()", False)])
def test_a_picture_needs_a_text(source, silent):
    assert bool(picture_traps(code_cell(source, PICTURE))) == silent and picture_traps(code_cell(source)) == []

def test_a_picture_in_text_needs_one_too():
    for text, silent in (("![](a.png)", True), ("![A line](a.png)", False), ('<img src="a.png">', True), ('<img src="a.png" alt="A line">', False), ("no picture", False)):
        assert bool(picture_traps(mk_cell(text, "markdown"))) == silent

def test_lint_looks_at_pictures(tmp_path):
    book = small_book(tmp_path / "b")
    nb = json.loads((book.nbs / "00_area.ipynb").read_text())
    nb["cells"][-1]["outputs"] = [PICTURE]
    write_whole(book.nbs / "00_area.ipynb", json.dumps(nb))
    assert [line.partition(": ")[2] for line in lint(book)] == ['a picture without alternative text; begin the cell with #| fig-alt: "what it shows"']


def test_check_names_what_is_wrong(tmp_path):
    book = small_book(tmp_path / "b")
    assert build(book) == []
    write_whole(book.root / "README.md", "by hand")
    (book.root / "tests/test_00_area.py").unlink()
    assert [p.split()[0] for p in check(book)] == ["tests/test_00_area.py", "README.md"]


def test_docs_processing_failure_is_named(tmp_path):
    book = small_book(tmp_path / "b", **{"00_area": [*AREA[:3], "#| export\nundefined_thing"]})
    problems = docs_problems(copied(book, tmp_path / "c"))
    assert len(problems) == 1 and "00_area.ipynb" in problems[0] and "undefined_thing" in problems[0]
