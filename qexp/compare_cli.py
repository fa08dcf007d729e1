"""qexp compare: runs beside each other, as a table on the terminal and as a page that needs nothing else."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from qexp.compare.groups import groups_of, metrics_of, where
from qexp.compare.papers import paper_of
from qexp.compare.records import outputs_of, read
from qexp.sections import ConfigError
from qexp.store import StoreError

USAGE = """\
qexp compare: runs beside each other, with what their seeds say about each figure; nothing is run

usage: qexp compare [FOLDER ...] [options]

  qexp compare                                  every run in outputs, grouped by its settings without seeds
  qexp compare outputs/sweeps/ID                those of a sweep, beside the figures of its paper
  qexp compare a/outputs b/outputs --where calibration=mse --group-by model --group-by quantizer

A FOLDER is an outputs folder, its runs, one run, or a sweep. On the terminal a table, in FILE.html a page that opens
in any browser without a network.

  --group-by KEY     group by this setting (calibration, quantizer.weight.bits); may be repeated, or KEY,KEY
  --metric NAME      show this figure (acc, openvino/latency/int8_ms); may be repeated, or NAME,NAME
  --where KEY=VALUE  only runs with this value (or VALUE,VALUE), as the table or the sweep says it; may be repeated
  --html FILE        the page (without it: compare.html in the outputs folder)
  --no-html          no page
  --csv FILE, --latex FILE, --json FILE   the table for a spreadsheet, a paper, a program
"""


def main(arguments: list[str]) -> int:
    """Show runs beside each other; 1 where a record is damaged or missing. Errors: ConfigError, StoreError."""
    if {"--help", "-h"} & set(arguments):
        print(USAGE, end="")
        return 0
    given = _parsed(arguments)
    records = read(given.folders)
    papers = [paper for paper in map(paper_of, records.sweeps) if paper]
    runs = where(records.runs, given.where)
    if not runs:
        for text in [*records.damaged, *records.missing]:
            _warn(text)
        raise ConfigError(f"{', '.join(map(str, given.folders))}: no finished run is there to compare")
    metrics = metrics_of(runs, given.metric)
    groups = groups_of(runs, given.group_by)

    from qexp.report import comparison
    from qexp.report.terminal import output

    output.print(comparison.comparison_table(groups, metrics))
    for paper in papers:
        output.print(comparison.paper_table(paper, groups))
    for remark in comparison.remarks(groups):
        output.print(f"note: {remark}", markup=False)
    texts = {"csv": comparison.to_csv, "latex": comparison.to_latex, "json": comparison.to_json}
    for name, text in texts.items():
        if path := getattr(given, name):
            _write(Path(path), text(groups, metrics), f"--{name}={path}")
    if not given.no_html:
        from qexp.report.comparison_page import page

        path = Path(given.html or outputs_of(given.folders[0]) / "compare.html")
        _write(path, page(groups, metrics, papers, records, ", ".join(map(str, given.folders))), f"--html={path}")
        output.print(f"page in {path}", markup=False)
    return _complain(records)


def _parsed(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="qexp compare", add_help=False, allow_abbrev=False)
    parser.add_argument("folders", nargs="*")
    for option in "--group-by", "--metric", "--where":
        parser.add_argument(option, action="append", default=[])
    for option in "--html", "--csv", "--latex", "--json":
        parser.add_argument(option)
    parser.add_argument("--no-html", action="store_true")
    parser.error = _refuse
    given = parser.parse_intermixed_args(arguments)
    given.folders = [Path(folder) for folder in given.folders or ["outputs"]]
    for name in "group_by", "metric":
        setattr(given, name, [word for words in getattr(given, name) for word in words.split(",") if word])
    given.where = [_condition(text) for text in given.where]
    if given.html and given.no_html:
        _refuse("--html and --no-html: one of them")
    return given


def _condition(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not (key and equals and value):
        _refuse(f"--where {text}: must be KEY=VALUE")
    return key, value


def _refuse(message: str) -> NoReturn:
    raise ConfigError(f"{message}; qexp compare --help shows what can be said")


def _write(path: Path, text: str, asked: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StoreError(f"{asked}: cannot be written ({error.strerror or error})") from None


def _warn(text: str) -> None:
    print(f"qexp: {text}", file=sys.stderr)


def _complain(records) -> int:
    """Name every record that is not among the figures; 1 where that is a loss."""
    for text in [*records.repeated, *records.damaged, *records.missing]:
        _warn(text)
    lost = len(records.damaged) + len(records.missing)
    if lost:
        _warn(f"{lost} of {lost + len(records.runs)} records are not among these figures")
    return 1 if lost else 0
