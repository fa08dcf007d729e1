"""Rounding modes: which of its two neighbours a value becomes. Importing this file needs no torch.

A mode is a frozen value with one method for integers, `__call__`, and one for any sorted list of levels,
`thresholds`; the straight-through gradient is added where they are used.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Rounding:
    """Base of all modes; a new deterministic one implements `__call__` and `goes_up_at`."""

    def __call__(self, x: Tensor) -> Tensor:
        """Integers next to x, of the same shape and type."""
        raise TypeError(f"{type(self).__name__} must define __call__")

    def goes_up_at(self, lower: Tensor, upper: Tensor, middle: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Between neighbouring levels: the value from which the upper one is taken, and whether that value takes it.

        `middle` is where the nearest one changes; `codes` are the integer names of the lower levels.
        """
        raise TypeError(f"{type(self).__name__} must define goes_up_at")

    def thresholds(self, levels: Tensor, middles: Tensor, codes: Tensor) -> Tensor:
        """Thresholds Delta_i as float32: x becomes level i + 1 or a higher one exactly where x > Delta_i.

        Gholami et al. 2021, equation 7, with every decision about ties moved into Delta_i: a tie that goes up moves it
        to the next smaller float. Shapes: levels (n,), middles and codes (n - 1,), result (n - 1,); float64 but for it.
        """
        import torch

        at, inclusive = self.goes_up_at(levels[:-1], levels[1:], middles, codes)
        nearest = at.float()  # where it lies above a threshold between two floats, it goes up itself
        below = torch.nextafter(nearest, nearest.new_full((), -torch.inf))
        return below.where((nearest > at) | (inclusive & (nearest == at)), nearest)

    def at(self, site: str, step: int, part: int = 0) -> Rounding:
        """The mode as one site uses it in one step, for one of the equal parts of a batch; only random ones differ."""
        return self

    @property
    def is_random(self) -> bool:
        """Whether a draw decides."""
        return False

    def __str__(self) -> str:
        return "".join(f"_{c.lower()}" if c.isupper() else c for c in type(self).__name__).lstrip("_")


@dataclass(frozen=True)
class HalfEven(Rounding):
    """Nearest, ties to the even code (IEEE 754 roundTiesToEven): the rounding of ONNX and of every engine here.

    >>> import torch
    >>> HalfEven()(torch.tensor([0.5, 1.5, 2.5]))
    tensor([0., 2., 2.])
    """

    def __call__(self, x: Tensor) -> Tensor:
        return x.round()

    def goes_up_at(self, lower, upper, middle, codes):
        return middle, codes % 2 != 0


@dataclass(frozen=True)
class HalfAway(Rounding):
    """Nearest, ties away from zero.

    >>> import torch
    >>> HalfAway()(torch.tensor([0.5, 1.5, -2.5]))
    tensor([ 1.,  2., -3.])
    """

    def __call__(self, x: Tensor) -> Tensor:
        # x + 0.5 would round: the float below one half must stay below.
        whole = x.trunc()
        # Of an infinite quotient, infinity - infinity counts as nothing.
        return whole + (x - whole).mul_(2).trunc_().nan_to_num_()

    def goes_up_at(self, lower, upper, middle, codes):
        return middle, middle >= 0


@dataclass(frozen=True)
class Floor(Rounding):
    """The neighbour below.

    >>> import torch
    >>> Floor()(torch.tensor([0.9, -0.1]))
    tensor([ 0., -1.])
    """

    def __call__(self, x: Tensor) -> Tensor:
        return x.floor()

    def goes_up_at(self, lower, upper, middle, codes):
        return upper, upper == upper


@dataclass(frozen=True)
class Ceil(Rounding):
    """The neighbour above.

    >>> import torch
    >>> Ceil()(torch.tensor([0.1, -0.9]))
    tensor([1., -0.])
    """

    def __call__(self, x: Tensor) -> Tensor:
        return x.ceil()

    def goes_up_at(self, lower, upper, middle, codes):
        return lower, lower != lower


@dataclass(frozen=True)
class TowardZero(Rounding):
    """The neighbour nearer to zero, truncation; between a negative and a positive level, the nearest.

    >>> import torch
    >>> TowardZero()(torch.tensor([0.9, -0.9]))
    tensor([0., -0.])
    """

    def __call__(self, x: Tensor) -> Tensor:
        return x.trunc()

    def goes_up_at(self, lower, upper, middle, codes):
        at = lower.where(upper <= 0, upper.where(lower >= 0, middle))
        return at, (lower >= 0) | ((upper > 0) & (codes % 2 != 0))


@dataclass(frozen=True)
class Stochastic(Rounding):
    """Up with a probability equal to the fractional part: SR(x) = floor(x) + Bernoulli(x - floor(x)), E[SR(x)] = x.

    Gupta et al. 2015, section 3.1. The draw of element i is a hash of (seed, site, step, i), a generator of its own:
    the same seed gives the same codes whatever else draws numbers, in eager and in compiled code. i counts through the
    whole batch, of which x is the part number `part` where several processes share it: together they draw what one
    process draws, and no number twice.

    >>> import torch
    >>> Stochastic(seed=0)(torch.full((1_000_000,), 2.25)).mean().round(decimals=2)
    tensor(2.2500)
    """

    seed: int = 0
    key: int = 0  # of the site and the step
    part: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"seed={self.seed!r}: must be an integer of at least 0")

    def at(self, site: str, step: int, part: int = 0) -> Stochastic:
        return replace(self, key=zlib.crc32(f"{self.seed} {site} {step}".encode()), part=part)

    @property
    def is_random(self) -> bool:
        return True

    def __call__(self, x: Tensor) -> Tensor:
        lower = x.floor()
        return lower + ((x - lower) > self.uniform(x))

    @property
    def stream(self) -> int:
        """The number of this stream of draws, a signed 32-bit integer."""
        return _int32(self.key or zlib.crc32(f"{self.seed}".encode()))

    def first(self, size: int) -> int:
        """The number in the whole batch of the first element of this part, which has so many; 32 bits of it."""
        return _int32(self.part * size % 2**32)

    def uniform(self, x: Tensor) -> Tensor:
        """Independent draws from {0, 1, ..., 2^24 - 1} / 2^24, one for each element of x."""
        import torch

        index = torch.arange(x.numel(), dtype=torch.int32, device=x.device).view(x.shape)
        if self.part:
            index += self.first(x.numel())  # wraps around
        return hashed_uniform(index, self.stream)

    def goes_up_at(self, lower, upper, middle, codes):
        raise TypeError("stochastic rounding has no thresholds")

    def __str__(self) -> str:
        return "stochastic"


def hashed_uniform(index: Tensor, key: int | Tensor) -> Tensor:
    """A hash of index (int32) and key as float32 in [0, 1): two rounds of multiply and xor-shift on 32 bits.

    The constants are those of a mixer found by search for the least bias (C. Wellons, hash-prospector, 2018 to 2022).
    """
    import torch

    # int32 products wrap around as the hash wants; its shifts fill in the sign, which the masks take away again.
    h = index ^ key
    h = (h ^ ((h >> 16) & 0xFFFF)) * 0x21F0AAAD
    h = h + key  # or streams would be one sequence in another order
    h = (h ^ ((h >> 15) & 0x1FFFF)) * _int32(0xD35A2D97)
    h = h ^ ((h >> 15) & 0x1FFFF)
    return ((h >> 8) & 0xFFFFFF).to(torch.float32) * 2.0**-24


def _int32(value: int) -> int:
    """The signed number with these 32 bits."""
    return value - 2**32 if value >= 2**31 else value
