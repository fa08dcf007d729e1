"""Groups of runs as a table for the terminal, as rows for files and W&B, and as a figure of what one pays for what."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qexp.compare.differences import at
from qexp.compare.groups import (
    ACC,
    MEANING,
    Group,
    Mean,
    has,
    metrics_of,
    mixed,
    origins,
    seeds_of,
    value_of,
)
from qexp.compare.papers import Beside
from qexp.compare.pareto import pareto_front
from qexp.compare.records import Run
from qexp.report.terminal import output
from qexp.tracking import METRICS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHARES = "parity/identical", "parity/off_by_one", "parity/larger", "int8/mac_coverage", "agree/argmax"
# What a figure is called in a heading, where its own name is not short or not clear.
HEADINGS = {
    ACC: "acc %", "acc/sim": "sim %", "acc/engine": "engine %", "acc/fp32": "fp32 %",
    "acc/control": "fp32 tuned %", "acc/ptq": "PTQ %", "acc/drop": "drop",
    "sqnr/output_db": "SQNR dB", "latency/int8_ms": "int8 ms", "latency/fp32_ms": "fp32 ms",
    "latency/speedup": "speed-up", "size/packed_bytes": "KiB", "size/int8_bytes": "int8 file KiB",
    "parity/identical": "codes = %", "int8/mac_coverage": "int8 MACs %",
}  # fmt: skip
# What a narrow terminal goes without, the first first; then figures from the right.
SPARED = [
    "size/packed_bytes", "latency/int8_ms", "acc/control", "sqnr/output_db", "acc/fp32", "acc/ptq", "latency/speedup",
]  # fmt: skip
# Less of these is better; more of acc/..., sqnr/..., parity/identical and the speed-ups; of the others who knows.
COSTS = "latency/", "size/", "time/", "acc/drop", "finetune/loss"
COST_AXES = ["latency/int8_ms", "size/packed_bytes"]
UNLIKE = "data._target_", "engine.batch_size", "engine.threads"  # what makes accuracy or latency another figure
AXES = {ACC: "accuracy, %", "latency/int8_ms": "latency in int8, ms", "size/packed_bytes": "size, KiB"}


@dataclass(frozen=True)
class Shown:
    """How a figure is shown: its heading, what it is multiplied by, and its decimals (None: four digits)."""

    heading: str
    factor: float
    decimals: int | None

    def text(self, mean: Mean, runs: int | None = None) -> str:
        """A mean with its interval; how many runs it is of, where that is less than `runs`.

        >>> Shown("acc %", 100, 2).text(Mean(3, 0.98651, 0.00731))
        '98.65 ± 0.73'
        """
        if not mean.n:
            return ""
        fewer = f" (n={mean.n})" if runs and mean.n < runs else ""
        if mean.mean is None:
            return f"infinite{fewer}"
        value, half = self.factor * mean.mean, None if mean.half is None else self.factor * mean.half
        if half is None:
            return self._number(value) + fewer
        decimals = self.decimals if self.decimals is not None else _decimals(half, value)
        if decimals is None:
            return f"{_plain(value)} ± {_plain(half, 2)}{fewer}"
        return f"{value:.{decimals}f} ± {half:.{decimals}f}{fewer}"

    def _number(self, value: float) -> str:
        return _plain(value) if self.decimals is None else f"{value:.{self.decimals}f}"


def _decimals(half: float, value: float) -> int | None:
    """Those with which an uncertainty has two digits; None where that is no way to write the value."""
    reach = half or abs(value) / 1000
    if not reach or not 1e-6 < reach < 1e6:
        return None
    return max(0, 1 - math.floor(math.log10(reach)))


def _plain(value: float, digits: int = 4) -> str:
    """Without an exponent where that is short."""
    return f"{value:.0f}" if 10**digits <= abs(value) < 1e7 else f"{value:.{digits}g}"


def shown(metric: str) -> Shown:
    """How a figure is shown, also that of one engine, as in openvino/acc/engine."""
    own = metric.partition("/")[2]
    name = own if metric not in MEANING and own in METRICS else metric
    heading = HEADINGS.get(metric)
    if name == ACC or name.startswith("acc/") or name in SHARES:
        return Shown(heading or f"{metric} %", 100, 3 if name == "parity/identical" else 2)
    if name.startswith("sqnr/"):
        return Shown(heading or f"{metric.removesuffix('_db')} dB", 1, 1)
    if name.startswith("size/"):
        return Shown(heading or f"{metric.removesuffix('_bytes')} KiB", 1 / 1024, 1)
    if name.startswith("latency/speedup"):
        return Shown(heading or metric, 1, 2)
    return Shown(heading or metric, 1, None)


def better(metric: str) -> int:
    """1 where more is better, -1 where less is, 0 where neither is known."""
    own = metric.partition("/")[2]
    name = own if metric not in MEANING and own in METRICS else metric
    if name == ACC or name.startswith(("sqnr/", "latency/speedup")) or name in SHARES[:1] + SHARES[3:]:
        return 1
    if name.startswith(COSTS):
        return -1
    return 1 if name.startswith("acc/") else 0


def summary(groups: Sequence[Group]) -> str:
    """What a table is of, in a line."""
    runs = [run for group in groups for run in group.runs]
    seeds = seeds_of(runs)
    over = f"seed {seeds[0]}" if len(seeds) == 1 else f"{len(seeds)} seeds"
    what = f"{_count(len(runs), 'run')} in {_count(len(groups), 'group')}, {over}"
    if all(len(group.runs) == 1 for group in groups):
        return f"{what}; one run a group, so no intervals"
    return f"{what}; mean ± 95 % t-interval"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("" if number == 1 else "s")


def remarks(groups: Sequence[Group]) -> list[str]:
    """What a reader of these figures has to know, a sentence each."""
    runs = [run for group in groups for run in group.runs]
    said = []
    lone = sum(len(group.runs) == 1 for group in groups)
    if 0 < lone < len(groups):
        said.append(f"{_count(lone, 'group')} of one run: n = 1 has no interval")
    if mixed(groups):
        said.append("some groups hold runs that differ in more than their seeds: their intervals are over all of these")
    unlike = [key for key in UNLIKE if len({str(at(run.config, key)) for run in runs}) > 1]
    if unlike:
        keys = " and ".join(key.removesuffix("._target_") for key in unlike)
        said.append(f"runs differ in {keys}: their accuracy or latency is not of one thing; --where keeps some")
    if apart := origins(runs):
        said.append(f"runs {', '.join(apart)}")
    return said


def comparison_table(groups: Sequence[Group], metrics: Sequence[str], console: Console = output) -> Table:
    """A group a row; columns are the settings that differ and as many figures as the terminal is wide."""
    spared = [name for name in SPARED if name in metrics] + [name for name in reversed(metrics) if name not in SPARED]
    unbounded = console.options.update(max_width=10_000)
    for count in range(max(len(metrics), 1)):
        table = _table(groups, metrics, spared[:count])
        if console.measure(table, options=unbounded).maximum <= console.width:
            break
    return table


def _table(groups: Sequence[Group], metrics: Sequence[str], spared: Sequence[str]) -> Table:
    kept = [name for name in metrics if name not in spared]
    hidden = ", ".join(shown(name).heading for name in metrics if name in spared)
    table = Table(
        title=summary(groups), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False,
        caption=f"a wider terminal also shows {escape(hidden)}" if hidden else None, collapse_padding=True,
    )  # fmt: skip
    for key in groups[0].settings:
        table.add_column(escape(key), overflow="fold")
    table.add_column("n", justify="right", no_wrap=True)
    for name in kept:
        table.add_column(escape(shown(name).heading), justify="right", no_wrap=True)
    for group in groups:
        n = len(group.runs)
        cells = [shown(name).text(group.mean(name), n) for name in kept]
        table.add_row(*map(escape, group.settings.values()), str(n), *cells)
    return table


def paper_columns(beside: Beside, groups: Sequence[Group]) -> tuple[list[str], list[list[str]]]:
    """Heading and rows of a paper's table with ours on top."""
    return beside.table(groups, lambda group, name: shown(name).text(group.mean(name), len(group.runs)))


