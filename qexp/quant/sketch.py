"""What one pass keeps of a tensor, in memory that does not grow: update / compute / reset / merge."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from qexp.quant import compiled
from qexp.quant.granularity import Granularity, PerTensor, blocks
from qexp.quant.stats import Statistics, require_values

PER_TENSOR = PerTensor()


class Sketch(nn.Module):
    """All that calibrations ask of a stream, in memory that does not grow: one pass serves every one of them.

    Cells are those of a floating-point number: the sign, `octaves` exponents below the largest one, and `fraction`
    bits, so a cell is 2^-fraction of its values wide, with outliers or without. Values below fall into the smallest
    cell; zeros are counted apart, because after a ReLU they are a spike and no density. When a larger exponent
    arrives, the cells that fall out at the lower end go into the smallest one. So counts are those of the multiset
    of values: neither order nor batches nor shards matter, and sketches of parts merge into the sketch of the whole.
    The `tail` largest values of each sign are kept as they are: percentiles above 1 - tail / N are exact.

    `average` is the one thing that depends on batches: E = (1 - c) E + c extrema, c = `constant`, from the first batch
    on, as torch's MovingAverageMinMaxObserver has it; merged sketches follow each other.

    >>> sketch = Sketch(); sketch.update(torch.tensor([1.0, 4.0, 0.0])); sketch.update(torch.tensor([-2.0]))
    >>> stats = sketch.compute(); stats.lo, stats.hi, stats.points
    (tensor([-2.]), tensor([4.]), tensor([[-2.,  0.,  1.,  4.]]))
    """

    octaves = 20
    smallest_exponent = -126 + 20  # below it float32 has fewer fraction bits

    def __init__(self, granularity: Granularity = PER_TENSOR, shape: tuple[int, ...] = (1,), constant: float = 0.01):
        super().__init__()
        self.granularity, self.constant = granularity, constant
        groups = 1
        for n in granularity.param_shape(shape):
            groups *= n
        # One tensor gets the finest cells; many channels share the memory.
        self.fraction, self.tail = (11, 2048) if groups == 1 else (7, 64)
        self.side = self.octaves * 2**self.fraction + 1  # cells of one sign, the smallest one first
        for name, size, dtype in (
            ("seen", (), torch.int64), ("batches", (), torch.int64), ("exponent", (), torch.int64),
            ("lo", (groups,), torch.float32), ("hi", (groups,), torch.float32), ("zeros", (groups,), torch.int64),
            ("counts", (groups, 2 * self.side), torch.int64), ("tails", (2, groups, self.tail), torch.float32),
            ("first", (2, groups), torch.float64), ("faded", (2, groups), torch.float64),
        ):  # fmt: skip
            self.register_buffer(name, torch.zeros(size, dtype=dtype), persistent=False)
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        for buffer in self.buffers():
            buffer.zero_()
        self.exponent.fill_(self.smallest_exponent)

    def update(self, x: Tensor) -> None:
        """Take in a tensor. Errors: ValueError for NaN, infinity or no element."""
        x = x.detach().float() + 0.0  # no negative zeros
        least, most = require_values(x)
        rows = x.reshape(1, -1) if len(self.lo) == 1 else blocks(x, self.granularity.block_shape(tuple(x.shape)))
        rows = rows.contiguous()
        lo, hi = (least.view(1), most.view(1)) if len(rows) == 1 else (rows.amin(1), rows.amax(1))
        extrema = torch.stack([lo, hi]).double()
        self._take_extrema(lo, hi, extrema, 1, x.numel())
        self.faded.mul_(1 - self.constant).add_(extrema, alpha=self.constant)
        # Zeros have no exponent.
        self._widen(int(torch.frexp(lo.neg().maximum(hi).max().clamp(min=2.0**-126)).exponent))
        self._take_tails(rows)
        counts, zeros = self._counts_and_zeros(rows)
        self.zeros += zeros
        self.counts += counts
        self.counts[:, self.side] -= zeros

    def _take_extrema(self, lo: Tensor, hi: Tensor, first: Tensor, batches: int, seen: int) -> None:
        """Extrema, and the average of those of `batches` batches of which `first` are the first's."""
        if not self.seen:
            self.lo.copy_(lo)
            self.hi.copy_(hi)
            self.first.copy_(first)
        self.lo.copy_(self.lo.minimum(lo))
        self.hi.copy_(self.hi.maximum(hi))
        self.batches += batches
        self.seen += seen

    def _counts_and_zeros(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Values in each cell, zeros being in the smallest one, and the zeros; rows is written over."""
        if compiled.is_loaded() and rows.device.type == "cpu":
            return compiled.count_cells(rows, self.fraction, self._lowest, self.side)
        scratch = torch.empty_like(rows)
        zeros = rows.shape[1] - _nonzeros(rows, scratch)
        return self._count(rows, scratch), zeros

    @property
    def _lowest(self) -> int:
        """The bits, without those that no cell distinguishes, of the lower end of the second smallest cell."""
        return (int(self.exponent) + 126 - self.octaves + 1) << self.fraction

    def _count(self, rows: Tensor, scratch: Tensor) -> Tensor:
        """Values in each cell; zeros are in the smallest cell of the positive side. Both tensors are written over.

        New memory for each step would cost as much as the steps.
        """
        bits = rows.view(torch.int32)
        shift = 23 - self.fraction
        index = torch.bitwise_and(bits, 0x7FFFFFFF, out=scratch.view(torch.int32))
        index.bitwise_right_shift_(shift).sub_(self._lowest - 1).clamp_(min=0)
        index.bitwise_xor_(bits.bitwise_right_shift_(31)).add_(self.side)  # -1 - index where negative
        if len(rows) == 1:
            return torch.bincount(index.flatten(), minlength=2 * self.side)[None]
        offset = torch.arange(len(rows), device=rows.device)[:, None] * (2 * self.side)
        return torch.bincount((index + offset).flatten(), minlength=self.counts.numel()).view_as(self.counts)

    def _widen(self, exponent: int) -> None:
        """Make room for values below 2^exponent."""
        shift = (exponent - int(self.exponent)) << self.fraction
        if shift <= 0:
            return
        negative, positive = self.counts[:, : self.side].flip(1), self.counts[:, self.side :].clone()
        sides = []
        for cells in negative, positive:
            moved = torch.zeros_like(cells)
            fallen = min(shift + 1, self.side)
            moved[:, 0] = cells[:, :fallen].sum(1)
            moved[:, 1 : 1 + self.side - fallen] = cells[:, fallen:]
            sides.append(moved)
        self.counts.copy_(torch.cat([sides[0].flip(1), sides[1]], 1))
        self.exponent.fill_(exponent)

    def _take_tails(self, rows: Tensor) -> None:
        for side, (sign, most) in enumerate([(-1, -self.lo), (1, self.hi)]):
            if bool((most > 0).any()):
                self._take_tail(side, _largest(rows, sign, self.tail, self.tails[side].amin(1)))

    def _take_tail(self, side: int, candidates: Tensor) -> None:
        both = torch.cat([self.tails[side], candidates.clamp(min=0)], 1)
        self.tails[side].copy_(both.topk(self.tail, dim=1).values)

    def merge(self, other: Sketch) -> None:
        """Take in what another sketch has seen, after what this one has seen. Errors: ValueError for another kind."""
        if (self.counts.shape, self.constant) != (other.counts.shape, other.constant):
            raise ValueError("sketches of different blocks or constants do not merge")
        if not other.seen:
            return
        if not self.seen:
            for mine, theirs in zip(self.buffers(), other.buffers(), strict=True):
                mine.copy_(theirs)
            return
        faded = self.faded * (1 - self.constant) ** int(other.batches) + other.faded
        self._take_extrema(other.lo, other.hi, other.first, int(other.batches), int(other.seen))
        self.faded.copy_(faded)
        aligned = copy.deepcopy(other)
        aligned._widen(int(self.exponent))
        self._widen(int(other.exponent))
        self.counts += aligned.counts
        self.zeros += other.zeros
        for side in range(2):
            self._take_tail(side, other.tails[side])

    def compute(self) -> Statistics:
        """The statistics so far. Errors: ValueError before the first update."""
        if not self.seen:
            raise ValueError("no calibration data arrived")
        tails = torch.cat([0 - self.tails[0], self.tails[1]], 1)  # (G, 2 tail), 0 where there is none
        exact = (tails != 0).double()
        rest = self.counts - self._count_of(tails)
        filled = rest.any(0).nonzero().flatten()
        # What is left in a cell that a tail divides lies on the tail's inner side.
        inner = self.tails.amin(2)
        bounds = self.lo.maximum(-inner[0]), self.hi.minimum(inner[1])
        centres = self._centres(filled).float().clamp(bounds[0][:, None], bounds[1][:, None])  # (G, cells)
        points = torch.cat([centres, tails, tails.new_zeros(len(tails), 1)], 1)
        weights = torch.cat([rest[:, filled].double(), exact, self.zeros[:, None].double()], 1)
        points, order = points.sort(dim=1, stable=True)
        weights = weights.gather(1, order)
        used = (weights > 0).any(0)
        fade = (1 - self.constant) ** int(self.batches)
        average = (self.faded + fade * self.first).float()
        return Statistics(self.lo.clone(), self.hi.clone(), points[:, used], weights[:, used], average)

    def _count_of(self, tails: Tensor) -> Tensor:
        counts = self._count(tails.clone(), torch.empty_like(tails))
        counts[:, self.side] -= (tails == 0).sum(1)
        return counts

    def _centres(self, cells: Tensor) -> Tensor:
        """The middle of each of these cells, float64."""
        place = torch.where(cells >= self.side, cells - self.side, self.side - 1 - cells)  # 0: the smallest one
        step = (place - 1).clamp(min=0).double()
        fraction = 1 + (step.remainder(2**self.fraction) + 0.5) / 2**self.fraction
        octave = step.div(2**self.fraction, rounding_mode="floor") + int(self.exponent) - self.octaves
        smallest = step.new_full((), 2.0 ** (int(self.exponent) - self.octaves - 1))
        centres = torch.where(place > 0, torch.ldexp(fraction, octave), smallest)
        return torch.where(cells >= self.side, centres, -centres)


def _nonzeros(rows: Tensor, scratch: Tensor) -> Tensor:
    """Number of values other than 0 in each row; a sum of at most 2^23 ones is exact in float32, and fast."""
    ones = torch.sign(rows, out=scratch).abs_()
    counts = [part.sum(1).long() for part in ones.split(2**23, dim=1)]
    return torch.stack(counts).sum(0)


def _largest(rows: Tensor, sign: int, count: int, kept: Tensor) -> Tensor:
    """What of sign * rows may belong to the `count` largest of each row, values up to `kept` being no news.

    Of a large tensor, pieces whose extremum is too small are passed over: the count-th largest of the extrema is no
    larger than the count-th largest value.
    """
    bound = float(kept[0])
    pieces, rest = rows[0, : rows.shape[1] // 128 * 128].view(-1, 128), rows[:, rows.shape[1] // 128 * 128 :]
    if len(rows) > 1 or (bound == 0 and len(pieces) < count):
        return (rows * sign).topk(min(count, rows.shape[1]), dim=1).values
    extrema = pieces.amax(1) if sign > 0 else pieces.amin(1).neg()
    if bound == 0:
        bound = float(torch.nextafter(extrema.topk(count).values[-1], extrema.new_zeros(())))
    found = (pieces[extrema > bound] * sign).flatten()
    return torch.cat([found[found > bound][None], rest * sign], 1)
