"""The console entry: has every job of a call checked before the first one starts, then lets Hydra run them."""

from __future__ import annotations

import atexit
import gc
import os
import re
import sys
import traceback
from importlib import import_module
from pathlib import Path
from typing import NoReturn

from hydra import main as hydra_main
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from qexp import __version__
from qexp.jobs import (
    Job,
    compose_jobs,
    composed,
    conf_dir,
    explained,
    is_sweep,
    require_places,
    require_ready,
    silence_libraries,
    start_hydra,
    swept_of,
)
from qexp.sections import ConfigError
from qexp.settings import Settings, settings
from qexp.stopping import unwind_on_signals
from qexp.store import StoreError, digest, read_metrics, run_id

USER_ERRORS = (ConfigError, StoreError, HydraException, OmegaConfBaseException, ValueError, OSError)

# Other verbs than to run: the first word -> the module that has its `main(arguments) -> exit code`, and what it does.
VERBS = {
    "compare": ("qexp.compare_cli", "runs beside each other, as a table and as a page for the browser"),
    "flatness": ("qexp.flatness_cli", "how flat the minima of float training, PTQ and QAT are, as a table and figures"),
    "levels": ("qexp.levels_cli", "which numbers a format has, as tables and figures; nothing is trained"),
}

# All jobs of this call, in order.
_planned: list[Job] = []
# run_id -> what ended a run of this process; None: it ended well.
_ended: dict[str, Exception | None] = {}


@hydra_main(version_base="1.3", config_path=conf_dir(), config_name="config")
def _task(config: DictConfig) -> None:
    chosen = settings(config)
    identity = run_id(chosen.config)
    if identity in _ended:  # a grid may say the same thing twice
        return
    sweeping = HydraConfig.get().mode == RunMode.MULTIRUN and len(_planned) != 1
    try:
        _run(chosen, sweeping)
        _ended[identity] = None
    except Exception as error:  # not raised here, where Hydra would print a page
        _ended[identity] = error
        if sweeping:  # the others go on
            _complain(error, f"{chosen.label}: ")


def _run(chosen: Settings, sweeping: bool) -> None:
    from qexp.report import terminal
    from qexp.run import run

    silence_libraries()
    if sweeping:
        number = f"run {HydraConfig.get().job.num + 1} of {len(_planned)}"
        terminal.console.print(f"[bold]{number}[/bold]  {chosen.label}")
    job = run(chosen)
    terminal.where(job) if sweeping else terminal.report(job)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; exits with 0, 1 (failed), 2 (asked for what cannot be), 130 or 143 (stopped)."""
    unwind_on_signals()
    atexit.register(gc.freeze)  # or the interpreter looks through all objects once more before it ends: a second
    # So that errors come here as exceptions; Hydra prints pages and exits.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        sys.path.append(os.getcwd())  # a user's own classes lie where the command is given
        code = _main(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, as in "qexp --help | head", has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except Exception as error:
        _complain(error)
        code = 2 if isinstance(error, ConfigError) else 1
    sys.exit(code)


def _main(arguments: list[str]) -> int:
    if "--version" in arguments:
        print(f"qexp {__version__}")
        return 0
    if arguments and arguments[0] in VERBS:
        return import_module(VERBS[arguments[0]][0]).main(arguments[1:])
    parser = get_args_parser()
    parser.error = _refuse
    parsed = parser.parse_intermixed_args(arguments)
    options = [text for text in arguments if text not in parsed.overrides]
    for option in "config_name", "config_path", "experimental_rerun":
        if getattr(parsed, option):
            raise ConfigError(
                f"--{option.replace('_', '-')}: is not for qexp; --config-dir DIR adds configs of your own"
            )
    if parsed.help or parsed.hydra_help or parsed.cfg or parsed.info or parsed.shell_completion:
        start_hydra(parsed.config_dir)
        composed([text for text in parsed.overrides if text not in swept_of(parsed.overrides)])
        try:
            return _hydra([*options, *parsed.overrides])
        finally:  # after its help Hydra exits
            if parsed.help:
                _print_verbs()
    jobs = compose_jobs(parsed.overrides, parsed.multirun, parsed.config_dir)
    require_places(jobs)
    _planned[:] = jobs
    if not is_sweep(jobs):
        return _hydra([*options, *parsed.overrides])
    require_ready(jobs)
    return _summary(jobs, _hydra([*options, *parsed.overrides, *_group(jobs)]))


def _print_verbs() -> None:
    print("Other verbs (qexp VERB --help):")
    for verb, (_, purpose) in VERBS.items():
        print(f"  qexp {verb:<12} {purpose}")


def _refuse(message: str) -> NoReturn:
    raise ConfigError(f"{message}; qexp --help shows what can be said")


def _group(jobs: list[Job]) -> list[str]:
    """The override that makes a sweep one group of the logger, where the user names none."""
    if all(job.settings.config["logger"].get("group", "") is None for job in jobs):
        return [f"logger.group=sweep-{digest([run_id(job.settings.config) for job in jobs])}"]
    return []


def _hydra(arguments: list[str]) -> int:
    """Hand over to Hydra; 1 when a job of a sweep failed, which it has said itself. Errors: that of a single run."""
    sys.argv = ["qexp", *arguments]
    GlobalHydra.instance().clear()
    _ended.clear()
    try:
        _task()
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explained(error)) from None
    failed = [error for error in _ended.values() if error is not None]
    if failed and len(_planned) == 1:
        raise failed[0]
    return 1 if failed else 0


def _summary(jobs: list[Job], code: int) -> int:
    from qexp.report.terminal import output, sweep_table

    rows = []
    for job in jobs:
        identity = run_id(job.settings.config)
        folder = Path(job.settings.config["paths"]["outputs"]) / "runs" / identity
        metrics = read_metrics(folder) if _ended.get(identity) is None else None
        rows.append({"choice": job.choice, "metrics": metrics, "run_id": identity})
    output.print(sweep_table(rows))
    output.print(f"formats of weights and activations: {_formats(jobs)}", markup=False)
    failed = [row["run_id"] for row in rows if row["metrics"] is None]
    if failed:
        print(f"qexp: {len(failed)} of {len(rows)} runs failed: {', '.join(dict.fromkeys(failed))}", file=sys.stderr)
    return 1 if failed else code


def _formats(jobs: list[Job]) -> str:
    """What the names in a table mean, each once."""
    recipes = [job.settings.recipe for job in jobs if job.settings.method != "fp32"]
    pairs = dict.fromkeys(f"{recipe.weight.grid}, {recipe.activation.grid}" for recipe in recipes)
    return "; ".join(pairs) or "float32"


def _complain(error: Exception, what: str = "") -> None:
    """One sentence on stderr; the traceback only for those who ask for it."""
    known = isinstance(error, USER_ERRORS)
    text = re.sub(r"\s*\n\s*", " ", str(error)).strip() or type(error).__name__
    hint = "" if known else " (QEXP_TRACEBACK=1 shows where this happened)"
    print(f"qexp: {what}{text if known else f'{type(error).__name__}: {text}'}{hint}", file=sys.stderr)
    if os.environ.get("QEXP_TRACEBACK"):
        traceback.print_exception(error)
