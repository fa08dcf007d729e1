"""What calibrations read: weighted points, of a tensor at hand or of a stream.

A weight tensor is its own elements, each with weight one; an activation stream is the cells of a fine histogram with
their counts, and its most extreme values exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qexp.quant.granularity import blocks


@dataclass(frozen=True)
class Statistics:
    """What is known of the values of G blocks: extrema, and points with their weights.

    Shapes: lo, hi (G,); points, weights (G, N); average (2, G): running means of the batches' extrema; rows (R, F):
    whole rows of the tensor, for what cannot be said of one element. A point of weight 0 says nothing.
    """

    lo: Tensor
    hi: Tensor
    points: Tensor
    weights: Tensor
    average: Tensor
    rows: Tensor | None = None

    @classmethod
    def of(cls, x: Tensor, block_shape: tuple[int, ...]) -> Statistics:
        """Exact statistics of a tensor that is at hand. Errors: ValueError for NaN, infinity or no element.

        >>> Statistics.of(torch.tensor([[1.0, -2.0], [0.0, 3.0]]), (1, 2)).lo
        tensor([-2.,  0.])
        """
        x = x.detach().float()
        require_values(x)
        points = blocks(x, block_shape)
        weights = torch.ones_like(points)
        if points.numel() != x.numel():  # what fills up a block is no value
            weights = blocks(torch.ones_like(x), block_shape)
        lo, hi = points.amin(1), points.amax(1)
        return cls(lo, hi, points, weights, torch.stack([lo, hi]))


def require_values(x: Tensor) -> tuple[Tensor, Tensor]:
    """Extrema of x. Errors: ValueError for NaN, infinity or no element."""
    if x.numel() == 0:
        raise ValueError("no value to take statistics from")
    lo, hi = torch.aminmax(x.detach())
    # Extrema propagate NaN, so two scalars tell about all elements.
    if not bool(lo.isfinite() & hi.isfinite()):
        raise ValueError("holds NaN or infinite values")
    return lo, hi
