"Tests of 02a_pictures. Generated from nbs/02a_pictures.ipynb: edit that, then run pythia_book build."
import matplotlib.pyplot as plt
import numpy as np
from pathlib import Path
from pythia_nb.pictures import BLOCKS, CYCLE, GREY, band, book_style, density_limit, length_axis, look, roofline


BLINDNESS = {
    "all three cones": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "no red cones": [[.152286, 1.052583, -.204868], [.114503, .786281, .099216], [-.003882, -.048116, 1.051998]],
    "no green cones": [[.367322, .860646, -.227968], [.280085, .672501, .047413], [-.011820, .042940, .968881]],
    "no blue cones": [[1.255528, -.076749, -.178779], [-.078411, .930809, .147602], [.004733, .691367, .303900]]}
TURNED = np.array([[-.574, 1.43, .144], [.426, .43, .144], [.426, 1.43, -.856]])    # CSS's hue-rotate(180deg)

def rgb(colour): return np.array([int(colour[i:i + 2], 16) for i in (1, 3, 5)]) / 255

def linear(c): return np.where(c <= .04045, c / 12.92, ((c + .055) / 1.055)**2.4)    # light instead of the number that a screen gets

def dark(c): return (TURNED @ (.91 - .82 * c)).clip(0, 1)    # invert(.91) sends 0 to .91 and 1 to .09

def contrast(a, b): # WCAG's, of two colours as numbers for a screen
    low, high = sorted(float(np.array([.2126, .7152, .0722]) @ linear(c)) for c in (a, b))
    return (high + .05) / (low + .05)

def oklab(light):
    cones = np.array([[.4122214708, .5363325363, .0514459929], [.2119034982, .6806995451, .1073969566], [.0883024619, .2817188376, .6299787005]]) @ light.clip(0, 1)
    return np.array([[.2104542553, .7936177850, -.0040720468], [1.9779984951, -2.4285922050, .4505937099], [.0259040371, .7827717662, -.8086757660]]) @ np.cbrt(cones)

def nearest(colours, matrix): # the smallest distance of two colours, 100 from black to white
    seen = [oklab(np.array(matrix) @ linear(rgb(c))) for c in colours]
    return min(100 * float(np.linalg.norm(a - b)) for i, a in enumerate(seen) for b in seen[:i])


def test_colours_are_safe():
    white = rgb("#FFFFFF")
    for colour in (*CYCLE, GREY): assert contrast(rgb(colour), white) >= 3 and contrast(dark(rgb(colour)), dark(white)) >= 3, colour
    for who, matrix in BLINDNESS.items():
        assert nearest(CYCLE, matrix) >= 8 and nearest([BLOCKS[k] for k in ("hidden", "partial", "full", "now")], matrix) >= 8, who
    assert nearest(["#AA4499", "#56799A"], BLINDNESS["no green cones"]) < 1    # two that look apart to most: the test can fail


def test_the_explorer_has_the_books_colours():
    script = (Path(__file__).parent.parent / "nbs/assets/explorer.js").read_text()
    assert all(BLOCKS[kind].lower() in script for kind in ("hidden", "partial", "full", "edge"))

def test_the_style_has_the_books_colours():
    plt.rcdefaults()
    with book_style(): cycle = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    assert [colour.lstrip("#") for colour in cycle] == [colour.lstrip("#") for colour in CYCLE] != plt.rcParams["axes.prop_cycle"].by_key()["color"]


def test_helpers_draw_what_they_are_given():
    ax = plt.subplots()[1]
    density_limit(ax, [1024, 2048], [10, 40], [.5, .25])
    band(ax, [0, 1], [[1, 2], [3, 6]], **look("dense"))
    limit, mean = ax.get_lines()
    assert list(limit.get_ydata()) == [5, 10] and limit.get_linestyle() == ":" and list(mean.get_ydata()) == [2, 4]
    length_axis(ax, [2048, 1024, 2048])
    assert list(ax.get_xticks()) == [1024, 2048] and [t.get_text() for t in ax.get_xticklabels()] == ["1k", "2k"]
    ax = plt.subplots()[1]
    roofline(ax, 100e12, {"memory": 1e12, "cache": 4e12}, (10, 1000))
    flat, slow, fast = (line.get_xydata().tolist() for line in ax.get_lines())
    assert flat == [[25, 100], [1000, 100]] and slow == [[10, 10], [100, 100]] and fast == [[10, 40], [25, 100]]
    plt.close("all")
