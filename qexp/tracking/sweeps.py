"""The record of a whole sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qexp.sections import build
from qexp.tracking.loggers import RunInfo


def summarise_sweep(
    section: dict[str, Any], outputs: Path, sweep_id: str, title: str, columns: list[str], rows: list[list[Any]],
    figure: Any = None, config: dict[str, Any] | None = None, *, finished: int, failed: int = 0,
) -> str:  # fmt: skip
    """Record the comparison of a sweep's runs as one more run, `sweep-<sweep_id>`, which stays one if repeated.

    `section` is the logger's config, `figure` one of matplotlib, such as the Pareto front, `finished` and `failed` are
    numbers of runs. Returns how to look at it; "" where the logger keeps nothing of a sweep. Errors: those of the
    logger.
    """
    logger = build(section, "logger")
    if not logger.summarises:
        return ""
    info = RunInfo(f"sweep-{sweep_id}", title, "sweep", config or {}, outputs)
    with logger.open(info) as record:
        record.table("runs", columns, rows)  # a name with a slash would make an artifact of a random name
        if figure is not None:
            record.figure("pareto", figure)
        record.metrics({"sweep/runs_finished": finished, "sweep/runs_failed": failed})
        told = f"{finished} of {finished + failed} runs finished"
        record.alert(f"{title}: {'failed' if failed else 'finished'}", told, failure=failed > 0)
    return record.where