def paper_table(beside: Beside, groups: Sequence[Group]) -> Table:
    """Ours beside a paper's figures."""
    heading, rows = paper_columns(beside, groups)
    paper, metric = beside.paper, beside.metric(groups)
    said = [paper.source, f"trend: {paper.trend}", f"note: {paper.note}" if paper.note else ""]
    table = Table(
        title=escape(f"{beside.experiment}: {paper.unit}; ours: {MEANING.get(metric, metric)}"), title_justify="left",
        title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True,
        caption=escape("\n".join(" ".join(text.split()) for text in said if text)), caption_justify="left",
    )  # fmt: skip
    for number, column in enumerate(heading):
        style = {"justify": "right"} if number else {"min_width": 16}
        table.add_column(escape(column), overflow="fold", **style)
    for row in rows:
        table.add_row(*map(escape, row), style="bold" if row[0].startswith("ours") else None)
    return table


def comparison_rows(groups: Sequence[Group], metrics: Sequence[str] = ()) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows for a table of numbers: settings, n, then mean and both ends of the interval of each figure."""
    names = metrics_of([run for group in groups for run in group.runs], metrics)
    settings = list(groups[0].settings) if groups else []
    columns = [*settings, "n", *(f"{name}{end}" for name in names for end in ("", "/lo", "/hi"))]
    rows = []
    for group in groups:
        row: list[Any] = [*group.settings.values(), len(group.runs)]
        for name in names:
            found = group.mean(name)
            row += [found.mean, *_ends(found)]
        rows.append(row)
    return columns, rows


def _ends(mean: Mean) -> tuple[float | None, float | None]:
    if mean.mean is None or mean.half is None:
        return None, None
    return mean.mean - mean.half, mean.mean + mean.half


def to_csv(groups: Sequence[Group], metrics: Sequence[str]) -> str:
    """The rows of a table as CSV; a figure that is not there is empty."""
    columns, rows = comparison_rows(groups, metrics)
    file = io.StringIO(newline="")
    csv.writer(file, lineterminator="\n").writerows([columns, *rows])
    return file.getvalue()


def to_json(groups: Sequence[Group], metrics: Sequence[str]) -> str:
    """Groups with their figures, and the runs of each with theirs."""
    content = [
        {
            "settings": group.settings,
            "n": len(group.runs),
            "metrics": {name: _json_mean(group.mean(name)) for name in metrics if group.mean(name).n},
            "runs": [
                {"run_id": run.run_id, "seed": run.config.get("seed"),
                 "metrics": {name: value_of(run, name) for name in metrics if has(run, name)}}
                for run in group.runs
            ],
        }
        for group in groups
    ]  # fmt: skip
    return json.dumps({"interval": "95 % t-interval", "groups": content}, indent=2, allow_nan=False) + "\n"


def _json_mean(mean: Mean) -> dict[str, Any]:
    low, high = _ends(mean)
    return {"n": mean.n, "mean": mean.mean, "lo": low, "hi": high}


def to_latex(groups: Sequence[Group], metrics: Sequence[str]) -> str:
    r"""A table for a paper, with the rules of the package booktabs (\usepackage{booktabs})."""
    settings = list(groups[0].settings)
    heading = [*map(_latex, settings), "$n$", *(_latex(shown(name).heading) for name in metrics)]
    lines = [rf"% {summary(groups)}", rf"\begin{{tabular}}{{{'l' * len(settings)}{'r' * (1 + len(metrics))}}}"]
    lines += [r"\toprule", " & ".join(heading) + r" \\", r"\midrule"]
    for group in groups:
        cells = [_latex(shown(name).text(group.mean(name), len(group.runs))) for name in metrics]
        lines.append(" & ".join([*map(_latex, group.settings.values()), str(len(group.runs)), *cells]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "±": r"$\pm$", "—": "---", "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
    **{sign: f"\\{sign}" for sign in "&%$#_"},
}  # fmt: skip


def _latex(text: str) -> str:
    return "".join(LATEX.get(sign, sign) for sign in " ".join(text.split()))


def pareto_figure(groups: Sequence[Group]) -> Figure:
    """Accuracy against latency and against size, with intervals; the line joins what no other group beats."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from qexp.report.figures import STYLE

    axes_of = [name for name in COST_AXES if any(_point(group, name) for group in groups)]
    with rc_context(STYLE):
        figure = Figure(figsize=(5 * max(len(axes_of), 1), 4.8), layout="constrained")
        for axes, cost in zip(figure.subplots(1, max(len(axes_of), 1), squeeze=False)[0], axes_of or [""], strict=True):
            if cost:
                _front(axes, groups, cost)
            else:
                axes.set_axis_off()
                axes.text(0.5, 0.5, "no run has an accuracy and a latency or a size", ha="center")
        return figure


