"Tests of 18b_benchmark. Generated from nbs/18b_benchmark.ipynb: edit that, then run pythia_book build."
import json
import pytest
from pythia_nb.benchmark import measure, run
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


def test_a_wrong_contender_is_not_timed(monkeypatch):
    monkeypatch.setitem(CONTENDERS, "wrong", lambda case, layout: lambda q, k, v: v * q.sum() * 0 + 1)
    row = measure(Case("test", "wrong", "local(2)", 256, dtype="float32"), "cpu", 0.01)
    assert "off by" in row["failed"] and "forward_ms" not in row
