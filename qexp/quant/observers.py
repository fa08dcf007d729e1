"""The observer of a site: a sketch of its values and, where a calibration compares them, a sample of its rows."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from qexp.quant.granularity import Granularity
from qexp.quant.sketch import Sketch
from qexp.quant.stats import Statistics

State = dict[str, Tensor]


class Observer(nn.Module):
    """Sees every batch of one site in the calibration pass.

    `key` names what was asked of the pass besides the values: two observers of one site with one key end up equal.

    >>> observer = Observer(); observer.update(torch.tensor([1.0, -4.0])); observer.compute().lo
    tensor([-4.])
    """

    def __init__(
        self,
        granularity: Granularity | None = None,
        shape: tuple[int, ...] = (1,),
        constant: float = 0.01,
        row_length: int = 0,
    ) -> None:
        super().__init__()
        self.sketch = Sketch(*([] if granularity is None else [granularity]), shape=shape, constant=constant)
        self.sample = RowSample(row_length) if row_length else None
        self.key = f"{self.sketch.granularity}, {float(constant)!r}, {row_length}"

    def update(self, x: Tensor) -> None:
        """Take in a tensor. Errors: ValueError for NaN, infinity or no element."""
        self.sketch.update(x)
        if self.sample is not None:
            self.sample.update(x)

    def merge(self, other: Observer) -> None:
        """Take in what another observer has seen, as another process did."""
        self.sketch.merge(other.sketch)
        if self.sample is not None:
            self.sample.merge(other.sample)

    def compute(self) -> Statistics:
        """The statistics so far. Errors: ValueError before the first update."""
        stats = self.sketch.compute()
        return stats if self.sample is None else replace(stats, rows=self.sample.rows())

    def state(self) -> State:
        """All that was seen, as tensors to store; the histogram, mostly empty, as its filled cells."""
        state = {name: buffer.clone() for name, buffer in self.named_buffers() if name != "sketch.counts"}
        cells = self.sketch.counts.flatten().nonzero().flatten()
        return state | {"cells": cells, "counts": self.sketch.counts.flatten()[cells]}

    def load(self, state: State) -> None:
        """Take the place of the observer that `state` came from. Errors: ValueError for one of another kind."""
        buffers = {name: buffer for name, buffer in self.named_buffers() if name != "sketch.counts"}
        shapes = {name: buffer.shape for name, buffer in buffers.items()}
        if shapes != {name: tensor.shape for name, tensor in state.items() if name not in ("cells", "counts")}:
            raise ValueError("was observed in another way")
        for name, buffer in buffers.items():
            buffer.copy_(state[name])
        self.sketch.counts.zero_().view(-1)[state["cells"]] = state["counts"]


class RowSample(nn.Module):
    """A sample of whole rows (R, features): those with the smallest hashes, so it depends on the rows seen alone.

    >>> sample = RowSample(2, size=3); sample.update(torch.arange(8.0).view(4, 2)); sample.rows().shape
    torch.Size([3, 2])
    """

    def __init__(self, features: int, size: int = 1024) -> None:
        super().__init__()
        self.register_buffer("kept", torch.zeros(size, features), persistent=False)
        self.register_buffer("keys", torch.zeros(size, dtype=torch.int64), persistent=False)
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.kept.zero_()
        self.keys.fill_(torch.iinfo(torch.int64).max)

    def update(self, x: Tensor) -> None:
        """Take in rows (..., features)."""
        rows = x.detach().float().reshape(-1, self.kept.shape[1]) + 0.0
        self._keep(rows, _hash(rows))

    def merge(self, other: RowSample) -> None:
        """Take in what another sample has kept."""
        self._keep(other.kept, other.keys)

    def _keep(self, rows: Tensor, keys: Tensor) -> None:
        keys, order = torch.cat([self.keys, keys]).sort(stable=True)
        self.kept.copy_(torch.cat([self.kept, rows])[order[: len(self.keys)]])
        self.keys.copy_(keys[: len(self.keys)])

    def rows(self) -> Tensor:
        """The kept rows (R, features)."""
        return self.kept[self.keys != torch.iinfo(torch.int64).max]


def _hash(rows: Tensor) -> Tensor:
    """A number of 62 bits for each row, from the bits of its values and their places."""
    bits = rows.contiguous().view(torch.int32).long()
    places = torch.arange(bits.shape[1], dtype=torch.int64) * -0x61C8864680B583EB  # wraps around
    return _mixed(_mixed(bits + places).sum(1)) & 0x3FFFFFFFFFFFFFFF


def _mixed(h: Tensor) -> Tensor:
    """SplitMix64 (Steele et al. 2014): numbers of 64 bits, one to one; without it sums of multiples would collide."""
    h = (h ^ (h >> 30)) * -0x40A7B892E31B1A47
    h = (h ^ (h >> 27)) * -0x6B2FB644ECCEEE15
    return h ^ (h >> 31)
