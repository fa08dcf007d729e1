"""What a sweep is doing: on a terminal a live table, elsewhere a line whenever a job ends."""

from __future__ import annotations

import datetime
import time
from typing import Any

from rich import box
from rich.console import Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from qexp.report import terminal

ENDED = {"finished": "[green]finished[/green]", "failed": "[red]failed[/red]", "busy": "later"}


class Costs:
    """What jobs of a kind have taken, to guess what others of it will."""

    def __init__(self) -> None:
        self._seen: dict[Any, list[float]] = {}

    def add(self, kind: Any, seconds: float) -> None:
        """One job of this kind took so long."""
        self._seen.setdefault(kind, []).append(seconds)

    def guess(self, kind: Any) -> float | None:
        """The mean of this kind, or of all where it has not been seen; None where nothing has.

        >>> costs = Costs(); costs.add("qat", 10.0); costs.add("ptq", 2.0)
        >>> costs.guess("ptq"), costs.guess("fp32")
        (2.0, 6.0)
        """
        seen = self._seen.get(kind) or [seconds for of_kind in self._seen.values() for seconds in of_kind]
        return sum(seen) / len(seen) if seen else None


class Board:
    """Counts of what is done, running, failed and left, and the time to go by what jobs have taken so far.

    `jobs` are those to be run; each has settings, a run_id and a kind.
    """

    def __init__(self, jobs: list[Any], costs: Costs | None = None, live: bool | None = None) -> None:
        self.workers = 1
        self.left = list(jobs)
        self.total = len(jobs)
        self.costs = costs or Costs()
        self.done = 0
        self.failed: dict[str, str] = {}  # run_id -> sentence
        self.refused: set[str] = set()
        self.busy: list[Any] = []
        self._running: dict[str, tuple[Any, float]] = {}
        self._live: Live | None = None
        self._draws = terminal.draws() if live is None else live

    def __enter__(self) -> Board:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_drawing()

    def add(self, jobs: list[Any]) -> None:
        """More jobs to run."""
        self.left += jobs
        self.total += len(jobs)

    def started(self, job: Any, live: bool = True) -> None:
        """A job runs now; `live` draws the board, which a job that writes to this terminal would disturb."""
        self.left.remove(job)
        self._running[job.run_id] = job, time.perf_counter()
        if not live:
            number = self.total - len(self.left)
            terminal.console.print(f"[bold]run {number} of {self.total}[/bold]  {escape(job.name)}")
        elif self._draws and self._live is None:
            self._live = Live(console=terminal.console, get_renderable=self._table, refresh_per_second=4)
            self._live.start()

    def ended(self, job: Any, attempt: Any) -> None:
        """A job has ended."""
        _, since = self._running.pop(job.run_id)
        seconds, outcome = time.perf_counter() - since, attempt.outcome.value
        if outcome == "busy":
            self.busy.append(job)
            return
        if outcome == "failed":
            self.failed[job.run_id] = attempt.sentence
            if attempt.refused:
                self.refused.add(job.run_id)
        else:
            self.done += 1
            if outcome == "finished":
                self.costs.add(job.kind, seconds)
        if self._live is None or outcome == "failed":
            ended = self.done + len(self.failed)
            said = f"{ENDED.get(outcome, outcome)}  {escape(job.name)}"
            told = f": {escape(attempt.sentence)}" if attempt.sentence else f"{self._to_go(', ')}"
            terminal.console.print(f"[dim]{seconds:6.1f} s[/dim]  {ended}/{self.total} {said}{told}", soft_wrap=True)

    def later(self) -> list[Any]:
        """The jobs that other processes were at, to be looked at again."""
        again, self.busy = self.busy, []
        self.left = [*self.left, *again]
        return again

    def refresh(self) -> None:
        """Draw anew what time has changed."""
        if self._live is not None:
            self._live.refresh()

    def seconds_to_go(self) -> float | None:
        """By the costs seen so far; None before the first job has ended."""
        now = time.perf_counter()
        waiting = [self.costs.guess(job.kind) for job in [*self.left, *self.busy]]
        running = [(self.costs.guess(job.kind), now - since) for job, since in self._running.values()]
        if None in waiting or any(cost is None for cost, _ in running):
            return None
        return (sum(waiting) + sum(max(cost - spent, 0.0) for cost, spent in running)) / self.workers

    def _to_go(self, before: str = "") -> str:
        seconds = self.seconds_to_go()
        if not seconds:
            return ""
        return f"{before}{datetime.timedelta(seconds=round(seconds))} to go"

    def _table(self) -> Group:
        counts = Text.assemble(
            (f"{self.done} done", "green"), "  ", f"{len(self._running)} running", "  ",
            (f"{len(self.failed)} failed", "red" if self.failed else ""), "  ",
            f"{len(self.left) + len(self.busy)} left", "  ", (self._to_go(), "bold"),
        )  # fmt: skip
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_header=False)
        table.add_column(justify="right")
        table.add_column(no_wrap=True, overflow="ellipsis")
        now = time.perf_counter()
        for job, since in self._running.values():
            table.add_row(f"{now - since:6.1f} s", escape(job.name))
        return Group(counts, table)

    def _stop_drawing(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
