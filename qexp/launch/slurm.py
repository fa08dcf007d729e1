"""Jobs of a Slurm cluster, by hydra-submitit-launcher: one array for a sweep, and each of its jobs waited for."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import os
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from qexp.attempt import Attempt
from qexp.jobs import Job
from qexp.launch.plugin import attempted, lost, readable
from qexp.report import terminal
from qexp.report.board import Board
from qexp.sections import ConfigError
from qexp.settings import Settings

COMMANDS = "sbatch", "srun", "squeue", "scancel"
LOOK_S = 1.0  # between looks for results, which are files
ASK_S = 2.0, 30.0  # between questions to Slurm, which serves others too: at first, and in the long run
LATE_S = {"slurm": 60.0, "local": 1.0}  # until the result of a job that has ended must be seen on a shared file system

# States after which a job does not run again, and what the user may change about some of them.
COMPLETED, GONE = "COMPLETED", "GONE"
ENDED = {"BOOT_FAIL", "CANCELLED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "REVOKED", "TIMEOUT"}
KEYS = {"OUT_OF_MEMORY": "mem_gb", "TIMEOUT": "timeout_min"}


class Told(NamedTuple):
    """What a cluster says of a job."""

    state: str
    reason: str = ""

    def sentence(self, log: Path) -> str:
        """For the user, with the first error in the job's log where Slurm gives no reason.

        >>> Told("OUT_OF_MEMORY").sentence(Path("none"))
        'OUT_OF_MEMORY (hydra.launcher.mem_gb sets how much there is)'
        >>> Told("NODE_FAIL", "NodeDown").sentence(Path("none"))
        'NODE_FAIL (NodeDown)'
        """
        if self.state in (COMPLETED, GONE):
            return "it left no result"
        reason = self.reason
        if self.state in KEYS:
            reason = f"hydra.launcher.{KEYS[self.state]} sets how much there is"
        elif self.state == "FAILED":
            lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
            reason = next((line for line in lines if "rror" in line), reason)
        return f"{self.state}{f' ({reason})' if reason not in ('', 'None') else ''}"


@dataclass(frozen=True)
class Submitit:
    """Hands jobs to Slurm, or to processes of this machine in the same way; `options` are those of the plugin."""

    name: str
    cluster: str  # slurm | local
    options: dict[str, Any]

    def at_once(self, jobs: list[Job]) -> int:
        """How many run at the same time, if the cluster has room for them."""
        return max(1, min(len(jobs), self.options.get("array_parallelism") or len(jobs)))

    def launch(self, jobs: list[Job], board: Board, patient: bool) -> None:
        """Attempt all jobs on the cluster, and tell the board; what is left when this is stopped is cancelled.

        Errors: ConfigError where they cannot be submitted.
        """
        if not jobs:
            return
        board.workers = self.at_once(jobs)
        waiting = dict(zip(self._submitted(jobs, patient), jobs, strict=True))
        arrays = ", ".join(dict.fromkeys(handle.job_id.partition("_")[0] for handle in waiting))
        told = "Ctrl-C cancels them; they go on where this process is killed or its terminal closed"
        terminal.console.print(f"{len(jobs)} jobs are with {self.cluster} as {arrays}. {told}", soft_wrap=True)
        try:
            self._follow(waiting, board)
        except BaseException:
            if waiting:
                self._cancel(list(waiting))
                terminal.console.print(f"qexp: cancelled {len(waiting)} jobs of {arrays}", soft_wrap=True)
            raise

    def _submitted(self, jobs: list[Job], patient: bool) -> list[Any]:
        import submitit
        from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf

        for command in COMMANDS if self.cluster == "slurm" else ():
            if shutil.which(command) is None:
                raise ConfigError(f"hydra/launcher={self.name}: there is no {command} here; give this on a Slurm node")
        common = {field.name for field in dataclasses.fields(BaseQueueConf)}
        options = {key: value for key, value in self.options.items() if value is not None}
        folder = options.pop("submitit_folder")
        options.pop("max_num_timeout", None)  # a run has no state to go on from; the same command tries it again
        named = {key if key in common else f"{self.cluster}_{key}": value for key, value in options.items()}
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):  # submitit prints what it raises
                executor = submitit.AutoExecutor(folder, cluster=self.cluster)
                executor.update_parameters(**named)
                limit = options.get("timeout_min")
                each = [job.settings for job in jobs]
                return executor.map_array(work, each, *map(itertools.repeat, (patient, os.getcwd(), limit)))
        except Exception as error:  # whatever a cluster may answer
            why = " ".join(str(error).replace("sbatch: error: ", "").split())
            raise ConfigError(f"hydra/launcher={self.name}: the jobs were refused: {why}") from None

    def _follow(self, waiting: dict[Any, Job], board: Board) -> None:
        start, asked, running, ended_at = time.monotonic(), float("-inf"), set(), {}
        told: dict[str, Told] = {}
        while waiting:
            now = time.monotonic()
            if now - asked >= min(max(ASK_S[0], (now - start) / 20), ASK_S[1]):
                told, asked = self._ask(list(waiting), told), now
            for handle, job in list(waiting.items()):
                state = told.get(handle.job_id, Told("UNKNOWN")).state
                if state in (COMPLETED, GONE):
                    ended_at.setdefault(handle, now)
                result = _result(handle)
                over = state in ENDED or now - ended_at.get(handle, now) > LATE_S[self.cluster]
                if handle not in running and (state == "RUNNING" or result is not None or over):
                    board.started(job)
                    running.add(handle)
                if result is not None or over:
                    del waiting[handle]
                    board.ended(job, _came_of(job, handle, result, told.get(handle.job_id)))
            board.refresh()
            if waiting:
                time.sleep(LOOK_S)

    def _ask(self, handles: list[Any], before: dict[str, Told]) -> dict[str, Told]:
        """What is known of each job now; of all what was known before, where Slurm does not answer."""
        if self.cluster != "slurm":
            states = {"RUNNING": "RUNNING", "INTERRUPTED": "FAILED"}
            return {handle.job_id: Told(states.get(handle.state, COMPLETED)) for handle in handles}
        arrays = ",".join(dict.fromkeys(handle.job_id.partition("_")[0] for handle in handles))
        command = ["squeue", f"--jobs={arrays}", "--states=all", "--array", "--noheader", "--format=%i|%T|%r"]
        answer = subprocess.run(command, capture_output=True, text=True)
        if answer.returncode and "Invalid job id" not in answer.stderr:
            return before
        rows = [line.split("|", 2) for line in answer.stdout.splitlines() if line.count("|") >= 2]
        found = {identity: Told(state, reason) for identity, state, reason in rows}
        return {handle.job_id: found.get(handle.job_id, Told(GONE)) for handle in handles}

    def _cancel(self, handles: list[Any]) -> None:
        if self.cluster == "slurm":
            subprocess.run(["scancel", *dict.fromkeys(handle.job_id.partition("_")[0] for handle in handles)])
        else:
            for handle in handles:
                handle.cancel()


def work(settings: Settings, patient: bool, folder: str, limit_min: int | None) -> Attempt:
    """What a job of the cluster does."""
    from submitit.core.job_environment import JobEnvironment

    from qexp.stopping import unwind_on_signals

    def no_more_time(number: int, frame: object) -> None:
        raise TimeoutError(f"its time is over (hydra.launcher.timeout_min={limit_min}), or others go first")

    unwind_on_signals()  # scancel
    signal.signal(JobEnvironment._usr_sig(), no_more_time)  # hydra.launcher.signal_delay_s before Slurm kills
    return attempted(settings, patient, folder)


def _result(handle: Any) -> tuple[str, Any] | None:
    from submitit.core.utils import pickle_load

    folder = handle.paths.folder
    with contextlib.suppress(OSError):
        folder.chmod(folder.stat().st_mode)  # so that a network file system looks anew
    path = handle.paths.result_pickle
    return pickle_load(path) if path.exists() else None


def _came_of(job: Job, handle: Any, result: tuple[str, Any] | None, told: Told | None) -> Attempt:
    outcome, content = result or ("error", "")
    if outcome == "success":
        return content
    log = handle.paths.stderr if handle.paths.stderr.exists() else handle.paths.folder
    why = content.strip().splitlines()[-1] if content else told.sentence(log)  # of a traceback, or Slurm's word
    return lost(job, f"job {handle.job_id} of the cluster: {why}; what the cluster kept of it is {readable(log)}")