def _point(group: Group, cost: str) -> tuple[Mean, Mean] | None:
    x, y = group.mean(cost), group.mean(ACC)
    return None if x.mean is None or y.mean is None else (x, y)


def _front(axes, groups: Iterable[Group], cost: str, named: int = 8) -> None:
    """All groups, those on the front in colour and the first of them by number and name."""
    from matplotlib.lines import Line2D

    from qexp.report.figures import BLUE, GREY

    points = [(group, *point) for group in groups if (point := _point(group, cost))]
    xs = [shown(cost).factor * x.mean for _, x, _ in points]
    ys = [shown(ACC).factor * y.mean for _, _, y in points]
    best = pareto_front(list(zip(xs, ys, strict=True)))
    axes.step([xs[i] for i in best], [ys[i] for i in best], where="post", color=BLUE, linewidth=1, alpha=0.5)
    for i, (_, x, y) in enumerate(points):
        errors = {"xerr": shown(cost).factor * (x.half or 0), "yerr": shown(ACC).factor * (y.half or 0)}
        style = {"color": BLUE, "zorder": 3} if i in best else {"color": GREY, "alpha": 0.5}
        axes.errorbar(xs[i], ys[i], **errors, fmt="o", markersize=4.5, elinewidth=0.7, **style)
    for number, i in enumerate(best[:named], 1):
        axes.annotate(str(number), (xs[i], ys[i]), (4, 4), textcoords="offset points", fontsize=8, color=BLUE)
    names = [f"{number}  {points[i][0].name}" for number, i in enumerate(best[:named], 1)]
    axes.set(xlabel=AXES[cost], ylabel=AXES[ACC])
    axes.legend(
        [Line2D([], [], linestyle="none")] * len(names), [name.replace("$", r"\$") for name in names], handlelength=0,
        loc="upper left", bbox_to_anchor=(0, -0.16), fontsize=7.5, title="on the front", title_fontsize=7.5,
        alignment="left",
    )  # fmt: skip


def runs_of(groups: Iterable[Group]) -> list[Run]:
    """All runs, group by group."""
    return [run for group in groups for run in group.runs]
