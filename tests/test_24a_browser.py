"Tests of 24a_browser. Generated from nbs/24a_browser.ipynb: edit that, then run pythia_book build."
import pytest
from concurrent.futures import ThreadPoolExecutor
from pythia_nb import patterns as P
from pythia_nb.book import find_book, write_whole
from pythia_nb.browser import EXPLORED, FAULTS, GOOD, check_site, open_browser, script_measure
from pythia_nb.docs import build_site, page_names, read_site


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(fault, tmp_path):
    write_whole(tmp_path / "index.html", GOOD.format(f'<a href="index.html#a">here</a>{FAULTS[fault]}'))
    names = ["other.html"] if fault == "does not reach" else None
    problems = check_site(tmp_path, names)
    assert any(fault in p for p in problems), problems


@pytest.mark.slow
def test_a_good_site_passes(tmp_path):
    write_whole(tmp_path / "index.html", GOOD.format('<a href="index.html#a">here</a>'))
    assert check_site(tmp_path) == []


@pytest.mark.slow
def test_the_explorers_script_counts_like_python():
    script = find_book().nbs / "assets/explorer.js"
    def look():
        with open_browser() as browser:
            page = browser.new_page()
            return {(name, *size): script_measure(page, script, name, *size) for name in EXPLORED for size in ((2048, 64), (4096, 128), (1024, 16))}
    with ThreadPoolExecutor(1) as pool: said = pool.submit(look).result()
    for (name, tokens, block), got in said.items():
        layout = P.NAMES[name](**EXPLORED[name]).layout(tokens, block=block)
        assert (got["visible"], got["density"], got["operations"]) == (layout.visible, layout.density, layout.flops(64, 8)), name


@pytest.mark.slow
def test_the_docs_site(tmp_path):
    book = find_book()
    site = build_site(book, tmp_path / "site")
    names = [name.replace(".ipynb", ".html") for name in page_names(read_site(book), book).values()]
    assert check_site(site, names, ("block_sparse_attention", "attention.html")) == []
