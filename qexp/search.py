"""A search through settings with Optuna: its proposals are jobs like any other, their metrics its answers."""

from __future__ import annotations

import datetime
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import ValueType
from omegaconf import OmegaConf
from rich import box
from rich.markup import escape
from rich.table import Table

from qexp.jobs import Call, Job, Space, require_ready
from qexp.launch.launcher import launcher_of
from qexp.report import terminal
from qexp.report.board import Board
from qexp.sections import ConfigError, build
from qexp.store import digest, running, writable
from qexp.sweep import costs, distinct, end, mark, write_plan
from qexp.tracking.metrics import METRICS

SAMPLERS = ("tpe", "nsga2", "random")
INSTALL = "hydra/sweeper=optuna: needs optuna; install it with: pip install 'qexp[search]'"


@dataclass(frozen=True)
class Optuna:
    """What to search for and how long.

    Errors: ValueError for an option out of range.
    """

    params: dict[str, Any] = field(default_factory=dict)
    minimize: list[str] = field(default_factory=list)
    maximize: list[str] = field(default_factory=list)
    trials: int = 40
    at_once: int | str = "auto"
    sampler: str = "tpe"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in "minimize", "maximize":
            for metric in getattr(self, name):
                if metric not in METRICS and metric.partition("/")[2] not in METRICS:  # of one engine
                    raise ValueError(f"{name}={metric}: no such metric; docs/results.md has them all, as acc/drop")
        if not self.minimize and not self.maximize:
            raise ValueError("minimize=[]: with maximize=[] too there is nothing to search for")
        for name in "trials", "at_once":
            value = getattr(self, name)
            if not (name == "at_once" and value == "auto") and (type(value) is not int or value < 1):
                raise ValueError(f"{name}={value!r}: must be a whole number of at least 1")
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler={self.sampler!r}: allowed are {', '.join(SAMPLERS)}")

    @property
    def objectives(self) -> dict[str, str]:
        """Metric -> direction."""
        return dict.fromkeys(self.minimize, "minimize") | dict.fromkeys(self.maximize, "maximize")


def search_of(call: Call) -> Optuna:
    """What hydra.sweeper describes. Errors: ConfigError."""
    made = build(OmegaConf.to_container(call.hydra.sweeper, resolve=True), "hydra.sweeper")
    if not isinstance(made, Optuna):
        raise ConfigError("hydra/sweeper: is no search")
    return made


def run_search(call: Call) -> tuple[Call, Board, Path]:
    """Make trials until there are as many as asked for; the call with the jobs they were, and the folder of the record.

    The study lies below paths.outputs: the same search goes on where it was, after a kill too. Errors: ConfigError
    before any trial starts.
    """
    search, launcher = _required(call), launcher_of(call)
    require_ready(distinct(call.jobs))
    identity, outputs = study_id(call, search), call.jobs[0].outputs
    folder = writable(outputs / "sweeps" / identity)
    at_once = launcher.at_once(call.jobs) if search.at_once == "auto" else search.at_once
    with running(outputs, f"search-{identity}"):
        study = _study(folder, identity, search)
        distributions = {key: _distribution(call.space, key) for key in call.space.varied}
        board = Board([], costs(call.jobs))
        with board:
            while batch := _next_trials(study, search, distributions, at_once):
                jobs = {trial: _job(call.space, study, trial) for trial in batch}
                _launch(launcher, distinct(list(jobs.values())), board, identity)
                for trial, job in jobs.items():
                    _tell(study, trial, job, search)
    trials = [trial.number for trial in study.get_trials(deepcopy=False)]
    made = replace(call, jobs=[_job(call.space, study, number) for number in trials])
    front = list(dict.fromkeys(made.jobs[trial.number].run_id for trial in study.best_trials))
    write_plan(made, identity, {"objectives": search.objectives, "front": front})
    end(made, board, folder)
    return made, board, folder


def _required(call: Call) -> Optuna:
    """The search of a call that can be made. Errors: ConfigError."""
    try:
        import optuna
    except ImportError:
        raise ConfigError(INSTALL) from None
    if not call.space.varied:
        raise ConfigError("hydra/sweeper=optuna: no key has several values, as in quantizer.weight.bits=2,4,8")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return search_of(call)


