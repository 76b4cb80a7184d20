"Tests of 22b_made. Generated from nbs/22b_made.ipynb: edit that, then run pythia_book build."
import pytest
from pythia_nb.book import AREA, BookError, TRAIN, free_names, small_book
from pythia_nb.made import copied, pytest_files


def test_generated_tests_compile_and_are_complete(tmp_path):
    book = small_book(tmp_path / "b")
    text = pytest_files(book)["tests/test_00_area.py"]
    assert free_names(text) == set()
    assert "@pytest.mark.slow\ndef test_slow" in text and "#|" not in text
    assert text.index("def test_circle") < text.index("def test_slow")


def test_undefined_name_in_a_test_cell(tmp_path):
    book = small_book(tmp_path / "b", **{"00_area": AREA + ["#| test\ndef test_bad(): assert radius == 1"]})
    with pytest.raises(BookError, match=r"00_area.ipynb, cell 14 \(c13\): the name radius"): pytest_files(book)


def test_the_index_may_export_to_init(tmp_path):
    cells = ["# T\n\n> t.", "#| default_exp __init__", "#| exporti\ndef f(): return 1",
             "#| test\ndef test_f(): assert f() == 1"]
    book = small_book(tmp_path / "b", index=cells)
    assert "from tiny import f\n" in pytest_files(book)["tests/test_index.py"]


def test_module_is_imported_for_its_patches(tmp_path):
    book = small_book(tmp_path / "b", **{"01_train": TRAIN[:4] + ["#| test\ndef test_it(): assert circle(0) == 0"]})
    assert "import tiny.train\nfrom tiny.area import circle" in pytest_files(book)["tests/test_01_train.py"]


def test_export_that_goes_nowhere(tmp_path):
    book = small_book(tmp_path / "b", **{"00_area": ["# T\n\n> t.", "#| export\nx = 1"]})
    with pytest.raises(BookError, match="nbdev_export warns:(.|\n)*00_area.ipynb"): copied(book, tmp_path / "c")
