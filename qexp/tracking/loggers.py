"""What every logger can be told, and the two that need no W&B."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol


@dataclass(frozen=True)
class RunInfo:
    """What a logger is told when a run starts; `group` is the same for runs that differ in their seeds alone."""

    run_id: str
    name: str
    job_type: str
    config: dict[str, Any]
    outputs: Path
    group: str | None = None


class Histogram(NamedTuple):
    """`counts` of the values between each two of `edges`."""

    counts: list[float]
    edges: list[float]


class Logger(Protocol):
    """Takes the record of a run."""

    where: str
    lightning: Any  # what pl.Trainer gets as its logger while the float network trains

    def metrics(self, values: dict[str, Any]) -> None: ...

    def curve(self, name: str, rows: list[dict[str, float]]) -> None: ...

    def table(self, name: str, columns: list[str], rows: list[list[Any]]) -> None: ...

    def histograms(self, found: Iterable[tuple[str, Histogram]]) -> None: ...

    def figure(self, name: str, figure: Any) -> None: ...

    def models(self, files: list[Path], float_network: Path) -> None: ...

    def alert(self, title: str, text: str, failure: bool) -> None: ...


class NoLogger:
    """Keeps nothing: the folder of the run is the record."""

    where = ""
    lightning: Any = False
    summarises = False  # whether a sweep has a record of its own

    def __init__(self, group: str | None = None, tags: list[str] | None = None) -> None:
        self.group, self.tags = group, tags or []

    def check(self) -> None:
        """Refuse what cannot work before anything runs. Errors: ValueError."""

    @contextmanager
    def open(self, info: RunInfo) -> Iterator[Logger]:
        """Yield the logger for the time of one run."""
        yield self

    def metrics(self, values: dict[str, Any]) -> None:
        """Record the final metrics."""

    def curve(self, name: str, rows: list[dict[str, float]]) -> None:
        """Record rows that have an `epoch`."""

    def table(self, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        """Record a table."""

    def histograms(self, found: Iterable[tuple[str, Histogram]]) -> None:
        """Record histograms by their names; they are computed as they are asked for."""

    def figure(self, name: str, figure: Any) -> None:
        """Record a figure of matplotlib as an image."""

    def models(self, files: list[Path], float_network: Path) -> None:
        """Record the ONNX files of a run, and the folder of the float network that they come from."""

    def alert(self, title: str, text: str, failure: bool) -> None:
        """Send a message."""


class Csv(NoLogger):
    """outputs/csv/<run_id>/metrics.csv, as Lightning's CSVLogger writes it."""

    @contextmanager
    def open(self, info: RunInfo) -> Iterator[Logger]:
        from pytorch_lightning.loggers import CSVLogger

        folder = info.outputs / "csv" / info.run_id
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("metrics.csv"):
            old.unlink()
        self.lightning = CSVLogger(folder.parent, name=None, version=info.run_id)
        self.where = f"{folder / 'metrics.csv'}"
        try:
            yield self
        finally:
            self.lightning.save()

    def metrics(self, values: dict[str, Any]) -> None:
        numbers = {k: v for k, v in values.items() if isinstance(v, (int, float))}
        self.lightning.log_metrics(numbers)

    def curve(self, name: str, rows: list[dict[str, float]]) -> None:
        for row in rows:
            self.lightning.log_metrics(named(name, row))


def named(name: str, row: dict[str, float]) -> dict[str, float]:
    """A row of a curve under the names of its columns; `epoch`, the x-axis, keeps its own.

    >>> named("finetune/history", {"epoch": 0, "loss": 0.5})
    {'epoch': 0, 'finetune/history/loss': 0.5}
    """
    return {key if key == "epoch" else f"{name}/{key}": value for key, value in row.items()}
