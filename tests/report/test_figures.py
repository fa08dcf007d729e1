"""Figures of formats: what is drawn is what a format does."""

import itertools
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qexp.jobs import compose_jobs
from qexp.quant.codebooks import Binary, KMeans, NormalFloat, PowerOfTwo
from qexp.quant.grid import CONVENTIONS, IntegerGrid
from qexp.quant.level_list import Levels
from qexp.quant.minifloat import Minifloat
from qexp.quant.recipe import Scheme
from qexp.quant.rounding import Ceil, Floor, HalfAway, HalfEven, Stochastic, TowardZero
from qexp.report import formats, levels_table

figures = pytest.importorskip("qexp.report.figures")

ROOT = Path(__file__).parents[2]
QUANTIZERS = sorted(path.stem for path in (ROOT / "conf" / "quantizer").glob("*.yaml"))
GRIDS = [
    *(IntegerGrid(3, convention) for convention in CONVENTIONS),
    IntegerGrid(8, "affine", "power_of_two"), Binary(), PowerOfTwo(4), PowerOfTwo(3, signed=False), NormalFloat(4),
    KMeans(3), Minifloat(2, 1, "none", "e8m0"), Minifloat(5, 2, "ieee"),
    Levels(values=(-1, 0, 0.5, 2), thresholds=(-0.9, 0.1, 0.5)), Levels(values=(-3, -1, -0.5)),
]  # fmt: skip
ROUNDINGS = [HalfEven(), HalfAway(), Floor(), Ceil(), TowardZero()]
# Every format as engines round, and some in every way of rounding.
DRAWN = [(grid, HalfEven()) for grid in GRIDS]
DRAWN += [(grid, rounding) for grid in (GRIDS[1], NormalFloat(4)) for rounding in ROUNDINGS[1:]]


def lines(axes, label: str) -> list:
    return [line for line in axes.get_lines() if line.get_label() == label]


def chosen(quantizer: str, tmp_path: Path):
    words = [f"quantizer={quantizer}"]
    if quantizer == "levels":
        (tmp_path / "my.txt").write_text("-1\n0\n2\n")
        words.append(f"quantizer.weight.file={tmp_path / 'my.txt'}")
    return compose_jobs(words, multirun=False)[0].settings.recipe


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_every_quantizer_draws(quantizer, tmp_path):
    recipe = chosen(quantizer, tmp_path)
    schemes = {"weights": recipe.weight, "activations": recipe.activation}
    views = {name: formats.view(scheme.grid, scheme.rounding) for name, scheme in schemes.items()}
    assert levels_table.formats_table(recipe, views).row_count >= 11
    if recipe.activation.grid == IntegerGrid(8, "affine") and quantizer != "int8":
        del schemes["activations"], views["activations"]  # drawn once
    sample = formats.weight_sample(0)[:500]
    pairs = {name: formats.symmetric_and_affine(scheme) for name, scheme in schemes.items()}
    fits = {name: [formats.fit(sample, scheme) for scheme in pair] for name, pair in pairs.items()}
    for figure in figures.staircases(views), figures.histograms(fits):
        figure.set_layout_engine("none")  # which takes the time
        figures.save(figure, tmp_path / "figure.png", dpi=10)


@pytest.mark.parametrize(("grid", "rounding"), DRAWN, ids=str)
def test_the_staircase_is_what_the_format_does_and_steps_at_the_thresholds(grid, rounding):
    view = formats.view(grid, rounding)
    (top, bottom) = figures.staircases({"weights": view}).axes[:2]
    for panel in top, *top.child_axes:
        (line,) = lines(panel, "Q(r)")
        r, q = (torch.tensor(data) for data in (line.get_xdata(), line.get_ydata()))
        assert r.dtype == torch.float32
        assert torch.equal(q, grid.decode(grid.encode(r, view.qparams, rounding), view.qparams))
    (stairs,) = lines(top, "Q(r)")
    (error,) = lines(bottom, "Q(r)")
    assert (error.get_ydata() == stairs.get_ydata() - stairs.get_xdata()).all()
    require_steps_at_thresholds(view, *stairs.get_data())


def require_steps_at_thresholds(view, r, q) -> None:
    assert sorted(set(q.tolist())) == view.levels.tolist()
    assert len(view.thresholds) == len(view.levels) - 1
    where = [(a, b) for (a, below), (b, above) in itertools.pairwise(zip(r, q, strict=True)) if below != above]
    for step, (a, b) in zip((view.thresholds * view.qparams.scale).tolist(), where, strict=True):
        beside = 2**-19 * abs(step) + 2**-119
        assert step - beside <= a < b <= step + beside


