"Tests of 18_contenders. Generated from nbs/18_contenders.ipynb: edit that, then run pythia_book build."
import importlib.util
import pytest
import sys
import torch
import types
from dataclasses import replace
from pythia_nb import patterns as P
from pythia_nb.contenders import Case, DENSE, available, check_once, check_small, installed, measure_attention, packed
from torch.nn import functional as F


@pytest.mark.parametrize("name", ["pythia_nb", "pythia_nb torch", "dense", "flash", "math"])
def test_contenders_are_right(name):
    assert check_small(Case("test", name, "dense" if name in DENSE else "bigbird(2, 1, 1)", 512, 32, D=32, dtype="float32"), "cpu") < 1e-4


def _stands_in(q, k, v, causal): return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

def test_flash_attention_4_is_called_as_it_wants(monkeypatch):
    def flash_attn_func(q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False, window_size=(None, None), **rest):
        assert q.shape == (1, 512, 8, 32) and not rest    # [B, L, H, D]
        return _stands_in(*(t.transpose(1, 2) for t in (q, k, v)), causal).transpose(1, 2), None    # with lse, as it does
    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace())
    monkeypatch.setitem(sys.modules, "flash_attn.cute", types.SimpleNamespace(flash_attn_func=flash_attn_func))
    assert check_small(Case("test", "fa4", "dense", 512, 32, D=32, dtype="float32"), "cpu") < 1e-4


def test_flashinfer_is_called_as_it_wants(monkeypatch):
    def single_prefill_with_kv_cache(q, k, v, scale_q=None, causal=False, kv_layout="NHD", **rest):
        assert q.shape == (512, 8, 32) and k.shape == v.shape == (8, 512, 32) and kv_layout == "HND" and not rest
        return _stands_in(q.detach().transpose(0, 1), k.detach(), v.detach(), causal).transpose(0, 1)    # it knows no gradients
    monkeypatch.setitem(sys.modules, "flashinfer", types.SimpleNamespace(single_prefill_with_kv_cache=single_prefill_with_kv_cache))
    case = Case("test", "flashinfer", "dense", 512, 32, D=32, dtype="float32")
    row = measure_attention(case, "cpu", 0.01)
    assert row["error"] < 1e-4 and row["forward_ms"] > 0 and "backward_ms" not in row
    with pytest.raises(ValueError, match="one sequence"): measure_attention(replace(case, B=2), "cpu", 0.01)


def test_optional_contenders_take_part_where_they_are(monkeypatch):
    assert not installed("no_such_package.inside") and installed("torch.nn")
    there = set()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in there else None)
    assert not {"fa4", "flashinfer"} & set(available("cuda"))
    there |= {"flash_attn.cute", "flashinfer"}
    assert {"fa4", "flashinfer"} <= set(available("cuda")) and not {"fa4", "flashinfer"} & set(available("cpu"))


def test_a_backward_pass_without_memory_keeps_the_forward(monkeypatch):
    def fails(*args): raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setitem(measure_attention.__globals__, "measure_backward", fails)
    row = measure_attention(Case("peers", "pythia_nb", "local(2)", 256, dtype="float32"), "cpu", 0.01)
    assert row["forward_ms"] > 0 and row["no_backward"] == "out of memory" and "failed" not in row


@pytest.mark.slow
def test_flex_is_right_on_a_cpu_where_it_has_no_gradients():
    assert check_once(Case("test", "flex", "bigbird(2, 1, 1)", 512, 64, dtype="float32"), "cpu") is False


def test_flex_lists_are_the_layouts():
    layout = P.bigbird(2, 1, 2).layout(1024, block=64)
    keep = torch.ones(layout.visible, dtype=torch.bool)
    count, index = packed(layout.row_ptr, layout.row_cols, keep, layout.nQ)
    assert [index[0, 0, r, :count[0, 0, r]].tolist() for r in range(layout.nQ)] == [layout.row(r).tolist() for r in range(layout.nQ)]
