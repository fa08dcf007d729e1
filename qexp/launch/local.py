"""Processes on this machine, each with its own cores: a job that dies takes nothing with it."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from multiprocessing import connection
from typing import Any

from qexp.attempt import Attempt, Outcome
from qexp.jobs import Job
from qexp.report.board import Board
from qexp.sections import ConfigError
from qexp.settings import Settings
from qexp.store import record_failure

REFRESH_S = 0.25
GRACE_S = 10.0  # for a process that was asked to end: W&B learns of the end, files are closed


@dataclass(frozen=True)
class Local:
    """Jobs in worker processes.

    Errors: ValueError for an option out of range.
    """

    workers: int | str = "auto"
    threads: int | str = "auto"
    devices: list[int] = field(default_factory=list)
    limit_s: float | None = None
    keep_going: bool = True

    def __post_init__(self) -> None:
        for name in "workers", "threads":
            value = getattr(self, name)
            if value != "auto" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name}={value!r}: must be auto or a whole number of at least 1")
        if self.limit_s is not None and not (isinstance(self.limit_s, (int, float)) and self.limit_s > 0):
            raise ValueError(f"limit_s={self.limit_s!r}: must be a number of seconds above 0, or null")
        if not isinstance(self.devices, list) or not all(isinstance(n, int) and n >= 0 for n in self.devices):
            raise ValueError(f"devices={self.devices!r}: must be a list of numbers of GPUs, as in [0,1]")
        if not isinstance(self.keep_going, bool):
            raise ValueError(f"keep_going={self.keep_going!r}: must be true or false")

    def slots(self, jobs: list[Job]) -> list[Slot]:
        """The cores and the device of each worker.

        >>> [slot.cores for slot in Local(workers=2, threads=1).slots([])] if len(cores()) >= 2 else [[0], [1]]
        [[0], [1]]
        """
        there = cores()
        threads = max([1, *map(_threads, jobs)]) if self.threads == "auto" else self.threads
        fitting = max(1, len(there) // threads)
        workers = fitting if self.workers == "auto" else self.workers
        # With more workers than fit, each may run everywhere, and the system shares out.
        shares = [there[n * threads : (n + 1) * threads] if workers <= fitting else there for n in range(workers)]
        return [
            Slot(share, self.devices[n % len(self.devices)] if self.devices else None) for n, share in enumerate(shares)
        ]

    def at_once(self, jobs: list[Job]) -> int:
        """How many run at the same time."""
        return min(len(self.slots(jobs)), max(len(jobs), 1))

    def launch(self, jobs: list[Job], board: Board, patient: bool) -> None:
        """Attempt each job in one of the workers, and tell the board."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["qexp.launch.preload"])
        slots = self.slots(jobs)[: len(jobs)]
        board.workers = len(slots)
        workers = [Worker(context, slot, patient) for slot in slots]
        queue = deque(jobs)
        try:
            while queue or any(worker.job for worker in workers):
                for worker in workers:
                    if queue and worker.job is None:
                        worker.start(queue.popleft())
                        board.started(worker.job)
                _wait(workers)
                for worker in workers:
                    ended = worker.look(self.limit_s)
                    if ended is not None:
                        board.ended(worker.job, ended)
                        worker.job = None
                        if ended.outcome is Outcome.FAILED and not self.keep_going:
                            return
                board.refresh()
        finally:
            _end(workers)


@dataclass(frozen=True)
class Slot:
    """What one worker has to itself."""

    cores: list[int]
    device: int | None = None


def cores() -> list[int]:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _threads(job: Job) -> int:
    trainer, engine = job.settings.config["trainer"], job.settings.config["engine"]
    return max(trainer["threads"] * trainer["devices"], engine["threads"])


class Worker:
    """A process for one job after the other, and a new one after it died."""

    def __init__(self, context: Any, slot: Slot, patient: bool) -> None:
        self._context, self._slot, self._patient = context, slot, patient
        self.job: Job | None = None
        self.process: Any = None
        self.pipe: Any = None
        self._since = 0.0

    def start(self, job: Job) -> None:
        """Hand over a job."""
        if self.process is None or not self.process.is_alive():
            self.pipe, its_end = self._context.Pipe()
            self.process = self._context.Process(target=_work, args=(its_end, self._slot, self._patient))
            self.process.start()
            its_end.close()
        self.job, self._since = job, time.perf_counter()
        self.pipe.send(job.settings)

    def look(self, limit_s: float | None) -> Attempt | None:
        """How the job ended, or None while it runs."""
        if self.job is None:
            return None
        try:
            if self.pipe.poll():
                return self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(GRACE_S)
        if not self.process.is_alive():
            return self._failed(_how(self.process.exitcode))
        if limit_s is not None and time.perf_counter() - self._since > limit_s:
            self.ask_to_end()
            self.end()
            return self._failed(f"stopped after hydra.launcher.limit_s={limit_s:g} seconds")
        return None

    def _failed(self, sentence: str) -> Attempt:
        record_failure(self.job.outputs, self.job.run_id, self.job.settings.label, sentence)
        return Attempt(Outcome.FAILED, sentence)

    def ask_to_end(self) -> None:
        """Let it unwind; one that has nothing to do ends when its pipe does."""
        if self.process is not None and self.process.is_alive():
            self.process.terminate() if self.job else self.pipe.close()

    def end(self) -> None:
        """Wait for it a while, then end it."""
        if self.process is not None:
            self.process.join(GRACE_S)
            if self.process.is_alive():
                self.process.kill()
                self.process.join()


def _wait(workers: list[Worker]) -> None:
    """Until a worker has something to tell, or the board wants to be drawn anew."""
    at_work = [worker for worker in workers if worker.job]
    connection.wait([source for w in at_work for source in (w.pipe, w.process.sentinel)], timeout=REFRESH_S)


def _end(workers: list[Worker]) -> None:
    for worker in workers:
        worker.ask_to_end()
    for worker in workers:
        worker.end()


def _how(code: int | None) -> str:
    """Why a process ended that had a job."""
    if code is not None and code < 0:
        why = " (the system does that when memory runs out)" if -code == signal.SIGKILL else ""
        return f"its process was ended by {signal.Signals(-code).name}{why}"
    return f"its process ended with exit code {code}"


def _work(pipe: Any, slot: Slot, patient: bool) -> None:
    """In a worker: attempt what comes through the pipe, to the end of the sweep."""
    from qexp.attempt import attempt
    from qexp.jobs import silence_libraries
    from qexp.stopping import unwind_on_signals

    unwind_on_signals()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, slot.cores)
    if slot.device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(slot.device)
    silence_libraries()
    faulthandler.enable()  # into the log, which stderr is while a job runs
    while True:
        try:
            settings: Settings = pipe.recv()
        except EOFError:
            return
        settings.config["progress"] = False
        pipe.send(_attempted(attempt, settings, patient))


def _attempted(attempt: Any, settings: Settings, patient: bool) -> Attempt:
    from qexp.attempt import sentence

    try:
        return attempt(settings, patient, whole_process=True)
    except Exception as error:  # that nothing can be written, for one
        return Attempt(Outcome.FAILED, sentence(error), isinstance(error, ConfigError))


def _end_with_parent() -> None:
    """A sweep that is killed leaves no worker behind."""
    connection.wait([multiprocessing.parent_process().sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_S)
    sys.stderr.flush()
    os._exit(1)
