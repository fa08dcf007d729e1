"""Clipping from a distribution fitted to the data (ACIQ). Importing this needs no torch."""

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
class ACIQ(Calibration):
    """The threshold of least expected squared error for a normal or a Laplace distribution (Banner et al. 2019).

    With 2 alpha / 2^M the step of M bits (section 3.1, equations 5 to 9 of arXiv 1810.05723):

    laplace(b):     E(alpha) = 2 b^2 exp(-alpha / b) + alpha^2 / (3 4^M)
    normal(sigma):  E(alpha) = (sigma^2 + alpha^2) (1 - erf(alpha / (sqrt(2) sigma)))
                               - sqrt(2 / pi) sigma alpha exp(-alpha^2 / (2 sigma^2)) + alpha^2 / (3 4^M)

    Signed data: b = E|x - mu|, sigma^2 = E (x - mu)^2, range [mu - alpha, mu + alpha]; mu = 0 for symmetric grids.
    Data without a sign are half of such a distribution around 0, with the b and sigma of their values above zero;
    a grid that spends all its levels on one side has M + 1 bits there (their fused ReLU). The extrema cut ranges.
    """

    distribution: str = "laplace"

    most_bits: ClassVar[int] = 16

    def __post_init__(self) -> None:
        if self.distribution not in ("laplace", "normal"):
            raise ValueError(f"distribution={self.distribution!r}: allowed are laplace, normal")

    def range(self, stats: Statistics, grid: Grid) -> tuple[Tensor, Tensor]:
        x, w = stats.points.double(), stats.weights.double()
        one_sided = (stats.lo >= 0)[:, None]
        w = w.where(~one_sided | (x > 0), w.new_zeros(()))
        total = w.sum(1, keepdim=True).clamp(min=1)
        mu = (w * x).sum(1, keepdim=True) / total
        mu = mu.where(~one_sided & (not grid.symmetric), mu.new_zeros(()))
        away = (x - mu).abs()
        if self.distribution == "laplace":
            spread = (w * away).sum(1) / total[:, 0]
        else:
            spread = ((w * away.square()).sum(1) / total[:, 0]).sqrt()
        whole = grid.symmetric and grid.signed  # as many levels below zero, whatever the data
        alphas = [optimal_threshold(self.distribution, grid.bits + extra) for extra in (0, 0 if whole else 1)]
        alpha = spread * spread.new_tensor(alphas)[one_sided[:, 0].long()]
        lo, hi = (mu[:, 0] - alpha).float(), (mu[:, 0] + alpha).float()
        return stats.lo.maximum(lo), stats.hi.minimum(hi).maximum(stats.lo.maximum(lo))

    def __str__(self) -> str:
        return f"aciq({self.distribution})"


def optimal_threshold(distribution: str, bits: int) -> float:
    """alpha / b of a Laplace, or alpha / sigma of a normal distribution, of least expected squared error.

    >>> [round(optimal_threshold("laplace", bits), 3) for bits in (2, 3, 4)]  # Banner et al. 2019: 2.83, 3.89, 5.03
    [2.831, 3.897, 5.029]
    """

    def slope(alpha: float) -> float:
        quantization = 2 * alpha / (3 * 4**bits)
        if distribution == "laplace":
            return quantization - 2 * math.exp(-alpha)
        tail = 2 * alpha * math.erfc(alpha / math.sqrt(2))
        return quantization + tail - 2 * math.sqrt(2 / math.pi) * math.exp(-alpha * alpha / 2)

    low, high = 0.0, 64.0  # E falls at 0 and rises at 64
    while low < (middle := (low + high) / 2) < high:
        low, high = (low, middle) if slope(middle) > 0 else (middle, high)
    return low
