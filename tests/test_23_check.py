"Tests of 23_check. Generated from nbs/23_check.ipynb: edit that, then run pythia_book build."
from pythia_nb.book import AREA, small_book, write_whole
from pythia_nb.check import check, docs_problems
from pythia_nb.made import build, copied


def test_docs_processing_failure_is_named(tmp_path):
    book = small_book(tmp_path / "b", **{"00_area": [*AREA[:3], "#| export\nundefined_thing"]})
    problems = docs_problems(copied(book, tmp_path / "c"))
    assert len(problems) == 1 and "00_area.ipynb" in problems[0] and "undefined_thing" in problems[0]


def test_check_names_what_is_wrong(tmp_path):
    book = small_book(tmp_path / "b")
    assert build(book) == []
    write_whole(book.root / "README.md", "by hand")
    (book.root / "tests/test_00_area.py").unlink()
    assert [p.split()[0] for p in check(book)] == ["tests/test_00_area.py", "README.md"]
