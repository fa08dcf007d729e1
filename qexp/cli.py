"""The console entry: composes and checks every job of a call before the first one starts, then lets Hydra run them."""

from __future__ import annotations

import os
import re
import signal
import sys
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra import main as hydra_main
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from qexp.settings import ConfigError, Settings, settings
from qexp.store import StoreError, digest, read_metrics, run_id

USER_ERRORS = (ConfigError, StoreError, HydraException, OmegaConfBaseException, ValueError, OSError)


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
    GlobalHydra.instance().clear()
    if config_dir is not None and not Path(config_dir).is_dir():
        raise ConfigError(f"--config-dir={config_dir}: no such folder")
    with initialize_config_dir(conf_dir(), job_name="qexp", version_base="1.3"):
        where = [f"hydra.searchpath=[file://{Path(config_dir).resolve()}]"] if config_dir else []
        first = _compose(_plain(overrides), where, return_hydra_config=True)
        if not multirun and first.hydra.mode != RunMode.MULTIRUN:
            _refuse_sweeps(overrides)
            return [Job({}, settings(_compose(overrides, where)))]
        grid = [f"{key}={value}" for key, value in (first.hydra.sweeper.params or {}).items()]
        parsed = OverridesParser.create().parse_overrides([*grid, *overrides])
        varied = {override.get_key_element() for override in parsed if override.is_sweep_override()}
        (lines,) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
        return [Job(_choice(line, varied), settings(_compose(list(line), where))) for line in lines]


def is_sweep(jobs: list[Job]) -> bool:
    """Whether the jobs come from a grid."""
    return any(job.choice for job in jobs) or len(jobs) > 1


def _compose(overrides: list[str], where: list[str], **options: Any) -> DictConfig:
    try:
        return compose("config", overrides=[*overrides, *where], **options)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explained(error)) from None


def _plain(overrides: list[str]) -> list[str]:
    """The overrides without those that hold several values."""
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
    except HydraException as error:
        raise ConfigError(_explained(error)) from None
    return [text for text, override in zip(overrides, parsed, strict=True) if not override.is_sweep_override()]


def _refuse_sweeps(overrides: list[str]) -> None:
    several = [text for text in overrides if text not in _plain(overrides)]
    if several:
        raise ConfigError(f"{several[0]}: several values are a sweep, which needs -m (--multirun)")


def _choice(line: list[str], varied: set[str]) -> dict[str, str]:
    pairs = [override.partition("=") for override in line]
    return {key: value for key, _, value in pairs if key in varied}


def _explained(error: Exception) -> str:
    """One sentence of one of Hydra's pages."""
    text = str(error)
    missing = re.search(r"Could not find '([^']+)/([^'/]+)'", text)
    if missing and "Available options" in text:
        options = re.findall(r"^\t(\S+)$", text, re.M)
        return f"{missing[1]}={missing[2]}: no such option; allowed are {', '.join(options)}"
    unknown = re.search(r"Could not override '([^']+)'", text) or re.search(r"Key '([^']+)' is not in struct", text)
    if unknown:
        return f"{unknown[1]}: no such key{_siblings(unknown[1])}"
    return re.sub(r"\s+", " ", text.split("See https")[0]).strip()


def _siblings(key: str) -> str:
    node: Any = compose("config")
    for name in key.split(".")[:-1]:
        node = node.get(name) if isinstance(node, DictConfig) else None
    return f"; allowed are {', '.join(map(str, node))}" if isinstance(node, DictConfig) else ""


# Jobs of this process that raised; each has been reported.
_failed: list[str] = []


@hydra_main(version_base="1.3", config_path=conf_dir(), config_name="config")
def _task(config: DictConfig) -> None:
    import logging

    from qexp.run import run

    # Importing Lightning sets its own level; its tips and the warnings of libraries are not what the user asked for.
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")

    chosen = settings(config)
    try:
        run(chosen)
    except Exception as error:
        # A failed job of a sweep says so at once, and the others go on.
        _complain(error, f"{chosen.label}: ")
        _failed.append(run_id(chosen.config))


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; exits with 0, 1 (failed), 2 (asked for what cannot be) or 130 (interrupted)."""
    arguments = sys.argv[1:] if arguments is None else arguments
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    # So that errors come here as exceptions; Hydra prints pages and exits.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    sys.path.append(os.getcwd())  # a user's own classes lie where the command is given
    try:
        sys.exit(_main(arguments))
    except KeyboardInterrupt:
        print("qexp: interrupted", file=sys.stderr)
        sys.exit(130)
    except ConfigError as error:
        _complain(error)
        sys.exit(2)


def _main(arguments: list[str]) -> int:
    parsed = get_args_parser().parse_args(arguments)
    shows = parsed.help or parsed.hydra_help or parsed.cfg or parsed.info or parsed.shell_completion
    if shows:
        return _hydra(arguments)
    jobs = compose_jobs(parsed.overrides, parsed.multirun, parsed.config_dir)
    if is_sweep(jobs):
        sweep = digest([run_id(job.settings.config) for job in jobs])
        grouped = any(job.settings.config["logger"].get("group") for job in jobs)
        more = [] if grouped else [f"logger.group=sweep-{sweep}"]
        return _summary(jobs, _hydra([*arguments, *more]))
    return _hydra(arguments)


def _hydra(arguments: list[str]) -> int:
    """Hand over to Hydra; 1 when a job failed, which it has said itself."""
    sys.argv = ["qexp", *arguments]
    GlobalHydra.instance().clear()
    _failed.clear()
    try:
        _task()
    except Exception as error:
        _complain(error)
        return 1
    return 1 if _failed else 0


def _summary(jobs: list[Job], code: int) -> int:
    from qexp.report.terminal import output, sweep_table

    rows = []
    for job in jobs:
        identity = run_id(job.settings.config)
        folder = Path(job.settings.config["paths"]["outputs"]) / "runs" / identity
        metrics = None if identity in _failed else read_metrics(folder)
        rows.append({"choice": job.choice, "metrics": metrics, "run_id": identity})
    output.print(sweep_table(rows))
    failed = [row for row in rows if row["metrics"] is None]
    if failed:
        print(f"qexp: {len(failed)} of {len(rows)} runs failed", file=sys.stderr)
    return 1 if failed else code


def _complain(error: Exception, what: str = "") -> None:
    """One sentence on stderr; the traceback only for those who ask for it."""
    known = isinstance(error, USER_ERRORS)
    text = re.sub(r"\s*\n\s*", " ", str(error)).strip() or type(error).__name__
    print(f"qexp: {what}{text if known else f'{type(error).__name__}: {text}'}", file=sys.stderr)
    if os.environ.get("QEXP_TRACEBACK"):
        traceback.print_exception(error)
    elif not known:
        print("qexp: QEXP_TRACEBACK=1 shows where this happened", file=sys.stderr)
