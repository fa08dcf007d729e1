"""Clipping ranges found by trying: least squared error, half-quadratic, cross-entropy of the logits.

Importing this file needs no torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from qexp.quant.calibration import Calibration

if TYPE_CHECKING:
    from torch import Tensor

    from qexp.quant.grid import Grid
    from qexp.quant.stats import Statistics


@dataclass(frozen=True)
class MSE(Calibration):
    """The range k/n [min, max], k = 1..n, with the least squared quantization error (Gholami et al. 2021, III.C)."""

    candidates: int = 100

    most_bits: ClassVar[int] = 11

    def __post_init__(self) -> None:
        _require_candidates(self.candidates)

    def range(self, stats: Statistics, grid: Grid) -> tuple[Tensor, Tensor]:
        lo, hi = stats.lo.clamp(max=0), stats.hi.clamp(min=0)
        best_lo, best_hi = lo, hi
        least = self._error(stats, grid, lo, hi)
        for k in range(self.candidates - 1, 0, -1):
            factor = k / self.candidates
            error = self._error(stats, grid, lo * factor, hi * factor)
            better = error < least
            least = error.where(better, least)
            best_lo, best_hi = (lo * factor).where(better, best_lo), (hi * factor).where(better, best_hi)
        return best_lo, best_hi

    @staticmethod
    def _error(stats: Statistics, grid: Grid, lo: Tensor, hi: Tensor) -> Tensor:
        qparams = grid.qparams(lo[:, None], hi[:, None])
        error = grid.decode(grid.encode(stats.points, qparams), qparams) - stats.points
        return (error.square() * stats.weights).sum(1)

    def __str__(self) -> str:
        return f"mse({self.candidates})"


@dataclass(frozen=True)
class HalfQuadratic(Calibration):
    """Least sum |x - x~|^p with p < 1 by half-quadratic splitting (HQQ: Badri and Shaji 2023, section 2).

    Outliers are given to an auxiliary error e, so that the scale is fitted to the rest. From each start on, `steps`
    times, with u = (x - x~) / S the error in steps:

    e = S sign(u) max(0, |u| - p |u|^(p-1) / beta),   beta <- kappa beta          generalized soft threshold
    a, c = argmin sum (x - e - a x~ - c)^2            c = 0 for symmetric grids
    [lo, hi] <- a [lo, hi] + c

    HQQ fits the zero point alone and leaves its scale at the extrema; here both are fitted, because the zero point of
    an int8 engine is an integer. Errors are in steps, so beta does not depend on the size of x. Codes hold a range
    near where it started, so it starts at k/n of the extrema, k = 1..n, n = `starts`; the best range of all steps wins.
    """

    p: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01
    steps: int = 20
    starts: int = 8

    most_bits: ClassVar[int] = 11

    def __post_init__(self) -> None:
        for name, value, least, most in ("p", self.p, 0, 1), ("beta", self.beta, 0, math.inf), (
            "kappa", self.kappa, 0, math.inf
        ):  # fmt: skip
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not least < value < math.inf:
                raise ValueError(f"{name}={value!r}: must be a number above {least}")
            if value > most:
                raise ValueError(f"{name}={value!r}: must be at most {most}")
        for name, value in ("steps", self.steps), ("starts", self.starts):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}: must be an integer of at least 1")

    def range(self, stats: Statistics, grid: Grid) -> tuple[Tensor, Tensor]:
        import torch

        whole_lo, whole_hi = stats.lo.clamp(max=0), stats.hi.clamp(min=0)
        best = whole_lo, whole_hi, torch.full_like(whole_lo, torch.inf, dtype=torch.float64)
        for k in range(self.starts, 0, -1):
            lo, hi, beta = whole_lo * (k / self.starts), whole_hi * (k / self.starts), self.beta
            for _ in range(self.steps + 1):
                error, lo_next, hi_next = self._step(stats, grid, (lo, hi), beta)
                better = error < best[2]
                best = tuple(new.where(better, old) for new, old in zip((lo, hi, error), best, strict=True))
                lo, hi, beta = lo_next, hi_next, beta * self.kappa
        return best[0], best[1]

    def _step(
        self, stats: Statistics, grid: Grid, span: tuple[Tensor, Tensor], beta: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """sum |x - x~|^p of a range, and the next range."""
        x, w = stats.points.double(), stats.weights.double()
        qparams = grid.qparams(span[0][:, None], span[1][:, None])
        quantized = grid.decode(grid.encode(stats.points, qparams), qparams).double()
        u = (x - quantized) / qparams.scale.double()
        error = (w * (u * qparams.scale).abs().pow(self.p)).sum(1)
        size = u.abs()
        shrunk = size - self.p * size.clamp(min=1e-12).pow(self.p - 1) / beta
        target = x - u.sign() * shrunk.clamp(min=0) * qparams.scale
        return error, *_refit(target, quantized, w, span, offset=not grid.symmetric)

    def __str__(self) -> str:
        return f"hqo({self.p:g})"


def _refit(
    target: Tensor, quantized: Tensor, w: Tensor, old: tuple[Tensor, Tensor], offset: bool
) -> tuple[Tensor, Tensor]:
    """The range moved by the a and c of least sum w (target - a quantized - c)^2; kept where that says nothing."""
    total = w.sum(1, keepdim=True)
    mean_t, mean_q = ((w * v).sum(1, keepdim=True) / total if offset else 0.0 for v in (target, quantized))
    t, q = target - mean_t, quantized - mean_q
    spread = (w * q * q).sum(1)
    a = ((w * t * q).sum(1) / spread.clamp(min=1e-300)).clamp(0.1, 10).where(spread > 0, spread.new_ones(()))
    c = (mean_t - a[:, None] * mean_q).squeeze(1) if offset else 0.0
    lo, hi = ((a * end + c).float() for end in old)
    return lo.clamp(max=0), hi.clamp(min=0)


@dataclass(frozen=True)
class CrossEntropy(Calibration):
    """The range k/n [min, max], k = 1..n, of least cross-entropy between the decisions of float and quantized logits.

    L = - mean over rows, sum over classes softmax(z) log softmax(z~)      Nagel et al. 2021, section 3.1, equation 19

    For the logits alone (`calibration.logits`), per tensor. Rows are a sample of up to 1,024.
    """

    candidates: int = 100

    needs_rows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _require_candidates(self.candidates)

    def range(self, stats: Statistics, grid: Grid) -> tuple[Tensor, Tensor]:
        if stats.rows is None:
            raise ValueError("cross_entropy compares rows of logits; it is for calibration.logits alone")
        lo, hi = stats.lo.clamp(max=0), stats.hi.clamp(min=0)
        target = stats.rows.double().softmax(1)
        best, least = 1.0, math.inf
        for k in range(self.candidates, 0, -1):
            qparams = grid.qparams(lo * (k / self.candidates), hi * (k / self.candidates))
            quantized = grid.decode(grid.encode(stats.rows, qparams), qparams).double()
            loss = float(-(target * quantized.log_softmax(1)).sum(1).mean())
            if loss < least:
                best, least = k / self.candidates, loss
        return lo * best, hi * best

    def __str__(self) -> str:
        return f"cross_entropy({self.candidates})"


def _require_candidates(candidates: int) -> None:
    if isinstance(candidates, bool) or not isinstance(candidates, int) or candidates < 2:
        raise ValueError(f"candidates={candidates!r}: allowed are integers of at least 2")
