"Tests of 00a_rotary. Generated from nbs/00a_rotary.ipynb: edit that, then run pythia_book build."
import pytest
import torch
from pythia_nb.config import PythiaConfig
from pythia_nb.rotary import SCALINGS, apply_rotary, rotary_frequencies, rotary_tables
from transformers import GPTNeoXConfig
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding, apply_rotary_pos_emb


def test_ntk_ends():
    "ntk keeps the fastest plane and divides the slowest by the factor."
    config = PythiaConfig(rotary_pct=1.0)
    plain, _ = rotary_frequencies(config)
    scaled, magnitude = rotary_frequencies(PythiaConfig(rotary_pct=1.0, rope_scaling={"type": "ntk", "factor": 8.0}))
    assert scaled[0] == plain[0] and magnitude == 1.0
    assert scaled[-1].item() * 8 == pytest.approx(plain[-1].item(), rel=1e-5)
    assert (scaled[1:] < plain[1:]).all()


@pytest.mark.parametrize("scaling", [None, *SCALINGS])
@pytest.mark.parametrize("rotary_pct", [0.25, 1.0])
def test_rotation_equals_transformers(scaling, rotary_pct):
    "Frequencies, the factor on cosine and sine, and rotated queries."
    config = PythiaConfig(hidden_size=128, num_heads=2, rotary_pct=rotary_pct, max_position_embeddings=256,
                          rope_scaling=scaling)
    rope = {"rope_type": "default", "rope_theta": config.rotary_base, "partial_rotary_factor": rotary_pct}
    rope |= {"rope_type" if k == "type" else k: v for k, v in (scaling or {}).items()}
    theirs = GPTNeoXRotaryEmbedding(GPTNeoXConfig(hidden_size=128, num_attention_heads=2, max_position_embeddings=256,
                                                  rope_parameters=rope))
    theta, magnitude = rotary_frequencies(config)
    assert torch.allclose(theta, theirs.inv_freq, rtol=1e-6)
    assert magnitude == pytest.approx(theirs.attention_scaling)
    q, positions = torch.randn(2, 2, 151, 64), torch.arange(151)
    expected, _ = apply_rotary_pos_emb(q, q, *theirs(q, positions[None]))
    assert torch.allclose(apply_rotary(q, *rotary_tables(config, positions)), expected, atol=1e-5)
