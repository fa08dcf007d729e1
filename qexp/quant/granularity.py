"""Which elements of a tensor share one scale and one zero point.

A granularity is a block shape and nothing else (Wu et al. 2020, section 3.2): every dimension of size n
is viewed as (n / b, b) and statistics are reduced over the b's, so no later step knows which it was.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qexp.quant.checks import require_bool, require_whole

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Granularity:
    """Base of all granularities; a new one implements `block_shape` alone.

    `follows_batch` says that an activation has other blocks in every batch (tokens, groups of one pixel), so that its
    ranges are computed in each call. `pads` allows blocks that stand out over the end, filled up with nothing.
    """

    def block_shape(self, shape: Shape) -> Shape:
        """Size of one block along each dimension of a tensor of the given shape."""
        raise TypeError(f"{type(self).__name__} must define block_shape")

    @property
    def follows_batch(self) -> bool:
        """Whether activations have blocks that lie within one sample."""
        return True

    @property
    def pads(self) -> bool:
        """Whether the last block along a dimension may be incomplete."""
        return False

    def param_shape(self, shape: Shape) -> Shape:
        """Shape of scale and zero point: as many as there are blocks along each dimension.

        Errors: ValueError when the blocks do not divide the tensor.
        """
        blocks = self.block_shape(shape)
        for axis, (n, b) in enumerate(zip(shape, blocks, strict=True)):
            if n % b and not self.pads:
                raise ValueError(
                    f"{self}: blocks of {b} do not divide dimension {axis} of a tensor of shape {tuple(shape)}"
                    "; pad=true fills the last one up"
                )
        return tuple(math.ceil(n / b) for n, b in zip(shape, blocks, strict=True))


@dataclass(frozen=True)
class PerTensor(Granularity):
    """All elements share one scale.

    >>> PerTensor().block_shape((64, 3, 7, 7))
    (64, 3, 7, 7)
    """

    def block_shape(self, shape: Shape) -> Shape:
        return tuple(shape)

    @property
    def follows_batch(self) -> bool:
        return False

    def __str__(self) -> str:
        return "per_tensor"


@dataclass(frozen=True)
class PerChannel(Granularity):
    """One scale per index of `axis`; axis 0 of a convolution or linear weight is the output channel.

    Of activations (N, C, H, W) the channel is axis 1.

    >>> PerChannel(0).block_shape((64, 3, 7, 7))
    (1, 3, 7, 7)
    """

    axis: int = 0

    def __post_init__(self) -> None:
        require_whole("axis", self.axis, 0)

    def block_shape(self, shape: Shape) -> Shape:
        if self.axis >= len(shape):
            raise ValueError(f"axis={self.axis}: a tensor of shape {tuple(shape)} has dimensions 0 to {len(shape) - 1}")
        return tuple(1 if i == self.axis else n for i, n in enumerate(shape))

    @property
    def follows_batch(self) -> bool:
        return self.axis == 0

    def __str__(self) -> str:
        return "per_channel" if self.axis == 0 else f"per_channel(axis={self.axis})"


@dataclass(frozen=True)
class PerColumn(Granularity):
    """One scale for each column of W in Y = X W, which is an output channel: axis 0 of torch's weight (out, in).

    Of activations X (N, features) a column is a feature.

    >>> PerColumn().block_shape((64, 128))
    (1, 128)
    """

    of_weight: bool = True

    def block_shape(self, shape: Shape) -> Shape:
        axis = 0 if self.of_weight else features_axis(shape)
        return tuple(1 if i == axis else n for i, n in enumerate(shape))

    @property
    def follows_batch(self) -> bool:
        return self.of_weight

    def __str__(self) -> str:
        return "per_column"


@dataclass(frozen=True)
class PerRow(Granularity):
    """One scale for each row of W in Y = X W, which is an input channel: axis 1 of torch's weight (out, in).

    Of activations X (N, features) a row is a sample.

    >>> PerRow().block_shape((64, 128))
    (64, 1)
    """

    of_weight: bool = True

    def block_shape(self, shape: Shape) -> Shape:
        axis = features_axis(shape) if self.of_weight else 0
        return tuple(1 if i == axis else n for i, n in enumerate(shape))

    def __str__(self) -> str:
        return "per_row"


@dataclass(frozen=True)
class PerGroup(Granularity):
    """One scale for `size` neighbours along the dimension that a product sums over: input channels or features.

    >>> PerGroup(32).block_shape((64, 128, 3, 3)), PerGroup(32).param_shape((64, 128, 3, 3))
    ((1, 32, 1, 1), (64, 4, 3, 3))
    """

    size: int = 32
    pad: bool = False

    def __post_init__(self) -> None:
        require_whole("size", self.size, 1)
        require_bool("pad", self.pad)

    def block_shape(self, shape: Shape) -> Shape:
        axis = features_axis(shape)
        return tuple(self.size if i == axis else 1 for i in range(len(shape)))

    @property
    def pads(self) -> bool:
        return self.pad

    def __str__(self) -> str:
        return f"per_group({self.size}{', pad' if self.pad else ''})"


@dataclass(frozen=True)
class PerBlock(Granularity):
    """One scale for each block of `rows` output by `columns` input channels, all positions of a kernel included.

    >>> PerBlock(16, 8).param_shape((64, 128))
    (4, 16)
    """

    rows: int = 16
    columns: int = 16
    pad: bool = False

    def __post_init__(self) -> None:
        require_whole("rows", self.rows, 1)
        require_whole("columns", self.columns, 1)
        require_bool("pad", self.pad)

    def block_shape(self, shape: Shape) -> Shape:
        if len(shape) < 2:
            raise ValueError(f"{self}: a tensor of shape {tuple(shape)} has no rows and columns")
        sizes = {0: self.rows, features_axis(shape): self.columns}
        return tuple(sizes.get(i, n) for i, n in enumerate(shape))

    @property
    def pads(self) -> bool:
        return self.pad

    def __str__(self) -> str:
        return f"per_block({self.rows}x{self.columns}{', pad' if self.pad else ''})"


@dataclass(frozen=True)
class PerToken(Granularity):
    """All features of one position share a scale: a token of a text (N, T, D), a pixel of an image (N, C, H, W).

    >>> PerToken().block_shape((8, 128, 384)), PerToken().block_shape((8, 16, 4, 4))
    ((1, 1, 384), (1, 16, 1, 1))
    """

    def block_shape(self, shape: Shape) -> Shape:
        axis = features_axis(shape)
        return tuple(n if i == axis else 1 for i, n in enumerate(shape))

    def __str__(self) -> str:
        return "per_token"


@dataclass(frozen=True)
class PerElement(Granularity):
    """Every element has a scale of its own: no format, but the ceiling of what any granularity can reach.

    >>> PerElement().param_shape((64, 128))
    (64, 128)
    """

    def block_shape(self, shape: Shape) -> Shape:
        return (1,) * len(shape)

    def __str__(self) -> str:
        return "per_element"


def features_axis(shape: Shape) -> int:
    """The dimension that a product sums over: 1 of (N, C, H, W) and of a weight, else the last."""
    return 1 if len(shape) == 4 else len(shape) - 1


def split(x: Tensor, block_shape: Shape) -> Tensor:
    """View every dimension n as (ceil(n / b), b), filled up with zeros: (n0 / b0, b0, n1 / b1, b1, ...)."""
    import torch

    missing = [-n % b for n, b in zip(x.shape, block_shape, strict=True)]
    if any(missing):
        x = torch.nn.functional.pad(x, [side for m in reversed(missing) for side in (0, m)])
    return x.reshape([size for n, b in zip(x.shape, block_shape, strict=True) for size in (n // b, b)])


def join(blocked: Tensor, shape: Shape) -> Tensor:
    """Undo `split`: back to the tensor's own shape."""
    sizes = blocked.shape
    x = blocked.reshape([sizes[i] * sizes[i + 1] for i in range(0, len(sizes), 2)])
    return x[tuple(slice(n) for n in shape)] if tuple(x.shape) != tuple(shape) else x


def blocks(x: Tensor, block_shape: Shape) -> Tensor:
    """Rows of the returned (G, n) tensor are the blocks of x, in the row-major order of the blocks."""
    blocked = split(x, block_shape)
    order = [*range(0, blocked.dim(), 2), *range(1, blocked.dim(), 2)]
    return blocked.permute(order).reshape(-1, math.prod(block_shape))
