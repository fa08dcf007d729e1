"""Every job of a call, composed and checked before the first one starts."""

from __future__ import annotations

import itertools
import logging
import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from qexp.composing import Composer, composed, parsed, start_hydra
from qexp.sections import ConfigError, build
from qexp.settings import Settings, require_packages, settings
from qexp.store import finished, run_id, writable

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
class Call:
    """What one command line asks for."""

    jobs: list[Job]
    is_sweep: bool = False
    experiment: str | None = None  # the one that was chosen
    hydra: DictConfig = field(default_factory=OmegaConf.create)  # with the sections launcher and sweeper
    master: DictConfig | None = None  # the whole config of the call, which launchers of others compose jobs from
    fixed: tuple[str, ...] = ()  # overrides that hold for every job


def compose_call(overrides: list[str], multirun: bool, config_dir: str | None = None) -> Call:
    """Compose and check every job of a call. Errors: ConfigError."""
    start_hydra(config_dir)
    given = parsed(overrides)
    _refuse_without_effect(given)
    fixed = [str(override.input_line) for override in given if not override.is_sweep_override()]
    varied = [override for override in given if override.is_sweep_override()]
    first = composed(fixed, return_hydra_config=True)
    if not multirun and first.hydra.mode != RunMode.MULTIRUN:
        if varied:
            raise ConfigError(f"{varied[0].input_line}: several values are a sweep, which needs -m (--multirun)")
        config = OmegaConf.masked_copy(first, [key for key in first if key != "hydra"])
        return Call([Job({}, settings(config), tuple(fixed))])
    of_jobs = [override for override in given if not _is_of_the_call(override)]
    experiments = [override for override in varied if override.get_key_element() == "experiment"]
    if not experiments:
        jobs = _expanded(first, of_jobs)
    else:  # each brings a grid of its own
        jobs, others = [], [override for override in of_jobs if override not in experiments]
        for name in experiments[-1].sweep_string_iterator():
            own = composed([*fixed, f"experiment={name}"], return_hydra_config=True)
            if own.hydra.launcher != first.hydra.launcher:
                raise ConfigError(f"experiment={name}: has a launcher of its own; choose one for all (hydra/launcher=)")
            jobs += _expanded(own, [*parsed([f"experiment={name}"]), *others], {"experiment": name})
    chosen = None if experiments else first.hydra.runtime.choices.get("experiment")
    kept = tuple(str(override.input_line) for override in of_jobs if override not in varied)
    return Call(jobs, True, chosen, first.hydra, first, kept)


def compose_jobs(overrides: list[str], multirun: bool, config_dir: str | None = None) -> list[Job]:
    """The jobs of `compose_call`. Errors: ConfigError."""
    return compose_call(overrides, multirun, config_dir).jobs


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


def _expanded(first: DictConfig, overrides: list[Override], more: dict[str, str] | None = None) -> list[Job]:
    """The grid of an experiment file and of the command line, which wins: every combination of what is varied.

    Keys named in hydra.sweeper.together vary as one: the first values of each, the second ones, and so on.
    """
    params = [f"{key}={value}" for key, value in (first.hydra.sweeper.get("params") or {}).items()]
    last = {override.get_key_element(): override for override in [*parsed(params), *overrides]}
    values = {key: _values(override) for key, override in last.items()}
    varied = {key for key, override in last.items() if override.is_sweep_override()}
    composer, made, jobs = Composer(), {}, []
    for combination in itertools.product(*_axes(values, varied, first.hydra.sweeper.get("together"))):
        line = {key: value for part in combination for key, value in part.items()}
        texts = [f"{key}={line[key]}" for key in values]  # in the order in which they were given
        choice = (more or {}) | {key: line[key] for key in values if key in varied}
        jobs.append(Job(choice, settings(composer.compose(texts), made), tuple(texts)))
    return jobs


def _values(override: Override) -> list[str]:
    if not override.is_sweep_override():
        return [override.get_value_element_as_str()]
    if not override.is_discrete_sweep():
        raise ConfigError(f"{override.input_line}: has no list of values; hydra/sweeper=optuna searches intervals")
    return list(override.sweep_string_iterator())


def _axes(values: dict[str, list[str]], varied: set[str], together: Any) -> list[list[dict[str, str]]]:
    """One axis for each key, or for all keys of a group that vary together. Errors: ConfigError."""
    groups = [list(keys) for keys in together or []]
    told = f"hydra.sweeper.together={groups}"
    for keys in groups:
        if unknown := [key for key in keys if key not in varied]:
            raise ConfigError(f"{told}: {unknown[0]} has no list of values; those that have are {_listed(varied)}")
        if len({len(values[key]) for key in keys}) != 1:
            counts = ", ".join(f"{key} has {len(values[key])}" for key in keys)
            raise ConfigError(f"{told}: keys that vary together need equally many values, but {counts}")
    named = [key for keys in groups for key in keys]
    if len(named) != len(set(named)):
        raise ConfigError(f"{told}: a key can vary together with one group only")
    group_of = {key: keys for keys in groups for key in keys}
    axes = [group_of.get(key, [key]) for key in values if key == group_of.get(key, [key])[0]]
    return [[dict(zip(keys, row, strict=True)) for row in zip(*map(values.get, keys), strict=True)] for keys in axes]


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names)) or "none"


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
    from qexp.prepare import ready

    silence_libraries()
    for job in jobs:
        ready(job.settings)


def silence_libraries() -> None:
    """After Lightning's import, which sets its own level: its tips are not what the user asked for."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
