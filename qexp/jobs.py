"""Every job of a call, composed and checked before the first one starts."""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import os
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from qexp.composing import Composer, composed, is_group, parsed, start_hydra, swept_of
from qexp.sections import ConfigError, build
from qexp.settings import Settings, require_packages, settings
from qexp.store import finished, run_id, writable

MANY = 200  # jobs, from which on it pays to compose them in several processes
# What a call as a whole decides; the other keys of Hydra have no effect here and are refused.
OF_THE_CALL = ("hydra/launcher", "hydra/sweeper", "hydra.launcher.", "hydra.sweeper.", "hydra.mode")


@dataclass(frozen=True)
class Job:
    """One run of a call: what was chosen on the command line for it, its settings, and what they are composed of."""

    choice: dict[str, str]
    settings: Settings
    overrides: tuple[str, ...] = ()

    @property
    def run_id(self) -> str:
        """Its identity."""
        return run_id(self.settings.config)

    @property
    def name(self) -> str:
        """What tells it from the other jobs of its sweep, or what it is."""
        return " ".join(f"{key}={value}" for key, value in self.choice.items()) or self.settings.label

    @property
    def kind(self) -> tuple[Any, ...]:
        """What its cost depends on most."""
        config, plan = self.settings.config, self.settings.finetune
        return self.settings.method, config["model"]["_target_"], plan.epochs if plan else 0, config["flatness"]

    @property
    def outputs(self) -> Path:
        """The folder below which everything it leaves is."""
        return Path(self.settings.config["paths"]["outputs"])

    def finished(self) -> dict[str, Any] | None:
        """The metrics of its result, where there is one. Errors: StoreError for a damaged record."""
        return finished(self.outputs, self.run_id)


@dataclass(frozen=True)
class Space:
    """The keys of a sweep with the values that the command line and an experiment file give them, in their order."""

    overrides: dict[str, Override]
    chosen: dict[str, str] = field(default_factory=dict)  # what else tells its jobs from others of the call
    _composer: Composer = field(default_factory=Composer, repr=False)
    _made: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def varied(self) -> list[str]:
        """The keys that have several values."""
        return [key for key, override in self.overrides.items() if override.is_sweep_override()]

    def values(self, key: str) -> list[str]:
        """Those of one key. Errors: ConfigError for an interval."""
        override = self.overrides[key]
        if not override.is_sweep_override():
            return [override.get_value_element_as_str()]
        if not override.is_discrete_sweep():
            raise ConfigError(f"{override.input_line}: has no list of values; hydra/sweeper=optuna searches intervals")
        return list(override.sweep_string_iterator())

    def job(self, choice: dict[str, str]) -> Job:
        """The job of one value for each varied key. Errors: ConfigError."""
        texts = [
            f"{key}={choice[key] if key in choice else override.get_value_element_as_str()}"
            for key, override in self.overrides.items()
        ]
        told = {key.lstrip("+"): value for key, value in choice.items()}
        return Job(self.chosen | told, settings(self._composer.compose(texts), self._made), tuple(texts))

    def grid(self, together: Any) -> list[Job]:
        """Every combination; keys of a group in `together` take their first values together, their second ones, ..."""
        combinations = itertools.product(*_axes(self, together))
        return _jobs(self, [{key: value for part in each for key, value in part.items()} for each in combinations])


@dataclass(frozen=True)
class Call:
    """What one command line asks for."""

    jobs: list[Job]
    is_sweep: bool = False
    experiment: str | None = None  # the one that was chosen
    master: DictConfig | None = None  # the config of a sweep with Hydra's part, which says where it runs
    space: Space | None = None  # of a search, whose jobs are those of each value once

    @property
    def hydra(self) -> DictConfig:
        """The sections launcher and sweeper, and what was chosen."""
        return self.master.hydra


