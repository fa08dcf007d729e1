"""One page that holds a comparison, its data and all that draws it: it opens from a file, without a network.

Nothing of a record becomes markup: data travel as JSON in which `<`, `>`, `&` and quotes are escaped, or packed, and
the page's script writes them as text. The page's policy allows no script but its own and no connection at all.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from qexp.compare.differences import brief, head
from qexp.compare.groups import ACC, MEANING, Group, Mean, has, mean_of, processor_of, settings_of, value_of
from qexp.compare.papers import Beside
from qexp.compare.records import Records, Run
from qexp.report.comparison import AXES, COST_AXES, better, paper_columns, remarks, runs_of, shown, summary

HERE = Path(__file__).parent
PLOTTED = [ACC, "acc/drop", "sqnr/output_db", *COST_AXES]


def page(
    groups: Sequence[Group], metrics: Sequence[str], papers: Sequence[Beside], records: Records, title: str
) -> str:
    """The page of these groups as one text. Errors: those of a damaged installation."""
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    data = page_data(groups, metrics, papers, records, title)
    details = packed(json.dumps(_details(groups), separators=(",", ":"), allow_nan=False))
    own = {name: Markup(_source(f"comparison.{name}")) for name in ("css", "js")}
    # Whoever chooses the values of a record cannot know what they and all others hash to.
    nonce = hashlib.sha256(json.dumps(data).encode()).hexdigest()[:32]
    return environment.get_template("comparison.html").render(
        data=data, details=details, plotly=packed(_plotly()), nonce=nonce, **own
    )


def packed(text: str) -> str:
    """gzip in base64, the same for the same text."""
    return base64.b64encode(gzip.compress(text.encode(), 6, mtime=0)).decode()


def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()


def _source(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def page_data(
    groups: Sequence[Group], metrics: Sequence[str], papers: Sequence[Beside], records: Records, title: str
) -> dict[str, Any]:
    """What the template shows; below "rows" what the script does: a row for each group, and one for each run."""
    runs = runs_of(groups)
    figures = list(dict.fromkeys([*metrics, *(name for name in PLOTTED if any(has(run, name) for run in runs))]))
    of_groups = [_group_row(group, figures) for group in groups]
    of_runs = [_run_row(run, group, i, figures) for i, group in enumerate(groups) for run in group.runs]
    return {
        "title": title,
        "summary": summary(groups),
        "remarks": remarks(groups),
        "lost": [*records.damaged, *records.missing, *records.repeated],
        "papers": [_paper(paper, groups) for paper in papers],
        "same": _same(runs),
        "has_layers": any(run.layers for run in runs),
        "has_curves": any(run.curve for run in runs),
        "rows": {
            "settings": list(groups[0].settings),
            "metrics": [_metric(name, name in metrics) for name in figures],
            "costs": [figures.index(name) for name in COST_AXES if name in figures],
            "gain": figures.index(ACC) if ACC in figures else None,
            "groups": of_groups,
            "runs": of_runs,
        },
    }


def _group_row(group: Group, figures: Sequence[str]) -> dict[str, Any]:
    n = len(group.runs)
    return {
        "name": group.name, "settings": list(group.settings.values()), "n": n, "about": _about(group.runs),
        "figures": [_figure(name, group.mean(name), n) for name in figures],
    }  # fmt: skip


def _run_row(run: Run, group: Group, number: int, figures: Sequence[str]) -> dict[str, Any]:
    seed = brief(run.config.get("seed"))
    values = [mean_of([value_of(run, name)] if has(run, name) else []) for name in figures]
    return {
        "name": f"{group.name}, seed {seed}", "settings": [*group.settings.values(), seed], "id": run.run_id,
        "group": number, "about": _about([run]), "figures": list(map(_figure, figures, values)),
    }  # fmt: skip


def _about(runs: Sequence[Run]) -> str:
    """Where the runs were made."""
    commits = dict.fromkeys(str(run.environment.get("commit") or "unknown")[:7] for run in runs)
    return f"{'; '.join(dict.fromkeys(map(processor_of, runs)))}; commit {', '.join(commits)}"


def _metric(name: str, in_table: bool) -> dict[str, Any]:
    meaning = MEANING.get(name) or MEANING.get(name.partition("/")[2], "")
    heading = shown(name).heading
    return {"name": name, "heading": heading, "axis": AXES.get(name, heading), "better": better(name),
            "meaning": meaning, "inTable": in_table}  # fmt: skip


def _figure(name: str, mean: Mean, runs: int | None = None) -> list[Any] | None:
    """[text, mean, half], as scaled as the text; None where there is no figure."""
    if not mean.n:
        return None
    form = shown(name)
    scaled = [None if value is None else _short(form.factor * value) for value in (mean.mean, mean.half)]
    return [form.text(mean, runs), *scaled]


def _short(value: float | None, digits: int = 7) -> float | None:
    return None if value is None else float(f"{value:.{digits}g}")


def _same(runs: Sequence[Run], most: int = 60) -> list[list[str]]:
    """Settings that all runs share, for the end of the page."""
    first, *others = [settings_of(run) for run in runs]

    def shared(section: Any, rest: list[Any], path: str) -> Iterable[list[str]]:
        if isinstance(section, dict) and all(isinstance(other, dict) for other in rest):
            for key, value in section.items():
                if all(key in other for other in rest):
                    label = path if key == "_target_" else f"{path}.{key}" if path else key
                    yield from shared(value, [other[key] for other in rest], label)
        elif all(other == section for other in rest):
            yield [path, str(section).rpartition(".")[2] if head({"_target_": section}) else brief(section)]

    return list(shared(first, others, ""))[:most]


def _paper(beside: Beside, groups: Sequence[Group]) -> dict[str, Any]:
    heading, rows = paper_columns(beside, groups)
    paper, metric = beside.paper, beside.metric(groups)
    return {
        "experiment": beside.experiment, "source": paper.source, "trend": paper.trend, "note": paper.note,
        "unit": paper.unit, "metric": MEANING.get(metric, metric), "heading": heading, "rows": rows,
    }  # fmt: skip


def _details(groups: Sequence[Group]) -> dict[str, Any]:
    """SQNR by tensor and the curves of fine-tuning, which only charts show."""
    sites: dict[tuple, int] = {}

    def of_run(run: Run) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if run.layers:
            key = tuple((row["site"], row["kind"]) for row in run.layers)
            found["sites"] = sites.setdefault(key, len(sites))
            found["sqnr"] = [_number(row["sqnr_db"]) for row in run.layers]
        if run.curve:
            found["curve"] = {name: [_number(row[name]) for row in run.curve] for name in run.curve[0]}
        return found

    runs = [[of_run(run) for run in group.runs] for group in groups]
    means = [_mean_layers(members) for members in runs]
    return {
        "sites": [[list(site) for site in key] for key in sites],
        "runs": [run for members in runs for run in members],
        "groups": means,
    }


def _mean_layers(runs: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The mean of a tensor's SQNR over seeds and its half interval; None where runs have different tensors."""
    known = [run for run in runs if "sites" in run]
    if not known or len({run["sites"] for run in known}) > 1:
        return None
    means = [mean_of(values) for values in zip(*(run["sqnr"] for run in known), strict=True)]
    return {"sites": known[0]["sites"], "sqnr": [_short(mean.mean, 4) for mean in means],
            "half": [_short(mean.half, 2) for mean in means]}  # fmt: skip


def _number(text: str) -> float | None:
    """A number of a CSV file in four digits; None for an infinite one and for an empty cell."""
    try:
        value = float(text)
    except ValueError:
        return None
    return _short(value, 4) if math.isfinite(value) else None
