"""From statistics to a clipping range [lo, hi]; importing this needs no torch, so a wrong option is refused at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from torch import Tensor

    from qexp.quant.grid import Grid
    from qexp.quant.stats import Statistics


@dataclass(frozen=True)
class Calibration:
    """Base of all calibrations; a new one implements `range` alone.

    `range` gets Statistics of G blocks and the grid and returns lo and hi, both of shape (G,). `most_bits` is the
    largest width whose steps the statistics of a stream resolve for it; `needs_rows` says that it compares whole rows.
    """

    most_bits: ClassVar[int] = 16
    needs_rows: ClassVar[bool] = False

    def range(self, stats: Statistics, grid: Grid) -> tuple[Tensor, Tensor]:
        """Clipping range of each block."""
        raise TypeError(f"{type(self).__name__} must define range")

    def require_resolution(self, grid: Grid) -> None:
        """Raise ValueError for a format with finer steps than statistics can tell apart."""
        if grid.bits > self.most_bits:
            raise ValueError(
                f"{self}: its statistics resolve at most {self.most_bits} bits, but {grid} has {grid.bits}; "
                "minmax, moving_average and percentile take any width"
            )


@dataclass(frozen=True)
class MinMax(Calibration):
    """The extrema themselves: nothing is clipped (Gholami et al. 2021, section III.C)."""

    def range(self, stats: Statistics, grid: Grid) -> tuple[Tensor, Tensor]:
        return stats.lo, stats.hi

    def __str__(self) -> str:
        return "minmax"


@dataclass(frozen=True)
class MovingAverage(Calibration):
    """Running means of the batches' extrema: E = (1 - c) E + c extrema (Krishnamoorthi 2018, section 3.1.1).

    c = `constant` as in torch.ao's MovingAverageMinMaxObserver; E starts at the first batch. What is at hand as a
    whole, a weight, is one batch.
    """

    constant: float = 0.01

    def __post_init__(self) -> None:
        if isinstance(self.constant, bool) or not isinstance(self.constant, (int, float)) or not 0 < self.constant <= 1:
            raise ValueError(f"constant={self.constant!r}: allowed are numbers above 0 and up to 1")

    def range(self, stats: Statistics, grid: Grid) -> tuple[Tensor, Tensor]:
        return stats.average[0], stats.average[1]

    def __str__(self) -> str:
        return f"moving_average({self.constant:g})"


@dataclass(frozen=True)
class Percentile(Calibration):
    """The range that leaves out the (100 - percentile) % most extreme values (Wu et al. 2020, section 3.3).

    Symmetric grids clip at the percentile of |x|; affine grids clip (100 - percentile) % at each end. A percentile
    is the smallest value whose cumulative share reaches it. Of a stream it is exact where fewer than 2,048 values lie
    beyond it, and otherwise within 2^-12 of itself; of the blocks of a stream, 64 values and 2^-8.
    """

    percentile: float = 99.99

    def __post_init__(self) -> None:
        if (
            isinstance(self.percentile, bool)
            or not isinstance(self.percentile, (int, float))
            or not (50 < self.percentile <= 100)
        ):
            raise ValueError(f"percentile={self.percentile!r}: allowed are numbers above 50 and up to 100")

    def range(self, stats: Statistics, grid: Grid) -> tuple[Tensor, Tensor]:
        share = self.percentile / 100
        if grid.symmetric:
            bound = _quantile(stats.points.abs(), stats.weights, share)
            return -bound, bound
        lo = -_quantile(-stats.points, stats.weights, share)
        return lo, _quantile(stats.points, stats.weights, share).maximum(lo)

    def __str__(self) -> str:
        return f"percentile({self.percentile:g})"


def _quantile(points: Tensor, weights: Tensor, share: float) -> Tensor:
    points, order = points.sort(dim=1)
    cumulative = weights.double().gather(1, order).cumsum(1)
    target = cumulative[:, -1:] * share
    # Summation leaves relative errors of 1e-16 a term; they must not push a share of 1 past the last point.
    reached = cumulative >= target * (1 - 1e-12)
    return points.gather(1, reached.int().argmax(1, keepdim=True)).squeeze(1)