def compose_call(overrides: list[str], multirun: bool, config_dir: str | None = None) -> Call:
    """Compose and check every job of a call. Errors: ConfigError."""
    start_hydra(config_dir)
    given = parsed(overrides)
    _refuse_without_effect(given)
    fixed = [str(override.input_line) for override in given if not override.is_sweep_override()]
    first = composed(fixed, return_hydra_config=True)
    if not multirun and first.hydra.mode != RunMode.MULTIRUN:
        for override in given:
            if override.is_sweep_override():
                raise ConfigError(f"{override.input_line}: several values are a sweep, which needs -m (--multirun)")
        config = OmegaConf.masked_copy(first, [key for key in first if key != "hydra"])
        return Call([Job({}, settings(config), tuple(fixed))])
    given = [override for override in given if not _is_of_the_call(override)]
    experiments = next((o for o in given if o.get_key_element() == "experiment" and o.is_sweep_override()), None)
    if experiments is not None:
        return Call(_of_experiments(experiments, given, first, fixed), True, None, first)
    chosen, space = first.hydra.runtime.choices.get("experiment"), _space(first, given)
    if first.hydra.runtime.choices["hydra/sweeper"] == "optuna":
        return Call(_probes(space), True, chosen, first, space)
    return Call(space.grid(first.hydra.sweeper.get("together")), True, chosen, first)


def compose_jobs(overrides: list[str], multirun: bool, config_dir: str | None = None) -> list[Job]:
    """The jobs of `compose_call`. Errors: ConfigError."""
    return compose_call(overrides, multirun, config_dir).jobs


def compose_one(overrides: list[str], config_dir: str | None, looks: str) -> Job:
    """The job of a verb that looks at one choice; `looks` says so, as "qexp levels shows". Errors: ConfigError."""
    start_hydra(config_dir)
    if swept := swept_of(overrides):
        raise ConfigError(f"{swept[0]}: several values, but {looks} one choice at a time")
    call = compose_call(overrides, multirun=False, config_dir=config_dir)
    if call.is_sweep:
        raise ConfigError(f"a sweep of {len(call.jobs)} choices, but {looks} one at a time")
    return call.jobs[0]


def _space(config: DictConfig, given: list[Override], chosen: dict[str, str] | None = None) -> Space:
    """The parameters of an experiment file and of the command line, which wins."""
    params = [f"{key}={value}" for key, value in (config.hydra.sweeper.get("params") or {}).items()]
    return Space({override.get_key_element(): override for override in [*parsed(params), *given]}, chosen or {})


def _of_experiments(several: Override, given: list[Override], first: DictConfig, fixed: list[str]) -> list[Job]:
    """The grids of several experiment files, each with its own parameters."""
    jobs, others = [], [override for override in given if override is not several]
    for name in several.sweep_string_iterator():
        this = f"experiment={name}"
        config = composed([*fixed, this], return_hydra_config=True)
        if config.hydra.launcher != first.hydra.launcher:
            raise ConfigError(f"{this}: has a launcher of its own; choose one for all with hydra/launcher=")
        space = _space(config, [*parsed([this]), *others], {"experiment": name})
        jobs += space.grid(config.hydra.sweeper.get("together"))
    return jobs


def _probes(space: Space) -> list[Job]:
    """Each value of a search once, with the first ones of the other keys: what can be checked before it."""
    values = {key: _some_values(space, key) for key in space.varied}
    first = {key: of_key[0] for key, of_key in values.items()}
    return [space.job(first), *(space.job(first | {key: each}) for key in values for each in values[key][1:])]


def _some_values(space: Space, key: str) -> list[str]:
    override = space.overrides[key]
    if override.is_discrete_sweep():
        return space.values(key)
    return [str(override.value().start), str(override.value().end)]


def _is_of_the_call(override: Override) -> bool:
    return override.get_key_element().lstrip("+~").startswith(OF_THE_CALL)


