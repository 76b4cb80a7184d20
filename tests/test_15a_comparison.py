"Tests of 15a_comparison. Generated from nbs/15a_comparison.ipynb: edit that, then run pythia_book build."
import math
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pythia_nb import patterns as P
from pythia_nb.comparison import loss_run, materialised_attention, time_step
from pythia_nb.tokens import write_tokens


def test_loss_run(tmp_path):
    rng = np.random.default_rng(0)
    tokens = write_tokens(tmp_path/"toy", [(rng.integers(1, 99) + np.arange(200)) % 99 + 1 for _ in range(150)], 100)
    rows = [loss_run(tokens, 100, 512, name, 0, 6 * 1024, size="1m", step_tokens=1024, device="cpu") for name in ("dense", "local")]
    assert [r["steps"] for r in rows] == [6, 6] and rows[0]["density"] == 1 > rows[1]["density"]
    assert rows[0]["val"][0] == pytest.approx([0, math.log(100)], abs=0.4) and rows[0]["val"][-1][1] < rows[0]["val"][0][1]


def test_time_step_and_materialised_attention():
    row = time_step(128, 2, P.local(2), block=16, vocab_size=100, size="1m", compile=False, steps=2, warmup=1, device="cpu")
    assert row["tokens_per_s"] == pytest.approx(256 / row["seconds"]) and 0 < row["density"] < 1 and row["mfu"] is None
    q, k, v = torch.randn(3, 2, 4, 33, 16)
    torch.testing.assert_close(materialised_attention(q, k, v), F.scaled_dot_product_attention(q, k, v, is_causal=True))
