"Tests of 11a_cpu_speed. Generated from nbs/11a_cpu_speed.ipynb: edit that, then run pythia_book build."
import json
from pathlib import Path


RESULTS = Path(__file__).parent.parent / "nbs/results/cpu" if "__file__" in globals() else Path("results/cpu")

def result_rows(name): return json.loads((RESULTS / f"{name}.json").read_text())["rows"]

def test_measured_times_are_within_the_density_limit():
    for name in ("limit_fp32", "limit_bf16"):
        for r in result_rows(name):
            need = 1 if r["density"] == 1 else 0.9
            assert need * r["forward"] <= r["density"] * r["sdpa_forward"] and 0.9 * r["training"] <= r["density"] * r["sdpa_training"], r

def test_measured_gains():
    assert all(r["flex"] >= 1.3 * r["ours"] for r in result_rows("flex"))
    least = {128: 2.4, 256: 3.0, 512: 4.0}
    for r in result_rows("short"):
        dense, sdpa, ours = r["forward"]
        assert dense >= least[r["L"]] * ours and sdpa >= ours, r
        assert all(r[key][2] <= 0.75 * r[key][0] for key in ("memory_forward", "memory_training")), r
    assert all(r[key][0] >= 1.7 * r[key][1] for r in result_rows("threads") for key in ("forward", "training"))
    fp32, bf16 = ([r for r in result_rows("threads") if r["dtype"] == dtype] for dtype in ("float32", "bfloat16"))
    assert len(fp32) == len(bf16) == 3 and all(a["forward"][1] >= 1.2 * b["forward"][1] for a, b in zip(fp32, bf16))
