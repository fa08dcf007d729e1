"""The entropy calibration of TensorRT. Importing this needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from qexp.quant.calibration import Calibration

if TYPE_CHECKING:
    from torch import Tensor

    from qexp.quant.grid import Grid
    from qexp.quant.stats import Statistics


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

    most_bits: ClassVar[int] = 11

    def __post_init__(self) -> None:
        for field, value, least in ("bins", self.bins, 256), ("start_bin", self.start_bin, 1):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{field}={value!r}: allowed are integers of at least {least}")
        if self.start_bin >= self.bins:
            raise ValueError(f"start_bin={self.start_bin!r}: must be below bins={self.bins}")

    def range(self, stats: Statistics, grid: Grid) -> tuple[Tensor, Tensor]:
        import torch

        if stats.points.shape[1] == 1:  # one value in each block is its own range
            return stats.lo, stats.hi
        magnitude = stats.lo.neg().maximum(stats.hi)
        threshold = magnitude.clone()
        # Rows with and without a sign have different numbers of levels.
        for unsigned in (True, False):
            rows = ((stats.lo >= 0) == unsigned).logical_and(magnitude > 0).nonzero().flatten()
            if len(rows):
                levels = 2**grid.bits if unsigned and not (grid.symmetric and grid.signed) else 2 ** (grid.bits - 1)
                counts = self._histogram(stats.points[rows].abs(), stats.weights[rows], magnitude[rows])
                best = torch.stack([self._best_bin(row, levels) for row in counts])
                threshold[rows] = magnitude[rows] * (best / self.bins).float()
        return stats.lo.maximum(-threshold), stats.hi.minimum(threshold)

    def require_resolution(self, grid: Grid) -> None:
        super().require_resolution(grid)
        if 2**grid.bits > self.bins:
            raise ValueError(f"{self}: {self.bins} bins cannot resolve the {2**grid.bits} levels of {grid}")

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
