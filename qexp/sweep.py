"""A sweep: what is finished is found, the rest goes to a launcher, and at the end stands what came of each job."""

from __future__ import annotations

import datetime
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from qexp.compare.groups import groups_of
from qexp.compare.records import read
from qexp.jobs import Call, Job, require_ready
from qexp.launch.launcher import launcher_of
from qexp.report import terminal
from qexp.report.board import Board, Costs
from qexp.report.comparison import comparison_rows, pareto_figure
from qexp.sections import build
from qexp.store import digest, failure, log_file, replace_text
from qexp.tracking.sweeps import summarise_sweep

# What another run of the same config may answer differently: times, and what depends on which engine was faster.
MOST_ROWS = 100  # of a table on the terminal
OF_THE_MOMENT = ("time/", "latency/", "engine/winner")


def sweep_id(jobs: list[Job]) -> str:
    """The identity of a set of runs."""
    return digest(sorted({job.run_id for job in jobs}))


def distinct(jobs: list[Job]) -> list[Job]:
    """Each run once, though a grid may say the same thing twice."""
    return list({job.run_id: job for job in jobs}.values())


def run_sweep(call: Call) -> tuple[Board, Path]:
    """Run what is not finished, and write the record of the sweep below paths.outputs, whose folder comes back.

    Errors: ConfigError for a job or a launcher that cannot be, before any job starts.
    """
    launcher = launcher_of(call)
    missing = to_run(call.jobs)
    require_ready(missing)
    identity = sweep_id(call.jobs)
    mark(missing, identity)
    folder = write_plan(call, identity)
    with Board(missing, costs(call.jobs)) as board:
        launcher.launch(missing, board, patient=False)
        if busy := board.later():  # other processes are at these: wait for them, and take over what they leave
            launcher.launch(busy, board, patient=True)
    end(call, board, folder)
    return board, folder


def to_run(jobs: list[Job]) -> list[Job]:
    """Those that are not finished, or are to be made again."""
    return [job for job in distinct(jobs) if job.settings.config["store"] == "rerun" or job.finished() is None]


def costs(jobs: list[Job]) -> Costs:
    """What the finished runs of these folders took, of which those like these jobs tell most."""
    known = Costs()
    for job in distinct(jobs):
        metrics = job.finished()
        if metrics is not None and metrics.get("time/total_s"):
            known.add(job.kind, metrics["time/total_s"])
    return known


def mark(jobs: list[Job], identity: str) -> None:
    """Tag the runs of a sweep in their logger, where that knows tags."""
    for job in jobs:
        tags = job.settings.config["logger"].get("tags")
        if isinstance(tags, list) and f"sweep-{identity}" not in tags:
            tags.append(f"sweep-{identity}")


def write_plan(call: Call, identity: str, more: dict[str, Any] | None = None) -> Path:
    """sweep.json, which says what the sweep is made of; its folder comes back."""
    folder = call.jobs[0].outputs / "sweeps" / identity
    varied = list(dict.fromkeys(key for job in call.jobs for key in job.choice))
    told = {"sweep_id": identity, "experiment": call.experiment, "varied": varied, "runs": _rows(call)} | (more or {})
    replace_text(folder / "sweep.json", json.dumps(told, indent=2) + "\n")
    return folder


def write_results(call: Call, folder: Path) -> None:
    """results.json: what came of each job, the same to the byte however often the sweep was killed."""
    rows = [row | _came_of(job) for row, job in zip(_rows(call), call.jobs, strict=True)]
    replace_text(folder / "results.json", json.dumps(rows, indent=2, sort_keys=True) + "\n")


def _rows(call: Call) -> list[dict[str, Any]]:
    return [{"run_id": job.run_id, "label": job.settings.label, "choice": job.choice} for job in call.jobs]


def end(call: Call, board: Board, folder: Path) -> None:
    """Tell the logger of the whole, then write the results: where those are missing, something was cut off before."""
    if board.total or not (folder / "results.json").exists():
        _tell_logger(call, board, folder)
    write_results(call, folder)


