"Tests of 18_contenders. Generated from nbs/18_contenders.ipynb: edit that, then run pythia_book build."
import pytest
import torch
from pythia_nb import patterns as P
from pythia_nb.contenders import Case, DENSE, check_small, packed


@pytest.mark.parametrize("name", ["pythia_nb", "pythia_nb torch", "dense", "flash", "math"])
def test_contenders_are_right(name):
    assert check_small(Case("test", name, "dense" if name in DENSE else "bigbird(2, 1, 1)", 512, 32, D=32, dtype="float32"), "cpu") < 1e-4


def test_flex_lists_are_the_layouts():
    layout = P.bigbird(2, 1, 2).layout(1024, block=64)
    keep = torch.ones(layout.visible, dtype=torch.bool)
    count, index = packed(layout.row_ptr, layout.row_cols, keep, layout.nQ)
    assert [index[0, 0, r, :count[0, 0, r]].tolist() for r in range(layout.nQ)] == [layout.row(r).tolist() for r in range(layout.nQ)]
