"Tests of 22c_run. Generated from nbs/22c_run.ipynb: edit that, then run pythia_book build."
import pytest
from collections import Counter
from pythia_nb.book import AREA, BookError, read_chapter, small_book, write_whole
from pythia_nb.run import run_chapter, skipped_by, try_notebook


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