def _tell_logger(call: Call, board: Board, folder: Path) -> None:
    """The comparison of a sweep as one more run of its logger, with the Pareto front as a picture."""
    section = call.jobs[0].settings.config["logger"]
    if not build(section, "logger").summarises:
        return
    groups = groups_of(read([folder]).runs)
    if not groups:
        return
    columns, rows = comparison_rows(groups)
    figure = pareto_figure(groups) if find_spec("matplotlib") else None
    title = call.experiment or f"sweep {folder.name}"
    finished = sum(job.finished() is not None for job in distinct(call.jobs))
    told = {"experiment": call.experiment, "overrides": list(call.master.hydra.overrides.task)}
    counts = {"finished": finished, "failed": len(board.failed)}
    with terminal.stage("the sweep as a whole, in its logger"):
        summarise_sweep(section, call.jobs[0].outputs, folder.name, title, columns, rows, figure, told, **counts)


def _came_of(job: Job) -> dict[str, Any]:
    metrics = job.finished()
    if metrics is None:
        return {"failed": failure(job.outputs, job.run_id) or "not run"}
    return {"metrics": lasting(metrics)}


def lasting(metrics: dict[str, Any]) -> dict[str, Any]:
    """Metrics without times, and without the copies that stand under plain names for the faster engine's.

    >>> lasting({"acc/sim": 0.9, "time/total_s": 3.0, "engine/winner": "a", "acc/engine": 0.8, "a/acc/engine": 0.8})
    {'acc/sim': 0.9, 'a/acc/engine': 0.8}
    """
    of_winner = f"{metrics.get('engine/winner')}/{{}}"
    return {
        name: value
        for name, value in metrics.items()
        if not any(f"/{part}" in f"/{name}" for part in OF_THE_MOMENT) and of_winner.format(name) not in metrics
    }


def failures(jobs: list[Job], board: Board) -> dict[str, tuple[str, str, Path]]:
    """run_id -> name, sentence and log of each job that failed now, or has no result."""
    failed = {}
    for job in distinct(jobs):
        if job.run_id in board.failed or job.finished() is None:
            why = board.failed.get(job.run_id) or failure(job.outputs, job.run_id) or "was not run"
            failed[job.run_id] = job.name, why, log_file(job.outputs, job.run_id)
    return failed


def show(call: Call, board: Board, folder: Path) -> None:
    """The table of a sweep, and where to look."""
    jobs = call.jobs
    rows = []
    for job in jobs:
        metrics = None if job.run_id in board.failed else job.finished()
        rows.append({"choice": job.choice, "metrics": metrics, "run_id": job.run_id})
    found = len(distinct(jobs)) - board.total
    if found:
        terminal.console.print(f"[dim]       -[/dim]  {found} of {len(distinct(jobs))} runs were finished before")
    if len(rows) <= MOST_ROWS:
        terminal.output.print(terminal.sweep_table(rows))
        terminal.output.print(f"formats of weights and activations: {_formats(jobs)}", markup=False)
    terminal.output.print(f"results in {folder}; compare them with: qexp compare {folder}", markup=False)


def _formats(jobs: list[Job]) -> str:
    """What the names in a table mean, each once."""
    recipes = [job.settings.recipe for job in jobs if job.settings.method != "fp32"]
    pairs = dict.fromkeys(f"{recipe.weight.grid}, {recipe.activation.grid}" for recipe in recipes)
    return "; ".join(pairs) or "float32"


def dry_run(call: Call) -> int:
    """Print what would run, and how long it may take by what finished runs took. Errors: those of run_sweep."""
    jobs = distinct(call.jobs)
    missing = {job.run_id for job in to_run(jobs)}
    known = costs(jobs)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in "run", "what", "state":
        table.add_column(heading, overflow="fold")
    table.add_column("about", justify="right", no_wrap=True)
    for job in jobs:
        why = failure(job.outputs, job.run_id)
        state = "finished" if job.run_id not in missing else f"failed before: {why}" if why else "to run"
        cost = known.guess(job.kind) if job.run_id in missing else None
        table.add_row(job.run_id, escape(job.name), escape(state), "" if cost is None else f"{cost:.1f} s")
    terminal.output.print(table)
    workers = launcher_of(call).at_once(to_run(jobs)) if call.is_sweep else 1
    guesses = [known.guess(job.kind) for job in jobs if job.run_id in missing]
    if not missing:
        about = "store=rerun makes them again"
    elif None in guesses:
        about = "no finished run like these says how long"
    else:
        beside = f" with {workers} at once" if workers > 1 else ""
        about = f"about {datetime.timedelta(seconds=round(sum(guesses) / workers))}{beside}"
    terminal.output.print(f"{len(missing)} of {len(jobs)} runs to make, {about}", markup=False)
    return 0
