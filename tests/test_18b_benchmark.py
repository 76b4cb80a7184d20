"Tests of 18b_benchmark. Generated from nbs/18b_benchmark.ipynb: edit that, then run pythia_book build."
import json
import os
import pytest
import torch
from concurrent.futures.process import BrokenProcessPool
from pythia_nb.benchmark import compile_ahead, measure, run
from pythia_nb.contenders import CONTENDERS, Case


def test_an_interrupted_run_continues(tmp_path, monkeypatch):
    import pythia_nb.benchmark as b
    cases = [Case("peers", "pythia_nb", "local(2)", L, dtype="float32", H=1, D=32) for L in (128, 256, 512)]
    monkeypatch.setattr(b, "plan", lambda *args: cases)
    monkeypatch.setattr(b, "measure_limits", lambda *args: dict(flops=1e11, bytes=1e10))
    real, calls = b.measure, []
    def breaks(case, *rest):
        calls.append(case.L)
        if len(calls) == 2: raise KeyboardInterrupt
        return real(case, *rest)
    monkeypatch.setattr(b, "measure", breaks)
    with pytest.raises(KeyboardInterrupt): run(tmp_path / "r.json", "cpu", "float32", True)
    assert [r["L"] for r in json.loads((tmp_path / "r.json").read_text())["rows"]] == [128]
    results = run(tmp_path / "r.json", "cpu", "float32", True, say=lambda text: None)
    assert calls == [128, 256, 256, 512] and [r["L"] for r in results["rows"]] == [128, 256, 512] and list(tmp_path.iterdir()) == [tmp_path / "r.json"]
    with pytest.raises(ValueError, match="move this one away"): run(tmp_path / "r.json", "cpu", "bfloat16", True)


def test_compiling_ahead_is_shared_out_and_may_fail(monkeypatch):
    class Pool:
        def __init__(self, workers, context): self.workers, self.method = workers, context.get_start_method()
        def __enter__(self): return self
        def __exit__(self, *err): return False
        def map(self, fn, cases):
            done.append((self.workers, self.method, fn.__name__, [c.name for c in cases]))
            if broken: raise BrokenProcessPool
            return []
    cases, done, said = [Case("peers", n, "local", L) for n in ("pythia_nb", "flex", "flash") for L in (2048, 8192)], [], []
    monkeypatch.setitem(compile_ahead.__globals__, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (80e9, 80e9))
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    for broken in (False, True): compile_ahead(cases, said.append)
    assert done == [(3, "spawn", "compile_case", ["flex", "flex", "pythia_nb"])] * 2 and "broke off" in said[1]
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    compile_ahead(cases, said.append)
    assert len(done) == 2    # with one core each is compiled where it is needed


def test_a_wrong_contender_is_not_timed(monkeypatch):
    monkeypatch.setitem(CONTENDERS, "wrong", lambda case, layout: lambda q, k, v: v * q.sum() * 0 + 1)
    row = measure(Case("test", "wrong", "local(2)", 256, dtype="float32"), "cpu", 0.01)
    assert "off by" in row["failed"] and "forward_ms" not in row
