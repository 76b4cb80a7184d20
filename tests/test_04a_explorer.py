"Tests of 04a_explorer. Generated from nbs/04a_explorer.ipynb: edit that, then run pythia_book build."
from pythia_nb import patterns as P
from pythia_nb.explorer import costs


def test_costs_count_the_visible_pairs():
    for pattern, L, block in ((P.bigbird(2, 1, 2), 512, 32), (P.local(3), 256, 64), (P.fixed(4, 1), 512, 16)):
        layout = pattern.layout(L, block=block)
        pairs = layout.token_mask().sum().item()    # a diagonal block shows (N + 1) / 2 of its N keys to a query, counted as N / 2
        rows = layout.nQ * block / 2
        assert costs(layout, heads=3, head_dim=16)["operations"] == 4 * 16 * 3 * (pairs - rows)
