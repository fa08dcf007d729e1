"""The statistics of one pass: update / compute / reset.

Statistics are weighted points: a weight tensor is its own elements, each with weight one; an activation
stream is the centres of a fine histogram with their counts. Calibrations read both the same way.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qexp.quant.granularity import blocks


@dataclass(frozen=True)
class Statistics:
    """What is known of the values of G blocks: extrema, and points with their weights.

    Shapes: lo, hi (G,); points, weights (G, N). A point of weight 0 says nothing. `points` is None where only
    the extrema were asked for.
    """

    lo: Tensor
    hi: Tensor
    points: Tensor | None = None
    weights: Tensor | None = None

    @classmethod
    def of(cls, x: Tensor, block_shape: tuple[int, ...]) -> Statistics:
        """Exact statistics of a tensor that is at hand. Errors: ValueError for NaN, infinity or no element.

        >>> Statistics.of(torch.tensor([[1.0, -2.0], [0.0, 3.0]]), (1, 2)).lo
        tensor([-2.,  0.])
        """
        _require_values(x)
        rows = blocks(x.detach().float(), block_shape)
        return cls(rows.amin(1), rows.amax(1), rows, torch.ones_like(rows))


def _require_values(x: Tensor) -> None:
    if x.numel() == 0:
        raise ValueError("holds no value")
    lo, hi = torch.aminmax(x.detach())
    # Extrema propagate NaN, so two scalars tell about all elements.
    if not bool(lo.isfinite() & hi.isfinite()):
        raise ValueError("holds NaN or infinite values")


class MinMaxObserver(nn.Module):
    """Running extrema of everything seen since the last reset.

    >>> observer = MinMaxObserver(); observer.update(torch.tensor([1.0, 4.0])); observer.update(torch.tensor(-2.0))
    >>> observer.compute().lo, observer.compute().hi
    (tensor([-2.]), tensor([4.]))
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64), persistent=False)
        self.register_buffer("lo", torch.zeros(1), persistent=False)
        self.register_buffer("hi", torch.zeros(1), persistent=False)

    def update(self, x: Tensor) -> None:
        """Take in a tensor of any shape. Errors: ValueError for NaN, infinity or no element."""
        _require_values(x)
        lo, hi = torch.aminmax(x.detach().float())
        if self.seen:
            lo, hi = lo.minimum(self.lo[0]), hi.maximum(self.hi[0])
        self.lo.fill_(lo)
        self.hi.fill_(hi)
        self.seen += x.numel()

    def compute(self) -> Statistics:
        """The statistics so far. Errors: ValueError before the first update."""
        if not self.seen:
            raise ValueError("no calibration data arrived")
        return Statistics(self.lo.clone(), self.hi.clone())

    def reset(self) -> None:
        """Forget everything."""
        for buffer in self.buffers():
            buffer.zero_()


class HistogramObserver(MinMaxObserver):
    """Extrema and a histogram that widens by doubling, so its content never depends on the order of the batches.

    2 x 2^14 bins cover [-2^e, 2^e), e >= -100 the smallest exponent that holds all values: between 8,192 and 16,384
    bins lie between 0 and max|x|. Zeros are counted apart, because after a ReLU they are a spike and no density.
    """

    bins = 2**14  # on each side of zero
    smallest_exponent = -100  # so that 2^(14 - e) stays a float32

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("counts", torch.zeros(2 * self.bins, dtype=torch.int64), persistent=False)
        self.register_buffer("zeros", torch.zeros((), dtype=torch.int64), persistent=False)
        self.register_buffer("exponent", torch.zeros((), dtype=torch.int64), persistent=False)

    def update(self, x: Tensor) -> None:
        first = not self.seen
        super().update(x)
        x = x.detach().float().flatten()
        magnitude = self.lo.neg().maximum(self.hi)
        self._widen(int(torch.frexp(magnitude).exponent) if magnitude > 0 else None, first)
        # A product with a power of two is exact: which bin a value falls into is not a matter of rounding.
        index = torch.ldexp(x, 14 - self.exponent).floor_().long()
        # A product that underflows still lies on its side of zero.
        index.masked_fill_((index == 0) & (x < 0), -1).add_(self.bins)
        self.counts += torch.bincount(index, minlength=2 * self.bins)
        zeros = (x == 0).sum()
        self.counts[self.bins] -= zeros
        self.zeros += zeros

    def _widen(self, exponent: int | None, first: bool) -> None:
        """Merge 2^steps neighbouring bins into one, on each side of zero."""
        if exponent is None:
            return
        exponent = max(exponent, self.smallest_exponent)
        empty = first or not self.counts.any()
        steps = exponent - int(self.exponent)
        if not empty and steps <= 0:
            return
        if not empty:
            group = min(2**steps, self.bins)
            negative, positive = self.counts.view(2, -1, group).sum(2)
            self.counts.zero_()
            self.counts[self.bins - len(negative) : self.bins] = negative
            self.counts[self.bins : self.bins + len(positive)] = positive
        self.exponent.fill_(exponent)

    def compute(self) -> Statistics:
        extrema = super().compute()
        filled = self.counts.nonzero().flatten()
        centres = torch.ldexp(filled - self.bins + 0.5, self.exponent - 14).clamp(extrema.lo, extrema.hi)
        points = torch.cat([centres, centres.new_zeros(1)]).float()
        weights = torch.cat([self.counts[filled], self.zeros[None]]).double()
        order = points.argsort()
        return Statistics(extrema.lo, extrema.hi, points[order][None], weights[order][None])
