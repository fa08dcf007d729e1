"""Non-uniform formats: levels X_i and thresholds Delta_i. Importing this file needs no torch.

Q(x) = S X_i  if  Delta_i < x / S <= Delta_(i+1)            Gholami et al. 2021, equation 7

A code is the index of a level, counted from the level zero where there is one. Thresholds lie in the middle between
levels unless a format says otherwise; which mode of rounding moves them how is in `rounding.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from qexp.quant.grid import HALF_EVEN, Grid, checked_range
from qexp.quant.rounding import Rounding
from qexp.quant.scale import SMALLEST_NORMAL, as_format

if TYPE_CHECKING:
    from torch import Tensor

    from qexp.quant.affine import QParams


@dataclass(frozen=True)
class LevelGrid(Grid):
    """Base of the formats given by a sorted list of levels; a new one implements `unit`.

    S maps the largest level to the clipping range: S = max(hi / max X, -lo / -min X).
    """

    @property
    def unit(self) -> tuple[float, ...]:
        """The levels X_i for S = 1, increasing."""
        raise TypeError(f"{type(self).__name__} must define unit")

    @property
    def middles(self) -> tuple[float, ...] | None:
        """Thresholds of the nearest level where they are not the means of neighbours."""
        return None

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return max(1, math.ceil(math.log2(len(self.unit))))

    @property
    def convention(self) -> str:
        """What stands for the convention of an integer in tables."""
        return f"{len(self.unit)} levels"

    @property
    def scale(self) -> str:
        return "float32"

    @property
    def zero_index(self) -> int:
        """Index of the level with code 0: zero, or the first positive one."""
        return sum(level < 0 for level in self.unit)

    @property
    def quant_min(self) -> int:
        return -self.zero_index

    @property
    def quant_max(self) -> int:
        return len(self.unit) - 1 - self.zero_index

    @property
    def step(self) -> float | None:
        if self.fits_data:
            return None
        steps = (2.0**k for k in range(1, -8, -1))
        fits = (s for s in steps if all(abs(x) <= 127 * s and (x / s).is_integer() for x in map(float, self.unit)))
        return next(fits, None)

    @property
    def stores_as_int8(self) -> bool:
        return self.step is not None

    def stored(self, codes: Tensor) -> Tensor:
        return unit_levels(self).to(codes.device)[codes.long() + self.zero_index] / self.step

    def __str__(self) -> str:
        return f"{self.format}{'' if self.scale == 'float32' else f' {self.scale}'}"

    def qparams(self, lo: Tensor, hi: Tensor) -> QParams:
        """Scale of the clipping range [lo, hi]. Errors: ValueError unless it is finite and lo <= hi."""
        from qexp.quant.affine import QParams

        lo, hi = checked_range(lo, hi)
        bottom, top = min(self.unit[0], 0.0), max(self.unit[-1], 0.0)
        largest = max(-bottom, top)
        magnitude = hi * (largest / top) if top else hi * 0
        if bottom:
            magnitude = magnitude.maximum(lo.neg() * (largest / -bottom))
        scale = as_format(self.scale, magnitude, largest)
        if 0.0 not in self.unit:  # nothing but a vanishing S brings an empty block close to zero
            scale = scale.where(magnitude > 0, scale.new_full((), SMALLEST_NORMAL))
        return QParams(scale, scale.new_zeros(scale.shape))

    def encode(self, x: Tensor, qparams: QParams, rounding: Rounding = HALF_EVEN) -> Tensor:
        """Codes of x (float32 integers)."""
        import torch

        u = x / qparams.scale
        levels = self._levels(qparams).to(u.device)
        if rounding.is_random:
            lower = torch.bucketize(u, levels[1:-1], right=True)
            below, above = levels[lower], levels[lower + 1]
            # 0 / 0 is between equal levels, which a codebook of constant data has.
            index = rounding(lower + ((u - below) / (above - below)).clamp_(0, 1).nan_to_num_())
        else:
            index = torch.bucketize(u, self.thresholds_for(rounding, qparams).to(u.device))
        return index.to(torch.float32).sub_(self.zero_index)

    def decode(self, codes: Tensor, qparams: QParams) -> Tensor:
        """Values S X_i of codes."""
        return self._levels(qparams).to(codes.device)[codes.long() + self.zero_index] * qparams.scale

    def fake_quantize(self, x: Tensor, qparams: QParams, rounding: Rounding = HALF_EVEN) -> Tensor:
        """decode(encode(x)); the gradient is the straight-through one, zero outside of the outermost levels."""
        from qexp.quant.affine import straight_through

        levels = self._levels(qparams)
        u = x.detach() / qparams.scale
        inside = (u >= levels[0]) & (u <= levels[-1])
        values = self.decode(self.encode(x.detach(), qparams, rounding), qparams)
        return straight_through(x, values.where(~u.isnan(), u), inside)

    def clipped(self, x: Tensor, qparams: QParams) -> Tensor:
        u, levels = x / qparams.scale, self._levels(qparams)
        below, above = (1.5 * levels[i] - 0.5 * levels[j] for i, j in ((0, 1), (-1, -2)))
        return ((u < below) | (u > above)).sum()

    def levels(self, qparams: QParams) -> Tensor:
        """All representable values in increasing order; shape: that of the scale, plus one last dimension."""
        return self._levels(qparams) * qparams.scale[..., None]

    def _levels(self, qparams: QParams) -> Tensor:
        return (unit_levels(self) if qparams.levels is None else qparams.levels).to(qparams.scale.device)

    def thresholds_for(self, rounding: Rounding, qparams: QParams) -> Tensor:
        """Delta_i for S = 1: x / S becomes level i + 1 or a higher one exactly where it is larger than Delta_i."""
        if qparams.levels is None:
            return unit_thresholds(self, rounding)
        return _thresholds(qparams.levels, None, rounding, self.zero_index)


@lru_cache
def unit_levels(grid: LevelGrid) -> Tensor:
    """The levels of a grid for S = 1 as float32."""
    import torch

    return torch.tensor(grid.unit, dtype=torch.float32)


@lru_cache
def unit_thresholds(grid: LevelGrid, rounding: Rounding) -> Tensor:
    """The thresholds of a grid for S = 1: a value belongs to the level above where it is larger."""
    return _thresholds(unit_levels(grid), grid.middles, rounding, grid.zero_index)


def _thresholds(levels: Tensor, middles: tuple[float, ...] | None, rounding: Rounding, zero_index: int) -> Tensor:
    import torch

    levels = levels.double()  # in which the mean of two float32 numbers is exact
    means = (levels[:-1] + levels[1:]) / 2 if middles is None else torch.tensor(middles).to(levels)
    return rounding.thresholds(levels, means, torch.arange(len(means), device=levels.device) - zero_index)
