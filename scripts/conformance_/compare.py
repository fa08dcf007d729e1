"""One tool against qexp: what differs, whether the tool's stated formula says so, and who is right."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch

from conformance_.exact import answers
from conformance_.inputs import Array, Case
from qexp.quant.grid import Grid, IntegerGrid

ASPECTS = ("scale", "codes", "values", "gradient")
Answers = dict[str, Array]


@dataclass(frozen=True)
class Points:
    """The differing inputs of one case, each with its scale and zero point, and what both sides make of it."""

    case: Case
    where: tuple[Array, Array]
    mine: Array
    other: Array

    @property
    def x(self) -> Array:
        return self.case.x[self.where].astype(np.float64)

    @property
    def scale(self) -> Array:
        return self.case.scale[self.where[0], 0].astype(np.float64)

    @property
    def zero(self) -> Array:
        return self.case.zero[self.where[0], 0].astype(np.float64)

    @property
    def quotient(self) -> Array:
        """x / S, all but exact."""
        return self.x / self.scale

    @property
    def tie_distance(self) -> Array:
        """|x / S - (k + 1/2)| for the nearest such."""
        return np.abs(self.quotient - np.floor(self.quotient) - 0.5)

    def first(self, count: int) -> Points:
        """Not more than so many of them, evenly chosen."""
        chosen = np.unique(np.linspace(0, len(self.mine) - 1, min(count, len(self.mine))).astype(int))
        return replace(
            self, where=tuple(w[chosen] for w in self.where), mine=self.mine[chosen], other=self.other[chosen]
        )


@dataclass(frozen=True)
class Reason:
    """A named class of inputs that may differ in one aspect, and the test of belonging to it."""

    aspect: str
    text: str
    holds: Callable[[Points], Array]


@dataclass(frozen=True)
class Tool:
    """Another implementation: `run` asks it, `formula` computes what it is said to compute."""

    name: str
    package: str
    says: str
    run: Callable[[Case], Answers]
    formula: Callable[[Case], Answers]
    reasons: tuple[Reason, ...] = ()
    aspects: tuple[str, ...] = ("codes", "values")
    refuses: Callable[[Grid], str | None] = lambda grid: None
    granularities: tuple[str, ...] = ("per tensor", "per channel")


@dataclass
class Tally:
    """Counts of one aspect over some cases: `right` holds, of `checked`, agreements (qexp, tool) twice."""

    inputs: int = 0
    differ: int = 0
    unexplained: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    checked: int = 0
    right: Counter[tuple[str, str]] = field(default_factory=Counter)

    def __add__(self, other: Tally) -> Tally:
        return Tally(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


def ours(case: Case, aspects: tuple[str, ...] = ASPECTS) -> Answers:
    """What qexp makes of a case."""
    grid, qparams = case.grid, case.qparams
    shape = qparams.scale.shape
    x = case.tensor if len(shape) else case.tensor[0]
    found = {"values": grid.fake_quantize(x, qparams), "scale": qparams.scale}
    if isinstance(grid, IntegerGrid):
        found["codes"] = grid.encode(x, qparams)
    if "gradient" in aspects and isinstance(grid, IntegerGrid):
        found["gradient"] = gradient(lambda x: grid.fake_quantize(x, qparams), x)
    return {name: tensor.numpy().reshape(len(case.x), -1) for name, tensor in found.items()}


def gradient(function: Callable, x: torch.Tensor) -> torch.Tensor:
    """d function / dx, elementwise."""
    x = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(function(x).sum(), x)
    return grad


def with_codes(case: Case, answers: Answers) -> Answers:
    """The answers with codes: where a tool gives values alone, the nearest integers to them over S."""
    if "codes" in answers or not isinstance(case.grid, IntegerGrid):
        return answers
    with np.errstate(all="ignore"):
        return answers | {"codes": np.rint(answers["values"].astype(np.float64) / case.scale) + case.zero}


def compare(tool: Tool, case: Case, mine: Answers, sample: int) -> dict[str, Tally]:
    """Aspect -> counts; rational arithmetic judges up to `sample` of the differing inputs."""
    with np.errstate(all="ignore"):
        raw, said = tool.run(case), tool.formula(case)
        other = with_codes(case, raw)
        tallies = {}
        for aspect in tool.aspects:
            if aspect not in other:
                continue
            differ = ~_equal(mine[aspect], other[aspect])
            if aspect == "values" and "codes" in tool.aspects:
                differ &= _equal(mine["codes"], other["codes"])
            tallies[aspect] = _tally(tool, aspect, case, (mine[aspect], other[aspect]), differ, sample)
            if aspect in raw:
                tallies[aspect].unexplained += int((~same_bits(raw[aspect], said[aspect])).sum())
    return tallies


def _equal(a: Array, b: Array) -> Array:
    """As numbers: 0 is -0."""
    return a == b


def same_bits(a: Array, b: Array) -> Array:
    """Bit for bit, but for which NaN it is."""
    a, b = np.ascontiguousarray(a, np.float32), np.ascontiguousarray(b, np.float32)
    return (a.view(np.int32) == b.view(np.int32)) | (np.isnan(a) & np.isnan(b))


def _tally(tool: Tool, aspect: str, case: Case, sides: tuple[Array, Array], differ: Array, sample: int) -> Tally:
    tally = Tally(inputs=differ.size, differ=int(differ.sum()))
    if not tally.differ:
        return tally
    where = np.nonzero(differ)
    points = Points(case, where, sides[0][where], sides[1][where])
    left = np.ones(tally.differ, bool)
    for reason in tool.reasons:
        if reason.aspect == aspect:
            belongs = left & reason.holds(points)
            tally.reasons[reason.text] += int(belongs.sum())
            left &= ~belongs
    tally.unexplained += int(left.sum())
    if aspect != "scale":
        _judge(tally, aspect, points.first(sample))
    return tally


def _judge(tally: Tally, aspect: str, points: Points) -> None:
    """Count how often each side agrees with rational arithmetic, by the definition and with an exact quotient."""
    columns = (points.x, points.scale, points.zero, points.mine, points.other)
    for x, scale, zero, mine, other in zip(*(column.tolist() for column in columns), strict=True):
        tally.checked += 1
        for question, rounded in (("definition", True), ("real", False)):
            answer = answers(points.case.grid, x, scale, zero, rounded)[aspect]
            tally.right["qexp", question] += mine == answer
            tally.right["tool", question] += other == answer
