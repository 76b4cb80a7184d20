"Tests of 06_cpu. Generated from nbs/06_cpu.ipynb: edit that, then run pythia_book build."
import ctypes
import math
import pytest
import subprocess
import sys
import torch
from pathlib import Path
from pythia_nb import patterns as P
from pythia_nb.cpu import EXP, HEAD, SETTINGS, VECTORS, cpu_forward, cpu_kernel
from pythia_nb.native import compiled, openmp_runtime, target
from pythia_nb.reference import attention_oracle, errors, low_precision_reference


POWERS = """
extern "C" void powers(const float* x, float* y, int n) { for (int i = 0; i < n; i += W) store(y + i, exp2(load(x + i))); }
"""

def test_the_exponential_is_as_good_as_its_type():
    source = "".join([SETTINGS.format(D=64, bf16=0), HEAD, VECTORS, EXP, POWERS])
    x = torch.cat([torch.linspace(-125, 3, 2**16), torch.tensor([0., -1., -500., -math.inf, math.nan] + 11 * [-300.])])
    y = torch.empty_like(x)
    ctypes.CDLL(str(compiled(source))).powers(ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()), len(x))
    exact = torch.exp2(x.double())
    assert ((y.double() - exact).abs() <= 2e-7 * exact)[:2**16].all()
    assert y[2**16:2**16 + 4].tolist() == [1, 0.5, 0, 0] and y[2**16 + 4].isnan() and (y[-11:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("N", [16, 32, 64, 128])
def test_forward_within_budget(N, dtype):
    for L, S, causal in [(4 * N, 4 * N, True), (3 * N - 5, 4 * N + 3, True), (N + 1, 2 * N, False), (2 * N, N + 7, True), (1, 3 * N + 2, True)]:
        layout = P.per_head([P.bigbird(1, 1, 1), P.strided(2), P.local(2)]).layout(L, S, N, causal)
        q, k, v = (torch.randn(2, 3, n, 64).to(dtype) for n in (L, S, S))
        poison = torch.full((1 << 22,), math.nan); del poison
        o, lse = cpu_forward(q, k, v, layout, 0.125, None, None)
        exact_o, exact_lse = attention_oracle(q, k, v, layout)
        reference = low_precision_reference(q, k, v, torch.zeros_like(q), None, layout)
        assert errors(o, exact_o)["max"] <= 2 * errors(reference["o"], exact_o)["max"] + torch.finfo(dtype).eps * exact_o.abs().max()
        assert errors(lse, exact_lse)["max"] <= 1e-5 * (1 + exact_lse[exact_lse.isfinite()].abs().max() if exact_lse.isfinite().any() else 1)


def test_not_a_number_in_is_not_a_number_out():
    layout = P.local(2).layout(64, block=16)
    q, k, v = torch.randn(3, 1, 1, 64, 32)
    k[0, 0, 20] = math.nan
    o, _ = cpu_forward(q, k, v, layout, 0.2, None, None)
    assert o[0, 0, 20:48].isnan().all() and o[0, 0, :20].isfinite().all() and o[0, 0, 48:].isfinite().all()


def test_one_pool_of_threads():
    if openmp_runtime() is None: pytest.skip("PyTorch's OpenMP runtime is not one that this compiler's code can use")
    cpu_kernel("forward", 64, False)
    files = {line.split(maxsplit=5)[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line}
    assert len(runtimes := {file for file in files if Path(file).name.startswith(("libgomp", "libiomp", "libomp"))}) == 1, runtimes


PORTABLE = """
import sys, torch
from pythia_nb import patterns as P
from pythia_nb.cpu import cpu_forward
from pythia_nb.native import bf16_products
from pythia_nb.reference import attention_oracle
assert not bf16_products()
layout = P.bigbird(1, 1, 1).layout(150, block=32)
for D in (32, 80):
    q, k, v = torch.randn(3, 1, 2, 150, D)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        o, lse = cpu_forward(q.to(dtype), k.to(dtype), v.to(dtype), layout, 0.2, None, None)
        torch.testing.assert_close(o.double(), attention_oracle(q.to(dtype), k.to(dtype), v.to(dtype), layout, scale=0.2)[0], atol=tolerance, rtol=tolerance)
"""

@pytest.mark.parametrize("flags", ["-march=x86-64-v3", "-march=x86-64"])
def test_paths_for_other_processors(flags, monkeypatch):
    if "__x86_64__" not in target() or "__AVX2__" not in target(): pytest.skip("needs an x86 processor with AVX2")
    monkeypatch.setenv("PYTHIA_NB_CXXFLAGS", flags)
    subprocess.run([sys.executable, "-c", PORTABLE], check=True)