def dry_search(call: Call) -> int:
    """Print what would be searched, and how far an earlier call came. Errors: those of run_search."""
    search, launcher = _required(call), launcher_of(call)
    identity, known = study_id(call, search), costs(call.jobs)
    folder = call.jobs[0].outputs / "sweeps" / identity
    study = _study(folder, identity, search) if (folder / "study.log").exists() else None
    ended = sum(trial.state.is_finished() for trial in study.get_trials(deepcopy=False)) if study else 0
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("key")
    table.add_column("what is tried", overflow="fold")
    for key in call.space.varied:
        table.add_row(escape(key), escape(str(call.space.overrides[key].input_line).partition("=")[2]))
    terminal.output.print(table)
    aims = ", ".join(f"{name} {direction}d" for name, direction in search.objectives.items())
    terminal.output.print(f"search {identity} by {search.sampler}: {aims}", markup=False)
    at_once = launcher.at_once(call.jobs) if search.at_once == "auto" else search.at_once
    left, guesses = max(search.trials - ended, 0), [known.guess(job.kind) for job in call.jobs]
    about = "no finished run like these says how long"
    if None not in guesses:
        seconds = round(left * sum(guesses) / len(guesses) / at_once)
        about = f"about {datetime.timedelta(seconds=seconds)}"
    told = f"{left} of {search.trials} trials to make, {at_once} at once"
    terminal.output.print(f"{told}, {about}" if left else f"{told}; more: hydra.sweeper.trials=N", markup=False)
    return 0


def show_front(call: Call, folder: Path) -> None:
    """The trials that no other one beats in every objective."""
    told = json.loads((folder / "sweep.json").read_text())
    jobs = [job for job in distinct(call.jobs) if job.run_id in told["front"]]
    rows = [{"choice": job.choice, "metrics": job.finished(), "run_id": job.run_id} for job in jobs]
    for row in rows:
        row["choice"] = row["choice"] | {name: f"{row['metrics'][name]:.6g}" for name in told["objectives"]}
    rows.sort(key=lambda row: row["metrics"][next(iter(told["objectives"]))])
    aims = ", ".join(f"{name} {direction}d" for name, direction in told["objectives"].items())
    title = f"Pareto front of {len(call.jobs)} trials: {aims}"
    terminal.output.print(terminal.sweep_table(rows, title=title))


def study_id(call: Call, search: Optuna) -> str:
    """The same for the same search: its space, what is fixed, its objectives and sampler; not how long it is."""
    space = {key: str(override.input_line) for key, override in call.space.overrides.items()}
    return digest([space, search.objectives, search.sampler, search.seed, call.jobs[0].run_id])


def _study(folder: Path, identity: str, search: Optuna) -> Any:
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    storage = JournalStorage(JournalFileBackend(str(folder / "study.log")))
    directions = list(search.objectives.values())
    return optuna.create_study(storage=storage, study_name=identity, directions=directions, load_if_exists=True)


def _distribution(space: Space, key: str) -> Any:
    """Choices are categories; a range of whole numbers and an interval have an order."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    override = space.overrides[key]
    value = override.value()
    if override.value_type is ValueType.RANGE_SWEEP and all(
        isinstance(number, int) for number in (value.start, value.stop, value.step)
    ):
        last = range(value.start, value.stop, value.step)[-1]
        return IntDistribution(value.start, last, step=value.step)
    if override.is_discrete_sweep():
        return CategoricalDistribution(space.values(key))
    return FloatDistribution(float(value.start), float(value.end), log="log" in value.tags)


def _next_trials(study: Any, search: Optuna, distributions: dict[str, Any], at_once: int) -> list[int]:
    """The trials that a kill has left open, then new ones, by what is known of those before.

    The sampler is seeded by the number of trials, so that its proposals depend on the record alone.
    """
    from optuna.trial import TrialState

    trials = study.get_trials(deepcopy=False)
    left_open = [trial.number for trial in trials if trial.state is TrialState.RUNNING and trial.params]
    if left_open:
        return left_open
    ended = [trial for trial in trials if trial.state in (TrialState.COMPLETE, TrialState.FAIL) and trial.params]
    study.sampler = _sampler(search, len(ended))
    return [study.ask(distributions).number for _ in range(min(at_once, search.trials - len(ended)))]


def _sampler(search: Optuna, ended: int) -> Any:
    from optuna.samplers import NSGAIISampler, RandomSampler, TPESampler

    kinds = {"tpe": TPESampler, "nsga2": NSGAIISampler, "random": RandomSampler}
    return kinds[search.sampler](seed=search.seed + ended)


def _job(space: Space, study: Any, number: int) -> Job:
    params = study.get_trials(deepcopy=False)[number].params
    return space.job({key: str(params[key]) for key in space.varied})


def _launch(launcher: Any, jobs: list[Job], board: Board, identity: str) -> None:
    missing = [job for job in jobs if job.finished() is None]
    require_ready(missing)
    mark(missing, identity)
    board.add(missing)
    launcher.launch(missing, board, patient=True)


def _tell(study: Any, number: int, job: Job, search: Optuna) -> None:
    """The metrics of a run; a run that failed, or has no such metric, is a failed trial."""
    from optuna.trial import TrialState

    metrics = job.finished() or {}
    values = [metrics.get(name) for name in search.objectives]
    if None in values:
        missing = [name for name, value in zip(search.objectives, values, strict=True) if value is None]
        if metrics:
            terminal.console.print(f"trial {number}: {job.settings.label} has no {', '.join(missing)}", markup=False)
        study.tell(number, state=TrialState.FAIL)
    else:
        study.tell(number, values)
