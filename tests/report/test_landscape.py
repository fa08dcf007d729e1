"""Figures of landscapes: what is drawn is what was measured."""

import itertools
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import torch

figures = pytest.importorskip("qexp.report.figures")
landscape = pytest.importorskip("qexp.report.landscape")

X = np.linspace(-1, 1, 9)
NAMES = "float", "PTQ", "QAT, straight-through", "QAT, stochastic"
CURVES = {name: (X, 0.01 * (i + 1) + X**2, 1 - X**2 / 2) for i, name in enumerate(NAMES)}
PLANES = {name: (X, X[2:], 0.01 * (i + 1) + X[:, None] ** 2 + 3 * X[None, 2:] ** 2) for i, name in enumerate(NAMES)}


def drawn(axes) -> dict:
    return {line.get_label(): line for line in axes.get_lines()}


def words(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_every_curve_is_drawn_as_measured_with_its_accuracy_in_percent():
    figure = landscape.landscape_figure(CURVES, half_width=0.25)
    top, bottom = figure.axes
    assert list(drawn(top)) == list(drawn(bottom)) == list(NAMES)
    for name, (x, losses, accuracies) in CURVES.items():
        for axes, values in (top, losses), (bottom, 100 * accuracies):
            assert drawn(axes)[name].get_xdata().tolist() == x.tolist()
            assert drawn(axes)[name].get_ydata().tolist() == values.tolist()
    assert (top.get_yscale(), top.get_ylabel(), bottom.get_ylabel()) == ("log", "cross-entropy (nats)", "accuracy (%)")
    assert bottom.get_xlabel() == "distance along the direction (norms of the filters)"
    assert words(figure) == [*NAMES, "half a quantization step"]


def test_the_cell_is_a_band_of_its_half_width_in_every_panel():
    for axes in landscape.landscape_figure(CURVES, half_width=0.25).axes:
        (band,) = axes.patches
        assert (band.get_x(), band.get_x() + band.get_width()) == (-0.25, 0.25)


def test_cells_of_each_curve_are_dots_on_it():
    widths = {"float": 0.25, "PTQ": 0.3}
    figure = landscape.landscape_figure(CURVES, widths)
    top = figure.axes[0]
    assert not top.patches
    dots = [line for line in top.get_lines() if line.get_label() == "_ends"]
    for (name, width), line in zip(widths.items(), dots, strict=True):
        assert line.get_xdata().tolist() == [-width, width]
        assert line.get_ydata() == pytest.approx(np.interp(line.get_xdata(), *CURVES[name][:2]))
        assert line.get_color() == drawn(top)[name].get_color()
    assert words(figure)[-1] == "half a quantization step"


def test_without_accuracies_and_cells_there_is_one_panel_of_lines():
    figure = landscape.landscape_figure({"a": (X, X**2)}, log=False, title="digits")
    (axes,) = figure.axes
    assert (axes.get_yscale(), axes.get_title(loc="left"), words(figure)) == ("linear", "digits", ["a"])
    assert not axes.patches


def test_one_curve_without_accuracies_is_missing_in_the_lower_panel_and_colours_stay():
    top, bottom = landscape.landscape_figure({**CURVES, "PTQ": CURVES["PTQ"][:2]}).axes
    assert list(drawn(bottom)) == [name for name in NAMES if name != "PTQ"]
    for name, line in drawn(bottom).items():
        assert line.get_color() == drawn(top)[name].get_color()


def test_distances_in_any_order_and_as_tensors_give_the_same_line():
    order = torch.tensor([3, 1, 0, 2, 4, 8, 5, 7, 6])
    curve = tuple(torch.from_numpy(values)[order] for values in CURVES["float"])
    for axes, wanted in zip(
        landscape.landscape_figure({"a": curve}).axes, landscape.landscape_figure({"a": CURVES["float"]}).axes,
        strict=True,
    ):  # fmt: skip
        assert (drawn(axes)["a"].get_xydata() == drawn(wanted)["a"].get_xydata()).all()


def test_lines_differ_by_colour_and_by_dash():
    for each in zip(*landscape.LINES, strict=True):
        assert len(set(each)) == len(each)


@pytest.mark.parametrize(
    ("curves", "why"),
    [({}, "curves: must be 1 to"), ({str(i): (X, X) for i in range(8)}, "not 8"), ({"a": (X, X[1:])}, "a: "),
     ({"a": (X, X, X[1:])}, "a: ")],
)  # fmt: skip
def test_curves_that_cannot_be_drawn_are_refused(curves, why):
    with pytest.raises(ValueError, match=why):
        landscape.landscape_figure(curves)


def test_panels_share_colours_that_span_all_losses():
    figure = landscape.contour_figure(PLANES, {"PTQ": 0.25})
    panels, bar = figure.axes[:-1], figure.axes[-1]
    filled = [next(c for c in axes.collections if c.filled) for axes in panels]
    assert [axes.get_title(loc="left") for axes in panels] == list(NAMES)
    assert (
        len({tuple(each.levels) for each in filled}) == len({(each.norm.vmin, each.norm.vmax) for each in filled}) == 1
    )
    losses = np.concatenate([plane[2].ravel() for plane in PLANES.values()])
    assert np.exp(filled[0].levels[[0, -1]]) == pytest.approx([losses.min(), losses.max()], rel=1e-4)
    assert filled[0].levels[0] < np.log(losses.min())
    assert filled[0].levels[-1] > np.log(losses.max())
    assert bar.get_ylabel() == "cross-entropy (nats)"
    circles = [len(axes.patches) for axes in panels]
    assert circles == [0, 1, 0, 0]
    assert panels[1].patches[0].radius == 0.25
    assert words(figure) == ["trained weights", "half a quantization step"]


def test_the_first_direction_runs_to_the_right():
    losses = np.exp(X)[:, None] * np.ones(7)  # e^x, so that the contour of level l is the line x = l
    axes = landscape.contour_figure({"a": (X, X[2:], losses)}).axes[0]
    (lines,) = [c for c in axes.collections if not c.filled]
    for level, path in zip(lines.levels, lines.get_paths(), strict=True):
        assert path.vertices[:, 0] == pytest.approx(level, abs=1e-6)
    assert axes.get_xlabel().startswith("first direction")
    assert (axes.get_xlim(), axes.get_ylim()) == ((-1, 1), (-0.5, 1))


def test_a_plane_of_one_loss_is_drawn():
    axes = landscape.contour_figure({"a": (X, X, np.ones((9, 9)))}).axes[0]
    assert axes.get_title(loc="left") == "a" or axes.get_title() == "a"
    assert (axes.get_xlim(), axes.get_ylim()) == ((-1, 1), (-1, 1))


@pytest.mark.parametrize(
    ("planes", "why"),
    [({}, "planes"), ({"a": (X, X[1:], np.ones((9, 9)))}, "a: losses of shape"),
     ({"a": (X, X, np.zeros((9, 9)))}, "a: losses must be"), ({"a": (X, X, np.full((9, 9), np.inf))}, "a: losses")],
)  # fmt: skip
def test_planes_that_cannot_be_drawn_are_refused(planes, why):
    with pytest.raises(ValueError, match=why):
        landscape.contour_figure(planes)


FIGURES = {
    "curves": lambda: landscape.landscape_figure(CURVES, 0.25, title="digits"),
    "planes": lambda: landscape.contour_figure(PLANES, dict.fromkeys(NAMES, 0.25), title="digits"),
    "plane": lambda: landscape.contour_figure({"float": PLANES["float"]}),
}


@pytest.mark.parametrize("draw", FIGURES.values(), ids=FIGURES)
def test_the_legend_and_the_panels_cover_nothing_of_each_other(draw):
    figure = draw()
    figure.draw_without_rendering()
    boxes = [axes.get_tightbbox() for axes in figure.axes] + [figure.legends[0].get_window_extent()]
    for one, other in itertools.combinations(boxes, 2):
        assert not one.padded(-1).overlaps(other.padded(-1))
    for box in boxes:
        assert figure.bbox.padded(1).contains(*box.min)
        assert figure.bbox.padded(1).contains(*box.max)


@pytest.mark.parametrize("draw", FIGURES.values(), ids=FIGURES)
def test_png_and_svg_are_written_and_the_same_twice(draw, tmp_path):
    for name in "a.svg", "b.svg", "a.png":
        figures.save(draw(), tmp_path / name, dpi=20)
    content = (tmp_path / "a.svg").read_bytes()
    assert content == (tmp_path / "b.svg").read_bytes()
    assert ElementTree.fromstring(content).tag.endswith("}svg")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
