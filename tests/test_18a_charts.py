"Tests of 18a_charts. Generated from nbs/18a_charts.ipynb: edit that, then run pythia_book build."
import matplotlib.pyplot as plt
import pytest
from pythia_nb.charts import density_chart, draw_charts, length_chart, report, roofline_chart
from pythia_nb.contenders import Case


def made_up_results():
    "A result file of three contenders at two lengths: dense quadratic, ours at half the density limit"
    def row(name, pattern, L, density, ms, **more):
        return Case("lengths", name, pattern, L).__dict__ | dict(density=density, forward_ms=ms, backward_ms=2 * ms, forward_memory=L * 10, training_memory=L * 1000,
                                                                forward_flops=L * 1e6, backward_flops=L * 2e6, forward_bytes=L * 1e4, backward_bytes=L * 2e4) | more
    lengths = [row(name, p, L, d, ms * L / 1024) for L in (1024, 2048) for name, p, d, ms in (("dense", "dense", 1, 9), ("flash", "dense", 1, 3), ("pythia_nb", "bigbird", .25, .5))]
    others = [r | dict(group=group) for group in ("peers", "densities", "patterns") for r in lengths[3:]]
    return dict(about=dict(device="made up", torch="0", threads=1, dtype="float32"), limits=dict(flops=1e12, bytes=1e10, product="2 x 2 x 2"), rows=lengths + others)

def test_charts_draw_what_was_measured():
    results = made_up_results()
    time, memory = length_chart(results).axes
    lines = {line.get_label(): list(line.get_ydata()) for line in time.get_lines()}
    assert lines == {"dense, scores stored": [27, 54], "flash, dense": [9, 18], "pythia_nb, bigbird": [1.5, 3], "density limit": [2.25, 4.5]}
    assert {line.get_label(): list(line.get_ydata()) for line in memory.get_lines()}["density limit"] == pytest.approx([.256, .512])
    assert density_chart(results).get_title() == "Faster than the fastest dense attention (flash) at every measured density, up to 25%"
    assert "flash, backward" in roofline_chart(results).get_legend_handles_labels()[1]
    plt.close("all")

def test_report_and_files(tmp_path):
    results = made_up_results()
    results["rows"] += [Case("peers", "fa4", "dense", 8).__dict__ | dict(failed="no such thing"), results["rows"][0] | dict(no_backward="out of memory")]
    text = report(results)
    assert "made up" in text and "no such thing" in text and "backward out of memory" in text and text.count("| pythia_nb |") == 5
    assert draw_charts(results, tmp_path) == ["lengths.png", "densities.png", "roofline.png"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["densities.png", "lengths.png", "roofline.png"]
