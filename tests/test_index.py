"Tests of index. Generated from nbs/index.ipynb: edit that, then run pythia_book build."
import json
import pythia_nb
import subprocess
import sys


def test_public_names():
    script = "import pythia_nb, pythia_nb.train, sys; assert all(getattr(pythia_nb, name) is not None for name in pythia_nb.__all__) and pythia_nb.__version__; " \
             "assert 'matplotlib' not in sys.modules and 'transformers' not in sys.modules; pythia_nb.patterns.local(2).layout(256)"
    subprocess.run([sys.executable, "-c", script], check=True)


def gpu_results(folder):
    "The GPU's figures, as {device, torch, dtype, heads, rows, source}: from the benchmark suite where it ran on one, else from the kernels' own tables"
    own, ran = json.loads((folder / "h200/cuda.json").read_text()), [p for p in (folder / "h200/suite.json", folder / "h100/suite.json") if p.exists()]
    if not ran: return own | dict(source="ours and FlashAttention-2's measured in one run, FlexAttention's in an earlier one with the same script")
    suite, names = json.loads(ran[0].read_text()), dict(pythia_nb="ours", flash="fa2")
    rows = [{k: r[k] for k in ("pattern", "D", "L", "B", "density")} | dict(name=names.get(r["name"], r["name"]), block=r["block"] if r["name"] in ("pythia_nb", "flex") else None)
            | {f"{way}_ms": r.get(f"{way}_ms") for way in ("forward", "backward")}
            | {f"{way}_tflops": r[f"{way}_flops"] / r[f"{way}_ms"] / 1e9 if f"{way}_ms" in r else None for way in ("forward", "backward")}
            for r in suite["rows"] if r["group"] == "peers" and "failed" not in r]
    source = "all measured in one run of the benchmark suite"
    if any(r.get("run") == "earlier" for r in suite["rows"]): source = "measured in one run of the benchmark suite, FlexAttention at blocks of 128 in an earlier run on a card of the same kind"
    if not any(r["name"] == "flex" and r["L"] == 32768 for r in rows):    # the suite was interrupted before it came to them
        rows, source = rows + [r for r in own["rows"] if r["name"] == "flex"], "measured in one run of the benchmark suite, FlexAttention in an earlier run on a card of the same kind"
    return {k: suite["about"][k] for k in ("device", "torch", "dtype")} | dict(heads=own["heads"], rows=rows, source=source)


def test_gpu_figures_come_from_the_suite_where_it_ran(tmp_path):
    flex = dict(name="flex", pattern="local", D=64, L=32768, B=1, block=128, density=.1, forward_ms=3., backward_ms=6., forward_tflops=1., backward_tflops=2.)
    own = dict(device="H200", torch="2.11", dtype="bfloat16", heads=8, rows=[flex])
    for name in ("h100", "h200"): (tmp_path / name).mkdir()
    (tmp_path / "h200/cuda.json").write_text(json.dumps(own))
    assert "FlashAttention-2's" in gpu_results(tmp_path)["source"]
    row = dict(group="peers", name="flash", pattern="dense", D=64, L=32768, B=1, block=128, density=1.0, forward_ms=2.0, forward_flops=4e12)
    rows = [row, row | dict(name="pythia_nb", pattern="local", backward_ms=4.0, backward_flops=1e12), row | dict(failed="out of memory"), row | dict(group="lengths")]
    (tmp_path / "h100/suite.json").write_text(json.dumps(dict(about=dict(device="H100", torch="2.12", dtype="bfloat16"), rows=rows)))
    got = gpu_results(tmp_path)
    assert [(r["name"], r["block"], r["forward_tflops"], r["backward_tflops"]) for r in got["rows"]] == [("fa2", None, 2000, None), ("ours", 128, 2000, 250), ("flex", 128, 1, 2)]
    assert "earlier run" in got["source"]
    assert got["device"] == "H100" and got["torch"] == "2.12" and got["heads"] == 8 and "suite" in got["source"]
    (tmp_path / "h100/suite.json").write_text(json.dumps(dict(about=dict(device="H100", torch="2.12", dtype="bfloat16"), rows=rows + [row | dict(name="flex", block=64)])))
    assert [r["name"] for r in gpu_results(tmp_path)["rows"]] == ["fa2", "ours", "flex"] and "all measured" in gpu_results(tmp_path)["source"]
