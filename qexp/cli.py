"""The console entry: every job of a call is checked before the first one starts, then it is run, or the sweep."""

from __future__ import annotations

import atexit
import gc
import os
import sys
import traceback
from importlib import import_module
from pathlib import Path
from typing import NoReturn

from hydra import main as hydra_main
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from qexp import __version__
from qexp.attempt import USER_ERRORS, Outcome, attempt, sentence
from qexp.composing import composed, conf_dir, explained, start_hydra, swept_of
from qexp.jobs import Call, Job, compose_call, require_places, silence_libraries
from qexp.sections import ConfigError
from qexp.stopping import unwind_on_signals
from qexp.store import log_file, run_folder

# Other verbs than to run: the first word -> the module that has its `main(arguments) -> exit code`, and what it does.
VERBS = {
    "compare": ("qexp.compare_cli", "runs beside each other, as a table and as a page for the browser"),
    "doctor": ("qexp.doctor_cli", "whether this machine and this installation are fit, and what to do"),
    "flatness": ("qexp.flatness_cli", "how flat the minima of float training, PTQ and QAT are, as a table and figures"),
    "levels": ("qexp.levels_cli", "which numbers a format has, as tables and figures; nothing is trained"),
    "outliers": ("qexp.outliers_cli", "how far activations lie out, and in which channels, as a table and a picture"),
    "sync": ("qexp.tracking.sync", "uploads what W&B keeps on disk, also from a folder that was copied"),
}
DRY_RUN = "--dry-run"


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
        known = isinstance(error, USER_ERRORS)
        _complain(sentence(error) + ("" if known else " (QEXP_TRACEBACK=1 shows where this happened)"))
        if os.environ.get("QEXP_TRACEBACK"):
            traceback.print_exception(error)
        code = 2 if isinstance(error, ConfigError) else 1
    sys.exit(code)


def _main(arguments: list[str]) -> int:
    if "--version" in arguments:
        print(f"qexp {__version__}")
        return 0
    if arguments and arguments[0] in VERBS:
        return import_module(VERBS[arguments[0]][0]).main(arguments[1:])
    dry = DRY_RUN in arguments
    arguments = [text for text in arguments if text != DRY_RUN]
    parser = get_args_parser()
    parser.error = _refuse
    parsed = parser.parse_intermixed_args(arguments)
    for option in "config_name", "config_path", "experimental_rerun":
        if getattr(parsed, option):
            raise ConfigError(
                f"--{option.replace('_', '-')}: is not for qexp; --config-dir DIR adds configs of your own"
            )
    if parsed.help:
        return _help(parsed.overrides, parsed.config_dir)
    if parsed.shell_completion and parsed.overrides[:1] and parsed.overrides[0].startswith("query="):
        from qexp.completion import query

        return query(parsed.overrides[0].removeprefix("query="), list(VERBS))
    if parsed.hydra_help or parsed.cfg or parsed.info or parsed.shell_completion:
        start_hydra(parsed.config_dir)
        if not parsed.shell_completion:
            composed([text for text in parsed.overrides if text not in swept_of(parsed.overrides)])
        return _shown_by_hydra(arguments)
    call = compose_call(parsed.overrides, parsed.multirun, parsed.config_dir)
    require_places(call.jobs)
    if dry:
        from qexp.search import dry_search
        from qexp.sweep import dry_run

        return dry_run(call) if call.space is None else dry_search(call)
    return _sweep(call) if call.is_sweep else _single(call.jobs[0])


def _single(job: Job) -> int:
    from qexp.report import terminal

    silence_libraries()
    ended = attempt(job.settings)
    if ended.outcome is Outcome.FAILED:
        _complain(f"{ended.sentence}{'' if ended.refused else _see(log_file(job.outputs, job.run_id))}")
        return 2 if ended.refused else 1
    if ended.outcome is Outcome.FOUND:
        terminal.console.print("[dim]       -[/dim]  finished before; store=rerun makes it again")
    terminal.report(run_folder(job.outputs, job.run_id), job.settings, ended.look)
    return 0


def _sweep(call: Call) -> int:
    from qexp.report import terminal
    from qexp.sweep import failures, run_sweep, show

    if call.space is None:
        board, folder = run_sweep(call)
    else:
        from qexp.search import run_search, show_front

        call, board, folder = run_search(call)
        show_front(call, folder)
    show(call, board, folder)
    failed = failures(call.jobs, board)
    for name, why, log in failed.values():
        terminal.console.print(f"qexp: {name}: {why}{_see(log)}", markup=False, soft_wrap=True)
    if failed:
        runs = len({job.run_id for job in call.jobs})
        _complain(f"{len(failed)} of {runs} runs failed; the same command tries them again")
    return 1 if failed else 0


def _see(log: Path) -> str:
    return f" (its log: {log})" if log.exists() else ""


@hydra_main(version_base="1.3", config_path=conf_dir(), config_name="config")
def _nothing(config: DictConfig) -> None:
    """Hydra shows configs and its help; it runs nothing."""


def _shown_by_hydra(arguments: list[str]) -> int:
    sys.argv = ["qexp", *arguments]
    GlobalHydra.instance().clear()
    try:
        _nothing()
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explained(error)) from None
    return 0


def _help(words: list[str], config_dir: str | None) -> int:
    """The page about these words, or about all there is."""
    from qexp.help_page import page

    if words and words[0] in VERBS:
        return import_module(VERBS[words[0]][0]).main(["--help"])
    print(page(words, config_dir, {verb: purpose for verb, (_, purpose) in VERBS.items()}), end="")
    return 0


def _refuse(message: str) -> NoReturn:
    raise ConfigError(f"{message}; qexp --help shows what can be said")


def _complain(what: str) -> None:
    """One sentence on stderr."""
    print(f"qexp: {what}", file=sys.stderr)
