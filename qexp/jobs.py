"""Composes and checks every job of a call before the first one starts; what Hydra refuses becomes one sentence."""

from __future__ import annotations

import logging
import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString
from hydra.errors import HydraException
from hydra.types import RunMode
from hydra.version import setbase
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from qexp.sections import ConfigError, build
from qexp.settings import Settings, require_packages, settings
from qexp.store import writable

NO_PAIR = "must be KEY=VALUE; qexp --help shows the keys"
# How Hydra and OmegaConf say it, the most exact first.
NO_SUCH_KEY = (
    r"is not in struct\s+full_key: (\S+)",
    r"Could not override '([^']+)'\.\nTo append",
    r"Key '([^']+)' is not in struct",
)


@dataclass(frozen=True)
class Job:
    """One run of a call: what was chosen on the command line for it, and its settings."""

    choice: dict[str, str]
    settings: Settings


def conf_dir() -> str:
    """The folder of the configs: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / "conf"
    return str(inside if inside.is_dir() else package.parent / "conf")


def compose_jobs(overrides: list[str], multirun: bool, config_dir: str | None = None) -> list[Job]:
    """Every job of a call, composed and checked. Errors: ConfigError."""
    start_hydra(config_dir)
    parsed, swept = _parsed(overrides), swept_of(overrides)
    first = composed([text for text in overrides if text not in swept], return_hydra_config=True)
    if not multirun and first.hydra.mode != RunMode.MULTIRUN:
        if swept:
            raise ConfigError(f"{swept[0]}: several values are a sweep, which needs -m (--multirun)")
        return [Job({}, settings(OmegaConf.masked_copy(first, [key for key in first if key != "hydra"])))]
    grid = _parsed([f"{key}={value}" for key, value in (first.hydra.sweeper.params or {}).items()]) + parsed
    last = {override.get_key_element(): override for override in grid}  # which wins
    varied = {key for key, override in last.items() if override.is_sweep_override()}
    try:
        (lines,) = BasicSweeper.split_arguments(grid, max_batch_size=None)
    except HydraException as error:
        raise ConfigError(explained(error)) from None
    if "experiment" in varied:
        _refuse_nested(last["experiment"])
    return [Job(_choice(line, varied), settings(composed(list(line)))) for line in lines]


def _refuse_nested(chosen: Override) -> None:
    """Hydra would run each experiment once and forget the sweep inside it."""
    for name in chosen.sweep_string_iterator():
        if composed([f"experiment={name}"], return_hydra_config=True).hydra.sweeper.params:
            raise ConfigError(f"experiment={name}: is a sweep of its own; run one such experiment at a time")


def require_places(jobs: list[Job]) -> None:
    """Refuse packages that are not there, folders that cannot be written and loggers that cannot work.

    Errors: ConfigError, StoreError.
    """
    for job in jobs:
        require_packages(job.settings)
    for outputs in dict.fromkeys(job.settings.config["paths"]["outputs"] for job in jobs):
        writable(Path(outputs))
        # A library imports matplotlib where it is installed, which makes folders in the home directory.
        os.environ.setdefault("MPLCONFIGDIR", str(Path(outputs).resolve() / "cache" / "matplotlib"))
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


def start_hydra(config_dir: str | None) -> None:
    """Let Hydra look into qexp's configs and the user's folder. Errors: ConfigError."""
    path = create_config_search_path(conf_dir())
    if config_dir is not None:
        if not config_dir or not Path(config_dir).is_dir():
            raise ConfigError(f"--config-dir={config_dir}: no such folder")
        path.prepend("command-line", f"file://{Path(config_dir).resolve()}", anchor="schema")
    setbase("1.3")
    GlobalHydra.instance().clear()
    Hydra.create_main_hydra2("qexp", path)


def is_sweep(jobs: list[Job]) -> bool:
    """Whether the jobs come from a grid."""
    return any(job.choice for job in jobs) or len(jobs) > 1


def _parsed(overrides: list[str]) -> list[Override]:
    """The overrides in Hydra's grammar. Errors: ConfigError for what it cannot read, and for deletions."""
    parser = OverridesParser.create(GlobalHydra.instance().config_loader())
    found = []
    for text in overrides:
        try:
            found += parser.parse_overrides([text])
        except HydraException as error:
            why = f"cannot be read ({str(error).splitlines()[0]})" if "=" in text else NO_PAIR
            raise ConfigError(f"{text}: {why}") from None
        if found[-1].is_delete():
            raise ConfigError(f"{text}: a key cannot be deleted; give it another value")
        if text.startswith("="):
            raise ConfigError(f"{text}: {NO_PAIR}")
    return found


def swept_of(overrides: list[str]) -> list[str]:
    """Those that hold several values."""
    return [str(override.input_line) for override in _parsed(overrides) if override.is_sweep_override()]


def composed(overrides: list[str], **options: Any) -> DictConfig:
    """The config that these overrides make. Errors: ConfigError."""
    try:
        return compose("config", overrides=overrides, **options)
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(explained(error, [text for text in overrides if "." not in text.partition("=")[0]])) from None
    except ValueError as error:  # how Hydra says that a group is set to null or to a number
        for override in _parsed(overrides):
            names = _options(override.key_or_group)
            if names and not isinstance(override.value(), (str, list, QuotedString)):
                raise ConfigError(f"{override.input_line}: no such option; allowed are {', '.join(names)}") from None
        raise ConfigError(str(error)) from None


def _choice(line: list[str], varied: set[str]) -> dict[str, str]:
    pairs = [override.partition("=") for override in line]
    return {key: value for key, _, value in pairs if key in varied}


def explained(error: Exception, choices: list[str] | None = None) -> str:
    """One sentence of one of Hydra's pages; `choices` are the options of groups, which decide what keys there are."""
    text = str(error)
    missing = re.search(r"Could not find '((?:hydra/)?[^'/]+)/([^']*)'", text)
    if missing:
        return f"{missing[1]}={missing[2]}: no such option; allowed are {', '.join(_options(missing[1]))}"
    found = [re.search(pattern, f"{text}\n{error.__cause__}") for pattern in NO_SUCH_KEY]
    if unknown := next(filter(None, found), None):
        return f"{unknown[1]}: no such key{_siblings(unknown[1], choices or [])}"
    if error.__cause__ is not None:  # which says what Hydra met, after Hydra has said where
        text = f"{text} ({str(error.__cause__).splitlines()[0]})"
    return re.sub(r"\s+", " ", re.split(r"See https|Config search path", text)[0]).strip()


def _options(group: str) -> list[str]:
    """The choices of a group; experiment/wu2020 is a group in a group."""
    found = GlobalHydra.instance().config_loader().get_group_options
    groups = found(group, ObjectType.GROUP) if group == "experiment" else []  # finetune/base is what others build on
    below = [f"{name}/{option}" for name in groups for option in found(f"{group}/{name}")]
    return [*found(group), *below]


def _siblings(key: str, choices: list[str]) -> str:
    try:
        node: Any = compose("config", overrides=choices)
    except (HydraException, OmegaConfBaseException, ValueError):  # which is another mistake
        node = compose("config")
    for name in key.split(".")[:-1]:
        node = node.get(name) if isinstance(node, DictConfig) else None
    return f"; allowed are {', '.join(map(str, node))}" if isinstance(node, DictConfig) else ""
