"Tests of 06_cpu. Generated from nbs/06_cpu.ipynb: edit that, then run pythia_book build."
import ctypes
import math
import os
import pytest
import subprocess
import sys
import torch
from pathlib import Path
from pythia_nb import patterns as P
from pythia_nb.cpu import (
    BuildError, EXP, HEAD, SETTINGS, VECTORS, compiled, compiler, cpu_forward, cpu_kernel, intact, openmp_runtime,
    target,
)
from pythia_nb.reference import attention_oracle, errors, low_precision_reference


TINY = 'extern "C" int answer() { return 41 + 1; }'
def answer(): return ctypes.CDLL(str(compiled(TINY))).answer()

def test_a_corrupted_file_is_rebuilt(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHIA_NB_CACHE", str(tmp_path))
    assert answer() == 42
    path = compiled(TINY)
    whole = path.read_bytes()
    for broken in (whole[:1000], whole[:-1], b"", whole[:500] + b"x" + whole[501:]):
        damaged = tmp_path / "damaged"
        damaged.write_bytes(broken)
        os.replace(damaged, path)
        assert not intact(path) and intact(compiled(TINY)) and answer() == 42

RACE = '''
import ctypes, sys
from pythia_nb.cpu import compiled
print(ctypes.CDLL(str(compiled(sys.argv[1]))).answer())
'''

def test_two_processes_may_start_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHIA_NB_CACHE", str(tmp_path))
    both = [subprocess.Popen([sys.executable, "-c", RACE, TINY], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [p.communicate()[0].strip() for p in both] == ["42"] * 3
    assert [f.suffix for f in tmp_path.iterdir()] == [".so"]


def test_a_missing_or_failing_compiler_gets_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHIA_NB_CACHE", str(tmp_path))
    with pytest.raises(BuildError, match="failed: .*error") as error: compiled("this is no code")
    assert "\n" not in str(error.value)
    monkeypatch.setenv("PATH", str(tmp_path)); monkeypatch.delenv("CXX", raising=False)
    compiler.cache_clear(); target.cache_clear()
    with pytest.raises(BuildError, match="no C\\+\\+ compiler; install one"): compiled(TINY)
    monkeypatch.undo()
    compiler.cache_clear(); target.cache_clear()
    monkeypatch.setenv("PYTHIA_NB_CACHE", "/dev/null/cache")
    with pytest.raises(BuildError, match="name another folder"): compiled(TINY)


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
from pythia_nb.cpu import bf16_products, cpu_forward
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
