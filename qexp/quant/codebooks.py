"""Formats of a few named levels: binary, powers of two and their sums, normal quantiles, k-means.

Importing this file needs no torch.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, ClassVar

from qexp.quant.checks import require_bits, require_bool
from qexp.quant.levels import LevelGrid

if TYPE_CHECKING:
    from qexp.quant.affine import QParams
    from qexp.quant.stats import Statistics


@dataclass(frozen=True)
class Binary(LevelGrid):
    """Two levels, -S and S (Rastegari et al. 2016, section 3.1: the S of least error is mean|x|, which mse finds).

    >>> Binary().unit
    (-1.0, 1.0)
    """

    format: ClassVar[str] = "binary"

    @property
    def unit(self) -> tuple[float, ...]:
        return -1.0, 1.0


@dataclass(frozen=True)
class PowerOfTwo(LevelGrid):
    """Levels 0 and +-2^-k, k = 0 .. n - 1 ("log2"): products become shifts (Zhou et al. 2017, INQ, equation 2).

    n = 2^(bits-1) - 1 magnitudes with a sign, n = 2^bits - 1 without. They are written as the integers 2^(n-1-k).

    >>> PowerOfTwo(3).unit
    (-4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0)
    """

    bits: int = 4
    signed: bool = True

    def __post_init__(self) -> None:
        require_bool("signed", self.signed)
        require_bits(self.bits, 2, 6)

    @property
    def format(self) -> str:
        return f"{'' if self.signed else 'u'}log{self.bits}"

    @property
    def unit(self) -> tuple[float, ...]:
        count = 2 ** (self.bits - self.signed) - 1
        return _mirrored([2.0**k for k in range(count)], self.signed)


@dataclass(frozen=True)
class AdditivePowerOfTwo(LevelGrid):
    """Sums of powers of two (APoT, Li et al. 2020, equation 5): finer than `PowerOfTwo` near the largest level.

    Magnitudes of B = bits - 1 bits (B = bits without a sign) are sums of n = B // 2 terms p_i from four values each,
    {0, 2^-i, 2^-(i+n), 2^-(i+2n)} for i = 0 .. n - 1. For an odd B the authors' code adds one term {0, 2^-2n}, and the
    smallest powers of the others move down by one. They are written as integers, which changes S alone.

    >>> AdditivePowerOfTwo(4).unit[7:]
    (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 10.0)
    """

    bits: int = 4
    signed: bool = True

    def __post_init__(self) -> None:
        require_bool("signed", self.signed)
        require_bits(self.bits, 2 + self.signed, 6 + self.signed)

    @property
    def format(self) -> str:
        return f"{'' if self.signed else 'u'}apot{self.bits}"

    @property
    def unit(self) -> tuple[float, ...]:
        terms = _apot_terms(self.bits - self.signed)
        sums = sorted({sum(parts) for parts in itertools.product(*terms)} - {0.0})
        return _mirrored([level / sums[0] for level in sums], self.signed)


def _apot_terms(bits: int) -> list[list[float]]:
    """The values of each term. A one-bit term sits between the second and the third power of the others."""
    pairs, single = divmod(bits, 2)
    exponents = [[i + k * pairs + (single if k == 2 else 0) for k in range(3)] for i in range(pairs)]
    if single:
        exponents.append([2 * pairs])
    return [[0.0, *(2.0**-e for e in powers)] for powers in exponents]


def _mirrored(magnitudes: list[float], signed: bool) -> tuple[float, ...]:
    return (*([-x for x in reversed(magnitudes)] if signed else []), 0.0, *magnitudes)


NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(frozen=True)
class NormalFloat(LevelGrid):
    """NFk: quantiles of the normal distribution, zero among them (Dettmers et al. 2023, QLoRA, section 3, appendix E).

    2^(k-1) quantiles of the negative and 2^(k-1) + 1 of the positive half share the zero, evenly spaced in probability
    up to the mean of 1 - 1/(2 2^k) and 1 - 1/(2 (2^k - 1)), divided by the largest. NF4 is the table of appendix E,
    which the authors computed in float32: it is off that by up to 2e-7.

    >>> [round(x, 4) for x in NormalFloat(4).unit[6:9]]
    [-0.0911, 0.0, 0.0796]
    """

    bits: int = 4

    def __post_init__(self) -> None:
        require_bits(self.bits, 2, 8)

    @property
    def format(self) -> str:
        return f"nf{self.bits}"

    @property
    def unit(self) -> tuple[float, ...]:
        if self.bits == 4:
            return NF4
        n, half = 2**self.bits, 2 ** (self.bits - 1)
        outermost = 1 - (1 / (2 * n) + 1 / (2 * (n - 1))) / 2
        quantile = NormalDist().inv_cdf
        positive = [quantile(outermost + (0.5 - outermost) * i / half) for i in range(half)]
        negative = [-quantile(outermost + (0.5 - outermost) * i / (half - 1)) for i in range(half - 1)]
        top = positive[0]
        return tuple(x / top for x in (*negative, 0.0, *reversed(positive)))


@dataclass(frozen=True)
class KMeans(LevelGrid):
    """A codebook made for each tensor: the 2^bits means of a one-dimensional k-means (Han et al. 2016, section 3).

    x / S of all blocks together is clustered by Lloyd's algorithm from evenly spaced levels (their "linear"
    initialisation). Until the data are seen, levels are evenly spaced.

    >>> [round(x, 3) for x in KMeans(2).unit]
    [-1.0, -0.333, 0.333, 1.0]
    """

    bits: int = 4
    iterations: int = 100

    fits_data: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_bits(self.bits, 1, 8)
        if isinstance(self.iterations, bool) or not isinstance(self.iterations, int) or self.iterations < 1:
            raise ValueError(f"iterations={self.iterations!r}: must be an integer of at least 1")

    @property
    def format(self) -> str:
        return f"kmeans{self.bits}"

    @property
    def unit(self) -> tuple[float, ...]:
        top = 2**self.bits - 1
        return tuple(2 * i / top - 1 for i in range(top + 1))

    def fit(self, stats: Statistics, qparams: QParams) -> QParams:
        import torch

        weights = stats.weights.double().flatten()
        u, order = (stats.points / qparams.scale.reshape(-1, 1)).flatten().clamp(-1, 1).sort()
        weights = weights[order]
        nothing = weights.new_zeros(1)
        mass = torch.cat([nothing, weights.cumsum(0)])
        moment = torch.cat([nothing, (weights * u.double()).cumsum(0)])
        # Evenly over what there is: of values without a sign no level is wasted on the other half.
        seen = u[weights > 0]
        levels = torch.linspace(float(seen[0]), float(seen[-1]), 2**self.bits, dtype=torch.float64)
        for _ in range(self.iterations):
            edges = torch.searchsorted(u, ((levels[1:] + levels[:-1]) / 2).float(), right=True)
            edges = torch.cat([edges.new_zeros(1), edges, edges.new_full((1,), len(u))])
            share = mass[edges].diff()
            new = (moment[edges].diff() / share).where(share > 0, levels)  # an empty cell keeps its level
            if torch.equal(new, levels):
                break
            levels = new
        return qparams._replace(levels=levels.float())
