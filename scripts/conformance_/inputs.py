"""The inputs of a comparison: a format, its scales, and the float32 values on which quantizers could part."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qexp.quant.affine import QParams
from qexp.quant.grid import CONVENTIONS, Grid, IntegerGrid

Array = np.ndarray
FLOAT_MAX = np.finfo(np.float32).max
# Common ones, one with only one sign, and the ends of float32: S = 2^-126 and S above 2^126 for few bits.
RANGES = [(-1.0, 1.0), (-0.3, 2.7), (-1.0, 2.0), (0.0, 6.0), (-5.0, 0.0), (-1e-38, 1e-38), (-1e30, 2e30),
          (-1.6e38, 1.6e38)]  # fmt: skip
CHANNELS = 64
GRANULARITIES = ("per tensor", "per channel")


@dataclass(frozen=True)
class Case:
    """Values x (channels, n) with one scale and zero point a channel; per tensor there is one channel."""

    grid: Grid
    x: Array
    lo: Array
    hi: Array
    qparams: QParams
    granularity: str

    @property
    def scale(self) -> Array:
        """S (channels, 1)."""
        return self.qparams.scale.numpy().reshape(-1, 1)

    @property
    def zero(self) -> Array:
        """Z (channels, 1)."""
        return self.qparams.zero_point.numpy().reshape(-1, 1)

    @property
    def amax(self) -> Array:
        """max(-lo, hi) (channels, 1), which symmetric conventions divide."""
        return np.maximum(-self.lo, self.hi) if self.grid.signed else self.hi

    @property
    def tensor(self) -> Tensor:
        return torch.from_numpy(self.x)


def cases(grid: Grid, granularity: str, count: int) -> Iterator[Case]:
    """Cases of one format that hold `count` values together."""
    rng = np.random.default_rng([grid.bits, sum(map(ord, grid.convention)), GRANULARITIES.index(granularity)])
    ranges = [*RANGES, exact_range(grid)]
    if granularity == "per tensor":
        sizes = np.diff(np.linspace(0, count, len(ranges) + 1).astype(int))
        for (lo, hi), size in zip(ranges, sizes, strict=True):
            yield _case(grid, granularity, [(lo, hi)], int(size), rng)
    else:
        channels = min(CHANNELS, max(count // 1000, len(ranges)))
        more = [_random_range(rng) for _ in range(channels - len(ranges))]
        yield _case(grid, granularity, ranges + more, count // channels, rng)


def exact_range(grid: Grid) -> tuple[float, float]:
    """A clipping range with S = 2^-4 and, if affine, an odd Z, so that ties are ties in real numbers as well."""
    if isinstance(grid, IntegerGrid):
        divisor = CONVENTIONS[grid.convention].divisor
        if divisor is None:
            return (-1 / 16, (2**grid.bits - 2) / 16)
        return (-divisor(grid.bits) / 16, divisor(grid.bits) / 16)
    return (grid.unit[0] / 16, grid.unit[-1] / 16)


def _random_range(rng: np.random.Generator) -> tuple[float, float]:
    width, share = 10.0 ** rng.uniform(-30, 30), rng.uniform(0, 1)
    return -width * share, width * (1 - share)


def _case(grid: Grid, granularity: str, ranges: list, size: int, rng: np.random.Generator) -> Case:
    lo, hi = np.array(ranges, np.float32)[:, :1], np.array(ranges, np.float32)[:, 1:]
    if grid.symmetric and not grid.signed:  # which has no use for (-5, 0)
        hi = np.where(hi > 0, hi, -lo)
    qparams = grid.qparams(torch.from_numpy(lo), torch.from_numpy(hi))
    if granularity == "per tensor":  # the shape of one scale, which has a path of its own in qexp
        qparams = QParams(qparams.scale.reshape(()), qparams.zero_point.reshape(()))
    scales, zeros = qparams.scale.reshape(-1).tolist(), qparams.zero_point.reshape(-1).tolist()
    x = np.stack([awkward(grid, s, z, size, rng) for s, z in zip(scales, zeros, strict=True)])
    return Case(grid, x, lo, hi, qparams, granularity)


def boundaries(grid: Grid, zero: float) -> Array:
    """Quotients where the code changes, for integers three beyond both ends as well."""
    if isinstance(grid, IntegerGrid):
        return np.arange(grid.quant_min - 4, grid.quant_max + 4) - zero + 0.5
    levels = np.array(grid.unit)
    ends = 2 * levels[[0, -1]] - levels[[1, -2]]
    levels = np.concatenate([ends[:1], levels, ends[1:]])
    return (levels[1:] + levels[:-1]) / 2


def awkward(grid: Grid, scale: float, zero: float, size: int, rng: np.random.Generator) -> Array:
    """`size` finite values: ties with their neighbours, levels, ends, denormals, zeros, huge ones, random ones."""
    ties = boundaries(grid, zero)
    near = _moved(_float32(ties * scale), range(-3, 4))
    levels = _moved(_float32((ties + 0.5) * scale), range(-1, 2))
    powers = _float32(2.0 ** np.arange(-149, 128))
    special = np.array([0.0, FLOAT_MAX, 1e-45, 1e-39, 1.1754942e-38, 3e38], np.float32)
    fixed = np.concatenate([near, levels, powers, -powers, special, -special])
    if len(fixed) > size:
        return rng.permutation(fixed)[:size]
    left = size - len(fixed)
    parts = [left // 4, left // 8, left // 8, left // 4, left - 2 * (left // 4) - 2 * (left // 8)]
    span = (ties[0] * scale, ties[-1] * scale)
    around = _float32(rng.choice(ties, parts[0]) * scale)
    random = [
        (around.view(np.int32) + rng.integers(-8, 9, parts[0], dtype=np.int32)).view(np.float32),
        _float32(rng.choice(ties, parts[1]) * scale),
        _any_float(parts[2], rng),
        _float32(rng.normal(size=parts[3]) * (span[1] - span[0]) / 5),
        _float32(rng.uniform(*span, parts[4])),
    ]
    return _finite(np.concatenate([fixed, *random]))


def _float32(values: Array) -> Array:
    return np.clip(values, -FLOAT_MAX, FLOAT_MAX).astype(np.float32)


def _moved(values: Array, steps: range) -> Array:
    """Each value and its neighbours that many floats away; of zero only those are meaningful that do not wrap."""
    bits = values.view(np.int32)
    return _finite(np.concatenate([(bits + np.int32(step)).view(np.float32) for step in steps]))


def _any_float(size: int, rng: np.random.Generator) -> Array:
    return _finite(rng.integers(0, 2**32, size, dtype=np.uint32).view(np.float32))


def _finite(values: Array) -> Array:
    return np.where(np.isfinite(values), values, FLOAT_MAX).astype(np.float32)
