"""Tables that fit, files that say the same, a figure with a point for each group."""

import csv
import io
import json

import pytest
from rich.console import Console

from qexp.compare import Mean, groups_of, pareto_front, read
from qexp.compare.groups import metrics_of
from qexp.report.comparison import (
    comparison_rows,
    comparison_table,
    pareto_figure,
    remarks,
    shown,
    summary,
    to_csv,
    to_json,
    to_latex,
)


@pytest.fixture
def groups(make):
    make.grid()
    return groups_of(read([make.outputs]).runs)


def drawn(groups, metrics, width):
    console = Console(file=io.StringIO(), width=width)
    console.print(comparison_table(groups, metrics, console))
    return console.file.getvalue()


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_a_table_fits_and_keeps_settings_and_accuracy(groups, width):
    metrics = metrics_of([run for group in groups for run in group.runs])
    text = drawn(groups, metrics, width)
    assert max(map(len, text.splitlines())) <= width
    for word in "calibration", "MinMax", "MSE", "86.10 ± 0.25", "12 runs in 4 groups":
        assert word in text
    assert all(shown(name).heading in text for name in metrics)
    assert ("a wider terminal also shows" in text) == (width < 120)


def test_a_mean_is_written_with_two_digits_of_doubt_and_one_run_without():
    assert shown("acc").text(Mean(3, 0.98651, 0.00731)) == "98.65 ± 0.73"
    assert shown("latency/int8_ms").text(Mean(3, 0.0583915, 0.00213)) == "0.0584 ± 0.0021"
    assert shown("latency/int8_ms").text(Mean(3, 1234.5, 321.0)) == "1234 ± 321"  # halves go to even
    assert shown("latency/int8_ms").text(Mean(1, 0.0583915)) == "0.05839"
    assert shown("flat/trace").text(Mean(2, 2e9, 3e8)) == "2e+09 ± 3e+08"
    assert shown("acc").text(Mean(0, None)) == ""
    assert shown("sqnr/output_db").text(Mean(2, None), 3) == "infinite (n=2)"
    assert shown("openvino/acc/engine").text(Mean(1, 0.5)) == "50.00"


def test_what_has_no_interval_says_so(make):
    make.run()
    make.run(make.config(0, 4), make.metrics(0.8))
    groups = groups_of(read([make.outputs]).runs)
    assert summary(groups) == "2 runs in 2 groups, seed 0; one run a group, so no intervals"
    make.run(make.config(1, 4), make.metrics(0.9))
    groups = groups_of(read([make.outputs]).runs)
    assert remarks(groups) == ["1 group of one run: n = 1 has no interval"]
    assert "differ in more than their seeds" in remarks(groups_of(read([make.outputs]).runs, ["model"]))[0]


def test_figures_of_unlike_things_are_told_apart(make):
    for batch in 1, 64:
        config = make.config(0, 8)
        make.run(config | {"engine": config.get("engine", {}) | {"batch_size": batch}})
    (told,) = remarks(groups_of(read([make.outputs]).runs))
    assert told == "runs differ in engine.batch_size: their accuracy or latency is not of one thing; --where keeps some"


def test_rows_are_the_means_with_both_ends(groups):
    columns, rows = comparison_rows(groups, ["acc"])
    assert columns == ["calibration", "quantizer.bits", "n", "acc", "acc/lo", "acc/hi"]
    for group, row in zip(groups, rows, strict=True):
        mean = group.mean("acc")
        assert row == [*group.settings.values(), 3, mean.mean, mean.mean - mean.half, mean.mean + mean.half]
    assert [list(row) for row in csv.reader(io.StringIO(to_csv(groups, ["acc"])))][1:] == [
        [str(cell) for cell in row] for row in rows
    ]
    content = json.loads(to_json(groups, ["acc"]))["groups"]
    assert [one["metrics"]["acc"]["mean"] for one in content] == [row[3] for row in rows]
    assert [len(one["runs"]) for one in content] == [3, 3, 3, 3]


def test_latex_escapes_what_it_would_read(make):
    make.run(make.config(0, 8, "a.b_c"), make.metrics(0.5))
    make.run(make.config(0, 8, "a.50%&{x}^~\\"), make.metrics(0.5))
    text = to_latex(groups_of(read([make.outputs]).runs), ["acc"])
    assert r"b\_c & 1 & 50.00 \\" in text
    assert r"50\%\&\{x\}\textasciicircum{}\textasciitilde{}\textbackslash{} & 1 & 50.00 \\" in text
    assert r"acc \%" in text
    assert text.count(r"\\") == 3


def test_a_figure_has_a_point_for_each_group_and_the_front_in_its_order(groups):
    figure = pareto_figure(groups)
    latency, size = figure.axes
    for axes, cost in (latency, "latency/int8_ms"), (size, "size/packed_bytes"):
        assert len(axes.containers) == len(groups)
        points = [(group.mean(cost).mean, group.mean("acc").mean) for group in groups]
        front = [100 * points[i][1] for i in pareto_front(points)]
        assert axes.lines[0].get_ydata().tolist() == pytest.approx(front)
    assert len(pareto_figure([]).axes) == 1
