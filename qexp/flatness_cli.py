"""qexp flatness: four minima of one network beside each other, float, PTQ and two of QAT, as a table and figures."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from qexp.composing import VerbParser, start_hydra, swept_of
from qexp.jobs import Job, compose_one, require_places, require_ready
from qexp.launch.in_process import InProcess
from qexp.levels_cli import require_drawable, require_matplotlib
from qexp.report.board import Board
from qexp.sections import ConfigError
from qexp.store import StoreError, run_folder

USAGE = """\
qexp flatness: how flat the minima of float training, PTQ and QAT are, as a table and figures

usage: qexp flatness [--seeds N] [--output FILE] [--config-dir DIR] [KEY=VALUE ...]

  qexp flatness quantizer=int4
  qexp flatness model=mobilenet quantizer=int4 --seeds 3
  qexp flatness quantizer=int4 finetune.epochs=10 --output flat.svg

KEY=VALUE is as in a run, and refused alike (qexp --help). Four runs are made with flatness=true: method=fp32,
method=ptq, finetune=ste and finetune=stochastic; a finetune.KEY=VALUE is for the last two. They simulate (engine=none)
unless an engine is chosen. Those that outputs/runs has are not made again.

  --seeds N          the same for N seeds from `seed` on; the table has means and 95 % t-intervals, the figures show
                     the first seed
  --output FILE      FILE.png or FILE.svg: the loss along a direction; that in a plane goes to FILE-plane beside it
                     (without it: <paths.outputs>/flatness/<run>.png)
  --config-dir DIR   configs of your own
"""
MINIMA = {
    "float": ["method=fp32"],
    "PTQ": ["method=ptq"],
    "QAT, STE": ["finetune=ste"],
    "QAT, stochastic": ["finetune=stochastic"],
}
OURS = "method", "finetune", "flatness"
MOST_SEEDS = 100
FILES = "flatness.csv", "flatness_plane.csv"


def main(arguments: list[str]) -> int:
    """Make the runs that are missing, compare and draw them. Errors: those of a run."""
    if {"--help", "-h"} & set(arguments):
        print(USAGE, end="")
        return 0
    given = _parsed(arguments)
    jobs = _jobs(given.overrides, given.seeds, given.config_dir)
    every = [job for of_one in jobs.values() for job in of_one]
    first = next(iter(jobs.values()))[0]
    path = Path(given.output) if given.output else _default_path(first)
    require_drawable(path, f"--output={path}" if given.output else "paths.outputs")
    require_places(every)
    require_matplotlib()
    _run([job for job in every if job.finished() is None])
    _show(jobs, path)
    return 0


def _parsed(arguments: list[str]) -> argparse.Namespace:
    parser = VerbParser("flatness")
    parser.add_argument("--seeds", default="1")
    parser.add_argument("--output")
    given = parser.parse_intermixed_args(arguments)
    if not re.fullmatch(r"\d{1,3}", given.seeds) or not 1 <= int(given.seeds) <= MOST_SEEDS:
        parser.error(f"--seeds={given.seeds}: must be a whole number from 1 to {MOST_SEEDS}")
    given.seeds = int(given.seeds)
    return given


def _jobs(overrides: list[str], seeds: int, config_dir: str | None) -> dict[str, list[Job]]:
    """The runs by the names of their minima, one for each seed. Errors: ConfigError."""
    start_hydra(config_dir)
    if swept := swept_of(overrides):
        raise ConfigError(f"{swept[0]}: several values, but qexp flatness looks at one choice (--seeds N varies seeds)")
    keys = [override.partition("=")[0].lstrip("+") for override in overrides]
    for key, override in zip(keys, overrides, strict=True):
        if key in OURS:
            raise ConfigError(f"{override}: qexp flatness chooses {key} itself")
    tuning = [override for key, override in zip(keys, overrides, strict=True) if key.startswith("finetune.")]
    others = [override for override in overrides if override not in tuning]
    if "engine" not in keys:
        others.append("engine=none")
    jobs = {}
    for name, own in MINIMA.items():
        chosen = [*others, *own, *(tuning if name.startswith("QAT") else []), "flatness=true"]
        first = _job(chosen, config_dir)
        rest = [_job([*chosen, f"seed={first.settings.seed + more}"], config_dir) for more in range(1, seeds)]
        jobs[name] = [first, *rest]
    return jobs


def _job(overrides: list[str], config_dir: str | None) -> Job:
    return compose_one(overrides, config_dir, "qexp flatness looks at")


def _folder(job: Job) -> Path:
    return run_folder(job.outputs, job.run_id)


def _title(job: Job) -> str:
    """Network and formats, without the seed."""
    recipe, network = job.settings.recipe, job.settings.config["model"]["_target_"].rpartition(".")[2]
    return f"{network}: weights {recipe.weight.grid} {recipe.weight.granularity}, activations {recipe.activation.grid}"


def _default_path(job: Job) -> Path:
    name = re.sub(r"[^A-Za-z0-9_.+-]+", "-", f"{_title(job)} s{job.settings.seed}")
    return job.outputs / "flatness" / f"{name}.png"


def _run(jobs: list[Job]) -> None:
    if not jobs:
        return
    require_ready(jobs)
    with Board(jobs) as board:
        InProcess(keep_going=False).launch(jobs, board, patient=True)
    for sentence in board.failed.values():
        raise ValueError(sentence)


def _show(jobs: dict[str, list[Job]], path: Path) -> None:
    from qexp.report import figures, landscape
    from qexp.report.flatness_table import flatness_table
    from qexp.report.terminal import output

    first, seeds = jobs["float"][0], [job.settings.seed for job in jobs["float"]]
    title = _title(first)
    over = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}, mean ± 95 % t-interval"
    metrics = {name: [job.finished() for job in of_one] for name, of_one in jobs.items()}
    output.print(flatness_table(metrics, f"{title}\n{over}"))
    read = {name: landscape.read_curve(_folder(of_one[0]) / FILES[0]) for name, of_one in jobs.items()}
    planes = {name: landscape.read_plane(_folder(of_one[0]) / FILES[1]) for name, of_one in jobs.items()}
    half_widths = {name: half_width for name, (_, half_width) in read.items()}
    caption, beside = title.replace(": ", "\n", 1) + f"; seed {seeds[0]}", path.with_stem(f"{path.stem}-plane")
    line = landscape.landscape_figure({n: curve for n, (curve, _) in read.items()}, half_widths["PTQ"], title=caption)
    try:
        figures.save(line, path)
        figures.save(landscape.contour_figure(planes, half_widths, title=caption), beside)
    except OSError as error:
        raise StoreError(f"{path}: cannot be written ({error.strerror or error})") from None
    output.print(f"figures in {path} and {beside}", markup=False)
