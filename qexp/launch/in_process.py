"""One job after the other in this process."""

from __future__ import annotations

from dataclasses import dataclass

from qexp.attempt import Attempt, Outcome, attempt
from qexp.jobs import Job
from qexp.report.board import Board


@dataclass(frozen=True)
class InProcess:
    """The least overhead; a job that crashes the process takes the others with it."""

    keep_going: bool = True

    def at_once(self, jobs: list[Job]) -> int:
        """How many run at the same time."""
        return 1

    def launch(self, jobs: list[Job], board: Board, patient: bool) -> None:
        """Attempt each job, and tell the board."""
        for job in jobs:
            board.started(job, live=False)
            ended = _attempt(job, patient)
            board.ended(job, ended)
            if ended.outcome is Outcome.FAILED and not self.keep_going:
                return


def _attempt(job: Job, patient: bool) -> Attempt:
    return attempt(job.settings, patient)
