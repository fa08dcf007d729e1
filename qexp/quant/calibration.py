"""From statistics to a clipping range [lo, hi]; importing this needs no torch, so a wrong option is refused at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from torch import Tensor

    from qexp.quant.grid import IntegerGrid
    from qexp.quant.observers import Statistics


@dataclass(frozen=True)
class Calibration:
    """Base of all calibrations; a new one implements `range` alone.

    `range` gets Statistics of G blocks and the grid and returns lo and hi, both of shape (G,).
    """

    needs_histogram: ClassVar[bool] = True

    def range(self, stats: Statistics, grid: IntegerGrid) -> tuple[Tensor, Tensor]:
        """Clipping range of each block."""
        raise TypeError(f"{type(self).__name__} must define range")


@dataclass(frozen=True)
class MinMax(Calibration):
    """The extrema themselves: nothing is clipped (Gholami et al. 2021, section III.C)."""

    needs_histogram: ClassVar[bool] = False

    def range(self, stats: Statistics, grid: IntegerGrid) -> tuple[Tensor, Tensor]:
        return stats.lo, stats.hi

    def __str__(self) -> str:
        return "minmax"


@dataclass(frozen=True)
class Percentile(Calibration):
    """The range that leaves out the (100 - percentile) % most extreme values (Wu et al. 2020, section 3.3).

    Symmetric grids clip at the percentile of |x|; affine grids clip (100 - percentile) % at each end. A percentile
    is the smallest value whose cumulative share reaches it.
    """

    percentile: float = 99.99

    def __post_init__(self) -> None:
        if (
            isinstance(self.percentile, bool)
            or not isinstance(self.percentile, (int, float))
            or not (50 < self.percentile <= 100)
        ):
            raise ValueError(f"percentile={self.percentile!r}: allowed are numbers above 50 and up to 100")

    def range(self, stats: Statistics, grid: IntegerGrid) -> tuple[Tensor, Tensor]:
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


@dataclass(frozen=True)
class MSE(Calibration):
    """The range k/n [min, max], k = 1..n, with the least squared quantization error (Gholami et al. 2021, III.C)."""

    candidates: int = 100

    def __post_init__(self) -> None:
        if isinstance(self.candidates, bool) or not isinstance(self.candidates, int) or self.candidates < 2:
            raise ValueError(f"candidates={self.candidates!r}: allowed are integers of at least 2")

    def range(self, stats: Statistics, grid: IntegerGrid) -> tuple[Tensor, Tensor]:
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
    def _error(stats: Statistics, grid: IntegerGrid, lo: Tensor, hi: Tensor) -> Tensor:
        qparams = grid.qparams(lo[:, None], hi[:, None])
        error = grid.decode(grid.encode(stats.points, qparams), qparams) - stats.points
        return (error.square() * stats.weights).sum(1)

    def __str__(self) -> str:
        return f"mse({self.candidates})"


@dataclass(frozen=True)
class Entropy(Calibration):
    """The threshold T on |x| with the least KL divergence between histogram and quantized histogram.

    The algorithm of TensorRT (Migacz, GTC 2017), spelled out: `bins` bins over [0, max|x|], of which the first,
    that holds the zeros, is replaced by the second. For each T = i bins, i from the larger of `start_bin` and L: P is
    the first i bins, the clipped rest added to the last; Q merges the i bins into L levels and spreads each level
    evenly over its non-empty bins; both are normalised; the T with the least sum P log(P/Q) wins, the largest of
    several. L is 2^b for values without a sign and 2^(b-1) for others. The range is [-T, T] cut to the extrema.
    """

    bins: int = 2048
    start_bin: int = 128

    def __post_init__(self) -> None:
        for field, value, least in ("bins", self.bins, 256), ("start_bin", self.start_bin, 1):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{field}={value!r}: allowed are integers of at least {least}")
        if self.start_bin >= self.bins:
            raise ValueError(f"start_bin={self.start_bin!r}: must be below bins={self.bins}")

    def range(self, stats: Statistics, grid: IntegerGrid) -> tuple[Tensor, Tensor]:
        import torch

        magnitude = stats.lo.neg().maximum(stats.hi)
        threshold = magnitude.clone()
        # Rows with and without a sign have different numbers of levels.
        for unsigned in (True, False):
            rows = ((stats.lo >= 0) == unsigned).logical_and(magnitude > 0).nonzero().flatten()
            if len(rows):
                levels = 2**grid.bits if unsigned and not grid.symmetric else 2 ** (grid.bits - 1)
                counts = self._histogram(stats.points[rows].abs(), stats.weights[rows], magnitude[rows])
                best = torch.stack([self._best_bin(row, levels) for row in counts])
                threshold[rows] = magnitude[rows] * (best / self.bins).float()
        return stats.lo.maximum(-threshold), stats.hi.minimum(threshold)

    def _histogram(self, magnitudes: Tensor, weights: Tensor, top: Tensor) -> Tensor:
        index = (magnitudes / top[:, None] * self.bins).long().clamp_(max=self.bins - 1)
        counts = weights.new_zeros(len(index), self.bins).double().scatter_add_(1, index, weights.double())
        counts[:, 0] = counts[:, 1]
        return counts

    def _best_bin(self, counts: Tensor, levels: int) -> Tensor:
        """Number of bins below the best threshold, all candidates at once.

        Cumulative sums give every sum over a run of bins in one difference, so a candidate costs O(levels).
        """
        import torch

        def cumulative(values: Tensor) -> Tensor:
            return torch.cat([values.new_zeros(1), values.cumsum(0)])

        mass, filled, self_entropy = map(cumulative, (counts, (counts > 0).double(), _xlogx(counts)))
        i = torch.arange(min(max(self.start_bin, levels), self.bins), self.bins + 1)
        level = torch.arange(levels + 1)
        edges = (level * i[:, None] + levels - 1) // levels  # (candidates, levels + 1): ceil(level * i / levels)
        level_mass = mass[edges].diff(dim=1)
        level_mean = level_mass / filled[edges].diff(dim=1).clamp(min=1)
        last = counts[i - 1]
        outside = mass[-1] - mass[i]
        p_log_p = self_entropy[i] - _xlogx(last) + _xlogx(last + outside)
        log_mean = level_mean.clamp(min=1e-300).log()
        p_log_q = (level_mass * log_mean).sum(1) + outside * log_mean[:, -1]
        kl = (p_log_p - p_log_q) / mass[-1] + (mass[i].clamp(min=1e-300) / mass[-1]).log()
        kl[(last == 0) & (outside > 0)] = torch.inf  # P > 0 where Q = 0
        return i[len(kl) - 1 - kl.flip(0).argmin()]

    def __str__(self) -> str:
        return "entropy" if self == Entropy() else f"entropy({self.bins}, {self.start_bin})"


def _xlogx(x: Tensor) -> Tensor:
    import torch

    return torch.special.xlogy(x, x)
