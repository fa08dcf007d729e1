"""One attempt at one run: never twice what is finished, never two at once, and what goes wrong is on record."""

from __future__ import annotations

import enum
import re
import traceback
from dataclasses import dataclass
from pathlib import Path

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from qexp import store
from qexp.report import terminal
from qexp.sections import ConfigError
from qexp.settings import Settings
from qexp.stopping import stopped_before

USER_ERRORS = (ConfigError, store.StoreError, HydraException, OmegaConfBaseException, ValueError, OSError)


class Outcome(enum.Enum):
    """What became of an attempt."""

    FINISHED = "finished"
    FOUND = "found"  # it was finished before
    FAILED = "failed"
    BUSY = "busy"  # another process is at it


@dataclass(frozen=True)
class Attempt:
    """How one ended; of a failed one the sentence, and whether the user asked for what cannot be."""

    outcome: Outcome
    sentence: str = ""
    refused: bool = False
    look: str = ""  # where the logger's record is, or how to see it


def attempt(settings: Settings, patient: bool = True, whole_process: bool = False) -> Attempt:
    """Run what is not finished, and leave its record, or that of its failure, and its log below paths.outputs.

    `patient` waits for another process that is at the same run; `whole_process` sends everything that this process
    writes to the log. Errors: StoreError where nothing can be written.
    """
    identity = store.run_id(settings.config)
    outputs = store.writable(Path(settings.config["paths"]["outputs"]))
    again = settings.config["store"] == "rerun"
    with store.running(outputs, identity, patient) as alone:
        if not alone:
            return Attempt(Outcome.BUSY)
        if store.finished(outputs, identity) is not None and not again:
            return Attempt(Outcome.FOUND)
        store.forget_failure(outputs, identity)
        with terminal.logging_to(store.log_file(outputs, identity), whole_process):
            try:
                from qexp.run import run

                return Attempt(Outcome.FINISHED, look=run(settings).where)
            except Exception as error:
                terminal.to_log(traceback.format_exc())
                if stopped := stopped_before(error):
                    raise stopped from None
                failed = Attempt(Outcome.FAILED, sentence(error), isinstance(error, ConfigError))
                store.record_failure(outputs, identity, settings.label, failed.sentence)
                return failed


def sentence(error: Exception) -> str:
    """What an exception says, in one line, after its class where that is none of the user's making."""
    text = re.sub(r"\s*\n\s*", " ", str(error)).strip() or type(error).__name__
    return text if isinstance(error, USER_ERRORS) else f"{type(error).__name__}: {text}"