@pytest.mark.parametrize("rounding", ROUNDINGS, ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_threshold_is_the_last_value_below_its_step(grid, rounding):
    view = formats.view(grid, rounding)
    at = replace(view, qparams=view.qparams._replace(scale=torch.tensor(1.0)))
    above = torch.nextafter(at.thresholds, torch.tensor(torch.inf))
    wanted = torch.arange(grid.quant_min, grid.quant_max, dtype=torch.float32)
    exact = above.abs() > 1e-30  # below are subnormals, which processors may take for zero
    assert torch.equal(grid.encode(at.thresholds, at.qparams, rounding)[exact], wanted[exact])
    assert torch.equal(grid.encode(above, at.qparams, rounding)[exact], wanted[exact] + 1)


def test_ranges_are_those_that_the_docs_name():
    for grid, lowest, highest in (IntegerGrid(4), -1, 1), (IntegerGrid(4, "unsigned"), 0, 1), (NormalFloat(4), -1, 1):
        levels = formats.view(grid).levels
        assert (round(float(levels[0]), 6), round(float(levels[-1]), 6)) == (lowest, highest)
    affine = formats.view(IntegerGrid(4, "affine"))
    assert (float(affine.qparams.zero_point), round(float(affine.levels[-1] - affine.levels[0]), 6)) == (4, 1.4)


def test_levels_made_for_data_are_and_say_so():
    view = formats.view(KMeans(2), seed=3)
    assert view.fitted == "levels fitted to 8,192 normal values, seed 3"
    assert not torch.equal(view.units, torch.tensor(KMeans(2).unit))
    axes = figures.staircases({"weights": view}).axes[0]
    assert view.fitted in [text.get_text() for text in axes.texts]


def test_a_draw_has_dots_and_no_thresholds():
    view = formats.view(NormalFloat(4), Stochastic(seed=0))
    assert view.thresholds is None
    figure = figures.staircases({"weights": view})
    (line,) = lines(figure.axes[0], "Q(r)")
    assert (line.get_linestyle(), line.get_marker()) == ("None", ".")
    assert "thresholds" not in [text.get_text() for text in figure.legends[0].get_texts()]
    assert levels_table.levels_table("weights", view).caption == "no thresholds: rounding stochastic draws"


def test_symmetric_and_affine_have_the_bits_and_the_format_that_was_chosen():
    for grid, symmetric, affine in (
        (IntegerGrid(4, "full_range"), IntegerGrid(4, "full_range"), IntegerGrid(4, "affine")),
        (IntegerGrid(4, "affine", "power_of_two"), IntegerGrid(4, "restricted", "power_of_two"),
         IntegerGrid(4, "affine", "power_of_two")),
        (IntegerGrid(8, "unsigned"), IntegerGrid(8), IntegerGrid(8, "affine")),
        (IntegerGrid(1, "affine"), Binary(), IntegerGrid(1, "affine")),
        (NormalFloat(4), NormalFloat(4), IntegerGrid(4, "affine")),
    ):  # fmt: skip
        assert [s.grid for s in formats.symmetric_and_affine(Scheme(grid))] == [symmetric, affine]


def test_titles_of_histograms_say_what_the_sample_got():
    x = torch.cat([torch.zeros(30), torch.linspace(0, 6, 61)])
    fits = [formats.fit(x, s) for s in formats.symmetric_and_affine(Scheme(IntegerGrid(3, "affine")))]
    titles = [axes.get_title(loc="left") for axes in figures.histograms({"activation": fits}).axes[:2]]
    for fit, title in zip(fits, titles, strict=True):
        noise = (x.double() - fit.view.quantized(x).double()).square().sum()
        assert f"SQNR {10 * torch.log10(x.double().square().sum() / noise):.1f} dB" in title
    assert "symmetric, int3 restricted" in titles[0]
    assert "range [−6, 6], Z = 0, 3 of 7 codes unused" in titles[0]
    assert "range [0, 6], Z = 0, all 8 codes used" in titles[1]


def test_an_svg_is_well_formed_needs_nothing_else_and_is_the_same_twice(tmp_path):
    views = {"weights": formats.view(IntegerGrid(8)), "activations": formats.view(Minifloat())}
    for name in "a.svg", "b.svg":
        figures.save(figures.staircases(views), tmp_path / name)
    content = (tmp_path / "a.svg").read_bytes()
    assert content == (tmp_path / "b.svg").read_bytes()
    assert len(content) < 200_000
    root = ElementTree.fromstring(content)
    assert root.tag.endswith("}svg")
    references = [value for node in root.iter() for key, value in node.attrib.items() if key.endswith("href")]
    assert references
    assert all(value.startswith("#") for value in references)
    assert not [node for node in root.iter() if node.tag.endswith("}text")]  # letters are paths, no fonts are needed
