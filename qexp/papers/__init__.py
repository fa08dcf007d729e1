"""What papers found: one file for each experiment that repeats a table of theirs, `<experiment>.yaml`.

Each has source, trend, metric (the figure of ours that compares), unit, perhaps a note, and rows: a choice in our own
keys and words, the paper's network, its value, and that of the float network.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent
WORDS = ("source", "trend", "metric", "unit")


@dataclass(frozen=True)
class Row:
    """One figure of a table. Errors: ValueError naming the key."""

    choice: dict[str, Any]
    network: str
    value: float
    fp32: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.choice, dict) or not self.choice:
            raise ValueError(f"choice={self.choice!r}: must hold at least one key of ours")
        if not isinstance(self.network, str) or not self.network:
            raise ValueError(f"network={self.network!r}: must be a name")
        for name in "value", "fp32":
            number = getattr(self, name)
            if number is None and name == "fp32":
                continue
            if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number):
                raise ValueError(f"{name}={number!r}: must be a finite number")


@dataclass(frozen=True)
class Paper:
    """A table of a paper. Errors: ValueError naming the key."""

    source: str
    trend: str
    metric: str
    unit: str
    rows: tuple[Row, ...] = field(repr=False)
    note: str = ""

    def __post_init__(self) -> None:
        for name in (*WORDS, "note"):
            text = getattr(self, name)
            if not isinstance(text, str) or not (text or name == "note"):
                raise ValueError(f"{name}={text!r}: must be a text")
        if not self.rows:
            raise ValueError("rows: there must be at least one")


def load(experiment: str, folder: Path = FOLDER) -> Paper | None:
    """The table that an experiment repeats, None where there is none. Errors: ValueError, one sentence.

    >>> paper = load("wu2020/table3")
    >>> paper.rows[0].choice, paper.rows[0].value
    ({'granularity': 'per_channel', 'fold_batchnorm': False}, 71.59)
    """
    path = (folder / f"{experiment}.yaml").resolve()
    if not path.is_relative_to(folder.resolve()) or not path.is_file():
        return None
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or not isinstance(content.get("rows"), list):
            raise ValueError(f"must hold {', '.join(WORDS)} and a list of rows")
        return Paper(**(content | {"rows": tuple(_row(number, row) for number, row in enumerate(content["rows"]))}))
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from None


def _row(number: int, row: Any) -> Row:
    try:
        return Row(**row)
    except (TypeError, ValueError) as error:
        raise ValueError(f"rows[{number}]: {error}") from None
