"""A list of levels that the user gives. Importing this file needs no torch."""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from qexp.quant.levels import LevelGrid

MOST_LEVELS = 2**16  # as integers of 16 bits have


@dataclass(frozen=True)
class Levels(LevelGrid):
    """Any list of levels, given or read from a text file: one level a line, and after it the threshold above it.

    Thresholds may be left out; they are then in the middle. `#` starts a comment.

    >>> Levels(values=(-1, 0, 0.5, 2)).bits
    2
    """

    values: tuple[float, ...] | None = None
    thresholds: tuple[float, ...] | None = None
    file: str | None = field(default=None, compare=False)
    name: str = "levels"

    def __post_init__(self) -> None:
        levels, thresholds = self.values, self.thresholds
        if self.file is not None and not isinstance(self.file, (str, Path)):
            raise ValueError(f"file={self.file!r}: must name a text file with one level a line")
        if self.file is not None and levels is None:
            levels, thresholds = _read_levels(self.file)
        where = "values" if self.file is None else f"file={self.file}"
        if levels is None:
            raise ValueError("file=None: must name a text file with one level a line")
        levels = _numbers(where, "level", levels)
        if len(levels) < 2:
            raise ValueError(f"{where}: holds {len(levels)} levels, at least 2 are needed")
        if len(levels) > MOST_LEVELS:
            raise ValueError(f"{where}: holds {len(levels)} levels, at most {MOST_LEVELS} are allowed")
        _require_increasing(where, "levels", levels)
        if not 2.0**-100 <= max(map(abs, levels)) <= 2.0**100:
            raise ValueError(f"{where}: levels must lie between -2^100 and 2^100, not all within 2^-100")
        levels = _float32(levels)
        _require_increasing(where, "levels as float32", levels)
        if thresholds is not None:
            thresholds = _float32(_numbers(where, "threshold", thresholds))
            _require_increasing(where, "thresholds", thresholds)
            if len(thresholds) != len(levels) - 1:
                needed = f"{len(levels)} levels need {len(levels) - 1} thresholds"
                raise ValueError(f"{where}: {needed}, not {len(thresholds)}")
            for threshold, (below, above) in zip(thresholds, itertools.pairwise(levels), strict=True):
                if not below <= threshold <= above:
                    raise ValueError(f"{where}: the threshold {threshold:g} must lie between {below:g} and {above:g}")
        object.__setattr__(self, "values", levels)
        object.__setattr__(self, "thresholds", thresholds)

    @property
    def format(self) -> str:
        return self.name

    @property
    def unit(self) -> tuple[float, ...]:
        return self.values

    @property
    def middles(self) -> tuple[float, ...] | None:
        return self.thresholds


def _read_levels(file: str) -> tuple[list[str], list[str] | None]:
    """The words of a file of levels. Errors: ValueError naming the file, and the line where there is one."""
    path = Path(file)
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise OSError(0, "it is no file")  # reading a device might never end
        lines = path.read_text(encoding="utf-8-sig").splitlines()  # editors may put a mark in front
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is no text"
        raise ValueError(f"file={file}: cannot be read ({why})") from None
    words_of = [line.partition("#")[0].replace(",", " ").split() for line in lines]
    rows = [(number, words) for number, words in enumerate(words_of, 1) if words]
    for number, words in rows:
        if len(words) > 2:
            holds = f"line {number} holds {len(words)} numbers"
            raise ValueError(f"file={file}: {holds}; allowed are a level and a threshold")
    thresholds = [words[1] for _, words in rows if len(words) == 2]
    return [words[0] for _, words in rows], thresholds or None


def _numbers(where: str, what: str, given: Iterable[object]) -> tuple[float, ...]:
    numbers = []
    for word in given:
        try:
            number = float(word)
        except (TypeError, ValueError):
            number = math.nan
        if isinstance(word, bool) or not math.isfinite(number):
            raise ValueError(f"{where}: {word!r} is no {what}, which must be a finite number")
        numbers.append(number)
    return tuple(numbers)


def _float32(numbers: tuple[float, ...]) -> tuple[float, ...]:
    """The nearest float32 numbers, without a negative zero."""
    packed = struct.pack(f"{len(numbers)}f", *(max(-(2.0**127), min(x, 2.0**127)) for x in numbers))
    return tuple(x + 0.0 for x in struct.unpack(f"{len(numbers)}f", packed))


def _require_increasing(where: str, what: str, numbers: tuple[float, ...]) -> None:
    for below, above in itertools.pairwise(numbers):
        if not below < above:
            raise ValueError(f"{where}: {what} must increase, but {above:g} follows {below:g}")
