"""Which elements of a tensor share one scale and one zero point.

A granularity is a block shape and nothing else (Wu et al. 2020, section 3.2): every dimension of size n
is viewed as (n / b, b) and statistics are reduced over the b's, so no later step knows which it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Granularity:
    """Base of all granularities; a new one implements `block_shape` alone."""

    def block_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Size of one block along each dimension of a tensor of the given shape."""
        raise TypeError(f"{type(self).__name__} must define block_shape")

    def param_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of scale and zero point: as many as there are blocks along each dimension."""
        return tuple(n // b for n, b in zip(shape, self.block_shape(shape), strict=True))


@dataclass(frozen=True)
class PerTensor(Granularity):
    """All elements share one scale.

    >>> PerTensor().block_shape((64, 3, 7, 7))
    (64, 3, 7, 7)
    """

    def block_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(shape)

    def __str__(self) -> str:
        return "per_tensor"


@dataclass(frozen=True)
class PerChannel(Granularity):
    """One scale per index of `axis`; axis 0 of a convolution or linear weight is the output channel.

    >>> PerChannel(0).block_shape((64, 3, 7, 7))
    (1, 3, 7, 7)
    """

    axis: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.axis, bool) or not isinstance(self.axis, int) or self.axis < 0:
            raise ValueError(f"axis={self.axis!r}: the kept dimension must be an integer of at least 0")

    def block_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if self.axis >= len(shape):
            raise ValueError(f"axis={self.axis}: a tensor of shape {tuple(shape)} has dimensions 0 to {len(shape) - 1}")
        return tuple(1 if i == self.axis else n for i, n in enumerate(shape))

    def __str__(self) -> str:
        return "per_channel" if self.axis == 0 else f"per_channel(axis={self.axis})"


def blocks(x: Tensor, block_shape: tuple[int, ...]) -> Tensor:
    """Rows of the returned (G, n) tensor are the blocks of x, in the row-major order of the blocks."""
    interleaved = [size for n, b in zip(x.shape, block_shape, strict=True) for size in (n // b, b)]
    order = [*range(0, 2 * x.dim(), 2), *range(1, 2 * x.dim(), 2)]
    elements = 1
    for b in block_shape:
        elements *= b
    return x.reshape(interleaved).permute(order).reshape(-1, elements)
