"Tests of 18c_roofline. Generated from nbs/18c_roofline.ipynb: edit that, then run pythia_book build."
from itertools import product
from pythia_nb import patterns as P
from pythia_nb.roofline import fetched_blocks
from pythia_nb.tensor_cores import Tile


def test_fetched_blocks_are_the_union_of_a_group():
    for block, BM, backward in product((16, 32, 64), (32, 64, 128), (False, True)):
        layout = P.bigbird(2, 1, 2).layout(512, block=block)
        seen = layout.codes()[0] > 0
        if backward: seen = seen.T
        group = max(1, BM // block)
        union = seen.view(-1, group, seen.shape[1]).any(1).sum().item()
        assert fetched_blocks(layout, Tile(BM, 16, 16, 1, 1), backward) == union * max(1, block // BM)
