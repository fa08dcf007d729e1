"""qexp itself against its definition in rational arithmetic."""

from __future__ import annotations

import math

import numpy as np
import torch

from conformance_.compare import Answers, Tally, Tool
from conformance_.exact import answers
from conformance_.inputs import Case
from qexp.quant.grid import IntegerGrid
from qexp.quant.observers import Observer


def _nothing(case: Case) -> Answers:
    return {}


DEFINITION = Tool(
    "Rational arithmetic", "torch",
    "the definition in fractions, on a part of the million: `clamp(rint(x / S) + Z)`, x / S a float32, half to even",
    _nothing, _nothing,
)  # fmt: skip


def against_definition(case: Case, mine: Answers, count: int) -> dict[str, Tally]:
    """Aspect -> counts over so many inputs of a case, evenly chosen; a difference is a bug of qexp."""
    aspects = ("codes", "values", "gradient") if isinstance(case.grid, IntegerGrid) else ("values",)
    tallies = {aspect: Tally() for aspect in aspects}
    chosen = np.unique(np.linspace(0, case.x.size - 1, min(count, case.x.size)).astype(int))
    for channel, place in zip(*np.unravel_index(chosen, case.x.shape), strict=True):
        qparams = float(case.scale[channel, 0]), float(case.zero[channel, 0])
        expected = answers(case.grid, float(case.x[channel, place]), *qparams, rounded=True)
        for aspect in aspects:
            wrong = int(float(mine[aspect][channel, place]) != expected[aspect])
            tallies[aspect] += Tally(inputs=1, differ=wrong, unexplained=wrong)
    return tallies


def refuses_what_is_not_finite() -> None:
    """Raise AssertionError unless qexp's observer refuses infinities and NaN."""
    for value in (math.inf, -math.inf, math.nan):
        try:
            Observer().update(torch.tensor([1.0, value]))
        except ValueError:
            continue
        raise AssertionError(f"the observer took {value}")
