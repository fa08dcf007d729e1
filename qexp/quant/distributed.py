"""Several processes, ranks, that train or calibrate one network together: each holds a part of every batch.

Training by two ranks is training by one, up to the order in which floats are summed: extrema and the moments of
BatchNorm are those of the whole batch, gradients are averaged, and random rounding draws for each element of the batch
what one process would draw for it. Outside of such a group every function here does what one process needs: nothing.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, distributed, nn


def is_shared() -> bool:
    """Whether this process is one of several."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def rank() -> int:
    """The number of this process among the ranks; alone, 0."""
    return distributed.get_rank() if is_shared() else 0


def ranks() -> int:
    """How many there are; alone, 1."""
    return distributed.get_world_size() if is_shared() else 1


@torch.no_grad()
def across_ranks(lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
    """Extrema of what all processes saw; of one process, its own."""
    if is_shared():
        distributed.all_reduce(lo, distributed.ReduceOp.MIN)
        distributed.all_reduce(hi, distributed.ReduceOp.MAX)
    return lo, hi


class Mergeable(Protocol):
    """A Sketch, an Observer: a module whose buffers are all that it has seen."""

    def merge(self, other: Mergeable) -> None: ...


@torch.no_grad()
def gather_(seen: Mergeable) -> None:
    """Let every rank's sketch or observer hold what all of them have seen, in the order of the ranks.

    Counts, zeros, tails, extrema and rows are to the bit those of one process that has seen everything; the moving
    average is that of one process that has seen the batches of rank 0, then those of rank 1, up to its last bits.
    Errors: ValueError where the ranks observe different blocks.
    """
    if not is_shared():
        return
    parts = [seen] * ranks()
    distributed.all_gather_object(parts, seen)
    whole = parts[0]
    for part in parts[1:]:
        whole.merge(part)
    for mine, buffer in zip(seen.buffers(), whole.buffers(), strict=True):
        mine.copy_(buffer)


def var_mean_of_batch(x: Tensor) -> tuple[Tensor, Tensor, int]:
    """Variance and mean (C,) over all but dimension 1, of the parts of all ranks, and how many values a channel has.

    The gradient is that of the sum of all ranks' losses. A single process computes `torch.var_mean(correction=0)`.
    """
    dims = [d for d in range(x.dim()) if d != 1]
    count = x.numel() // x.shape[1] * ranks()
    if not is_shared():
        return *torch.var_mean(x, dims, correction=0), count
    mean = _Sum.apply(x.sum(dims)) / count
    centred = x - mean.view([-1 if d == 1 else 1 for d in range(x.dim())])
    return _Sum.apply(centred.square().sum(dims)) / count, mean, count


class _Sum(torch.autograd.Function):
    """The sum over all ranks; every rank's loss depends on every rank's part, so gradients are summed, too."""

    @staticmethod
    def forward(ctx, part: Tensor) -> Tensor:
        whole = part.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(whole)
        return whole

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return _Sum.forward(ctx, grad)


@torch.no_grad()
def mean_across_ranks(x: Tensor) -> Tensor:
    """The mean of all ranks' tensors."""
    return _Sum.apply(x) / ranks() if is_shared() else x


class _OfBatch:
    """BatchNorm that trains by the moments of the whole batch; torch's own SyncBatchNorm is for GPUs alone."""

    def forward(self, x: Tensor) -> Tensor:
        if not is_shared() or not (self.training or self.running_mean is None):
            return super().forward(x)
        self._check_input_dim(x)
        exact = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        var, mean, count = var_mean_of_batch(exact)
        if self.training and self.running_mean is not None:
            with torch.no_grad():
                self.num_batches_tracked += 1
                momentum = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
                self.running_mean.lerp_(mean.to(self.running_mean), momentum)
                self.running_var.lerp_((var * (count / (count - 1))).to(self.running_var), momentum)
        shape = [-1 if d == 1 else 1 for d in range(x.dim())]
        y = (exact - mean.view(shape)) * (var + self.eps).rsqrt().view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(x.dtype)


class BatchNormOfBatch1d(_OfBatch, nn.BatchNorm1d):
    """nn.BatchNorm1d of several ranks."""


class BatchNormOfBatch2d(_OfBatch, nn.BatchNorm2d):
    """nn.BatchNorm2d of several ranks."""


class BatchNormOfBatch3d(_OfBatch, nn.BatchNorm3d):
    """nn.BatchNorm3d of several ranks."""


OF_BATCH: dict[type, type] = {
    nn.BatchNorm1d: BatchNormOfBatch1d,
    nn.BatchNorm2d: BatchNormOfBatch2d,
    nn.BatchNorm3d: BatchNormOfBatch3d,
}
OF_PART = {of_batch: own for own, of_batch in OF_BATCH.items()}


def share_batchnorm_(model: nn.Module, shared: bool = True) -> None:
    """Let every BatchNorm train by the moments of all ranks' batches, or by those of its own rank's again."""
    classes = OF_BATCH if shared else OF_PART
    for module in model.modules():
        module.__class__ = classes.get(type(module), type(module))
