"Tests of 07b_exact_sums. Generated from nbs/07b_exact_sums.ipynb: edit that, then run pythia_book build."
import math
import pytest
import torch
from pythia_nb.cuda_basics import HEAD_DIMS, check_compiles
from pythia_nb.cuda_forward import kernel_source
from pythia_nb.exact_sums import AROUND_TILE, PREPARE, dq_units


def head_gradients(n, D=64, spike=1.):
    "One causal head in fp64: do, k, v, and ds, whose product with k is dQ; one value is `spike` times as large"
    q, k, v, do = torch.randn(4, n, D, dtype=torch.float64)
    v[n // 2] *= spike
    p = (q @ k.T * D**-0.5).masked_fill(torch.ones(n, n).triu(1).bool(), -math.inf).softmax(1)
    dp = do @ v.T
    return do, k, v, p * (dp - (p * dp).sum(1, keepdim=True))

def test_no_sum_of_a_part_of_the_keys_leaves_its_bound():
    do, k, v, ds = head_gradients(200)
    R, C = dq_units(do, torch.zeros(200, dtype=torch.float64), k, v)
    for _ in range(20):
        some = torch.rand(200) < torch.rand(())
        assert (ds[:, some] @ k[some]).abs().le(R * C * (1 << 30)).all()

def test_whole_numbers_have_the_same_sum_in_any_order():
    do, k, v, ds = head_gradients(256)
    R, C = dq_units(do, torch.zeros(256, dtype=torch.float64), k, v)
    tiles = torch.stack([ds[:, j:j + 32] @ k[j:j + 32] for j in range(0, 256, 32)])
    whole, narrow = (tiles / (R * C)).round().int(), tiles.float()
    one, other = torch.randperm(8), torch.arange(8)
    assert torch.equal(sum(whole[i] for i in one), sum(whole[i] for i in other))
    assert not all(torch.equal(sum(narrow[i] for i in torch.randperm(8)), sum(narrow[i] for i in other)) for _ in range(20))


@pytest.mark.parametrize("D", HEAD_DIMS)
def test_the_kernel_compiles_without_spills(D): check_compiles(kernel_source(PREPARE, D, 64, AROUND_TILE))
