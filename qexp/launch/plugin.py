"""What the launchers of Hydra's plugins share. They go to Slurm and Ray, each in a file of its own.

A plugin's own launch() waits for its jobs in order and gives up at the first that was lost. So a plugin says here which
options there are and what they mean, what goes to the cluster is the settings that were checked, whatever happens to
the configs in the meantime, and every job is waited for.
"""

from __future__ import annotations

import faulthandler
import os
import sys
from pathlib import Path

from qexp.attempt import Attempt, Outcome, attempt, sentence
from qexp.jobs import Job, silence_libraries
from qexp.sections import ConfigError
from qexp.settings import Settings
from qexp.store import record_failure


def attempted(settings: Settings, patient: bool, folder: str) -> Attempt:
    """On a cluster: attempt a run in the folder in which the command was given."""
    import qexp.run  # noqa: F401  # and with it Lightning, before that is silenced

    faulthandler.enable()  # into the log, which stderr is while a job runs
    silence_libraries()
    settings.config["progress"] = False
    try:
        os.chdir(folder)
        if folder not in sys.path:
            sys.path.append(folder)  # a user's own classes lie there
        return attempt(settings, patient, whole_process=True)
    except Exception as error:  # that nothing can be written, for one
        return Attempt(Outcome.FAILED, sentence(error), isinstance(error, ConfigError))


def lost(job: Job, why: str) -> Attempt:
    """What became of a job that did not say so itself; a failure goes on record."""
    if job.finished() is not None and job.settings.config["store"] != "rerun":  # it, or another process, ended well
        return Attempt(Outcome.FINISHED)
    record_failure(job.outputs, job.run_id, job.settings.label, why)
    return Attempt(Outcome.FAILED, why)


def readable(path: Path) -> Path:
    """As seen from here, where it lies below."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