def _refuse_without_effect(given: list[Override]) -> None:
    for override in given:
        key = override.get_key_element().lstrip("+~")
        if key.startswith(("hydra.", "hydra/")) and not key.startswith(OF_THE_CALL):
            raise ConfigError(
                f"{override.input_line}: has no effect here; of Hydra's own keys there are hydra/launcher, "
                "hydra/sweeper and those below hydra.launcher and hydra.sweeper (paths.outputs says where results go)"
            )
        if key in ("hydra/launcher", "hydra/sweeper") and override.is_sweep_override():
            raise ConfigError(f"{override.input_line}: a sweep has one")


def _jobs(space: Space, choices: list[dict[str, str]]) -> list[Job]:
    """Many jobs are composed on all cores: each composition of files takes Hydra 50 ms."""
    if len(choices) < MANY or "torch" in sys.modules or "fork" not in multiprocessing.get_all_start_methods():
        return [space.job(choice) for choice in choices]
    files = [key for key in space.varied if is_group(key)]
    order = sorted(range(len(choices)), key=lambda number: [choices[number][key] for key in files])  # the same together
    _Forked.space = space
    workers = os.cpu_count() or 1
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
        made = pool.map(_Forked.job, [choices[n] for n in order], chunksize=-(-len(order) // (4 * workers)))
        jobs = dict(zip(order, made, strict=True))
    return [jobs[number] for number in range(len(choices))]


class _Forked:
    """What a forked process has inherited, instead of being sent it with every job."""

    space: Space

    @staticmethod
    def job(choice: dict[str, str]) -> Job:
        return _Forked.space.job(choice)


def _axes(space: Space, together: Any) -> list[list[dict[str, str]]]:
    """One axis for each varied key, or for all keys of a group that vary together. Errors: ConfigError."""
    values = {key: space.values(key) for key in space.varied}
    groups = [list(keys) for keys in together or []]
    told = f"hydra.sweeper.together={groups}"
    for keys in groups:
        if unknown := [key for key in keys if key not in values]:
            listed = ", ".join(values) or "none"
            raise ConfigError(f"{told}: {unknown[0]} has no list of values; those that have are {listed}")
        if len({len(values[key]) for key in keys}) != 1:
            counts = ", ".join(f"{key} has {len(values[key])}" for key in keys)
            raise ConfigError(f"{told}: keys that vary together need equally many values, but {counts}")
    named = [key for keys in groups for key in keys]
    if len(named) != len(set(named)):
        raise ConfigError(f"{told}: a key can vary together with one group only")
    group_of = {key: keys for keys in groups for key in keys}
    axes = [group_of.get(key, [key]) for key in values if key == group_of.get(key, [key])[0]]
    return [[dict(zip(keys, row, strict=True)) for row in zip(*map(values.get, keys), strict=True)] for keys in axes]


def require_places(jobs: list[Job]) -> None:
    """Refuse packages that are not there, folders that cannot be written and loggers that cannot work.

    Errors: ConfigError, StoreError.
    """
    for job in jobs:
        require_packages(job.settings)
    for outputs in dict.fromkeys(job.outputs for job in jobs):
        writable(outputs)
        # A library imports matplotlib where it is installed, which makes folders in the home directory.
        os.environ.setdefault("MPLCONFIGDIR", str(outputs.resolve() / "cache" / "matplotlib"))
    for section in {str(job.settings.config["logger"]): job.settings.config["logger"] for job in jobs}.values():
        try:
            build(section, "logger").check()
        except ValueError as error:
            raise ConfigError(str(error)) from None


def require_ready(jobs: list[Job]) -> None:
    """Build what each job of a sweep is made of, so that none fails hours later for a wrong option."""
    if not jobs:
        return  # without importing torch
    from qexp.prepare import ready

    silence_libraries()
    for job in jobs:
        ready(job.settings)


def silence_libraries() -> None:
    """After Lightning's import, which sets its own level: its tips are not what the user asked for."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
