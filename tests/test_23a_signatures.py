"Tests of 23a_signatures. Generated from nbs/23a_signatures.ipynb: edit that, then run pythia_book build."
import ast
from pythia_nb.signatures import Definition, Linker, entry


def test_entry_of_a_class():
    source = 'class A:\n    "Doc * of A"\n    x: int   # number of [B]\n    y: int = 3\n\n    def f(self, k,  # keys\n          ) -> int:  # the sum\n        "Adds"\n'
    text = entry(Definition("A", ast.parse(source).body[0], source), Linker({}, {}, "m"))
    assert ":::::{py:class} A(x: int, y: int = 3)" in text and r"Doc \* of A" in text and r":param x: number of \[B\]" in text
    assert ":::{py:method} f(k) -> int" in text and ":param k: keys" in text and ":returns: the sum" in text
