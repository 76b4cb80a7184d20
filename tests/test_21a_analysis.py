"Tests of 21a_analysis. Generated from nbs/21a_analysis.ipynb: edit that, then run pythia_book build."
import torch
from pythia_nb.analysis import block_mass
from pythia_nb.model import dense_attention


def test_mass_is_what_the_model_attends():
    torch.manual_seed(0)
    q, k = torch.randn(2, 3, 32, 8), torch.randn(2, 3, 32, 8)
    p = dense_attention(q, k, torch.eye(32).expand(2, 3, 32, 32))    # the identity as values gives the probabilities
    expected = torch.stack([torch.stack([p[:, :, 8 * i:8 * i + 8, 8 * j:8 * j + 8].sum(-1).mean((0, 2)) for j in range(4)], -1) for i in range(4)], 1)
    assert torch.allclose(block_mass(q, k, 8), expected, atol=1e-6)
