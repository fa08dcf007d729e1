"""Hydra composes a config from files and overrides; what it refuses becomes one sentence."""

from __future__ import annotations

import argparse
import copy
import re
from pathlib import Path
from typing import Any, NoReturn

from hydra import compose
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString
from hydra.errors import HydraException
from hydra.version import setbase
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from qexp.sections import ConfigError

NO_PAIR = "must be KEY=VALUE; qexp --help shows the keys"
# How Hydra and OmegaConf say it, the most exact first.
NO_SUCH_KEY = (
    r"is not in struct\s+full_key: (\S+)",
    r"Could not override '([^']+)'\.\nTo append",
    r"Key '([^']+)' is not in struct",
)

# The launchers of others -> the package that has each, and the extra that brings it.
_SLURM = "hydra-submitit-launcher", "slurm"
EXTRAS = {"submitit_slurm": _SLURM, "submitit_local": _SLURM, "ray": ("hydra-ray-launcher", "ray")}


def conf_dir() -> str:
    """The folder of the configs: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / "conf"
    return str(inside if inside.is_dir() else package.parent / "conf")


class VerbParser(argparse.ArgumentParser):
    """Reads what a verb is given: KEY=VALUE words and --config-dir, to which it adds its own, as VerbParser("levels").

    Errors: ConfigError where argparse would exit.
    """

    def __init__(self, verb: str) -> None:
        super().__init__(prog=f"qexp {verb}", add_help=False, allow_abbrev=False)
        self.add_argument("overrides", nargs="*")
        self.add_argument("--config-dir", "-cd")

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; {self.prog} --help shows what can be said")


class _ReadOnce(CachingConfigRepository):
    """Hydra reads every file again for every job of a sweep; here each is read once in a call."""

    def __init__(self, delegate: Any) -> None:
        self.delegate, self.cache = delegate, {}

    def __deepcopy__(self, memo: dict) -> _ReadOnce:
        return self

    def load_config(self, config_path: str) -> Any:
        return copy.deepcopy(super().load_config(config_path=config_path))  # which Hydra goes on to change


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
    loader = GlobalHydra.instance().config_loader()
    loader.repository = _ReadOnce(loader.repository)


def parsed(overrides: list[str]) -> list[Override]:
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
    return [str(override.input_line) for override in parsed(overrides) if override.is_sweep_override()]


def composed(overrides: list[str], **options: Any) -> DictConfig:
    """The config that these overrides make. Errors: ConfigError."""
    try:
        return compose("config", overrides=overrides, **options)
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(explained(error, [text for text in overrides if "." not in text.partition("=")[0]])) from None
    except ValueError as error:  # how Hydra says that a group is set to null or to a number
        for override in parsed(overrides):
            names = options_of(override.key_or_group)
            if names and not isinstance(override.value(), (str, list, QuotedString)):
                raise ConfigError(f"{override.input_line}: no such option; allowed are {', '.join(names)}") from None
        raise ConfigError(str(error)) from None


def explained(error: Exception, choices: list[str] | None = None) -> str:
    """One sentence of one of Hydra's pages; `choices` are the options of groups, which decide what keys there are."""
    text = str(error)
    missing = re.search(r"Could not (?:find|load) '((?:hydra/)?[^'/]+)/([^']*)'", text)
    if missing and missing[2] in EXTRAS:
        named = re.search(r"^In 'hydra/launcher/(\w+)'", text)  # the file that builds on it
        package, extra = EXTRAS[missing[2]]
        launcher = named[1] if named else missing[2]
        return f"hydra/launcher={launcher}: needs {package}; install it with: pip install 'qexp[{extra}]'"
    if missing:
        return f"{missing[1]}={missing[2]}: no such option; allowed are {', '.join(options_of(missing[1]))}"
    found = [re.search(pattern, f"{text}\n{error.__cause__}") for pattern in NO_SUCH_KEY]
    if unknown := next(filter(None, found), None):
        return f"{unknown[1]}: no such key{_siblings(unknown[1], choices or [])}"
    if error.__cause__ is not None:  # which says what Hydra met, after Hydra has said where
        text = f"{text} ({str(error.__cause__).splitlines()[0]})"
    return re.sub(r"\s+", " ", re.split(r"See https|Config search path", text)[0]).strip()


def options_of(group: str) -> list[str]:
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


class Composer:
    """Composes the jobs of a sweep: those that choose the same files share one composition, and differ in values."""

    def __init__(self) -> None:
        self._shared: dict[tuple[str, ...], DictConfig] = {}
        self._parsed: dict[str, tuple[Override, bool]] = {}

    def compose(self, overrides: list[str]) -> DictConfig:
        """What `composed` gives, to the letter. Errors: ConfigError."""
        choices, values = [], []
        for text in overrides:
            if text not in self._parsed:
                (override,) = parsed([text])
                self._parsed[text] = override, _chooses(override)
            override, is_choice = self._parsed[text]
            choices += [text] if is_choice else []
            values += [] if is_choice else [override]
        key = tuple(choices)
        if key not in self._shared:
            self._shared[key] = composed(choices)
        config = copy.deepcopy(self._shared[key])
        try:
            ConfigLoaderImpl._apply_overrides_to_config(values, config)
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(explained(error, choices)) from None
        return config


def is_group(key: str) -> bool:
    """Whether files are chosen by this key."""
    return GlobalHydra.instance().config_loader().repository.group_exists(key)


def _chooses(override: Override) -> bool:
    """Whether it chooses a file of a group; model={_target_: ...} does not."""
    return is_group(override.key_or_group) and not isinstance(override.value(), dict)
