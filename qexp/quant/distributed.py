"""Statistics of several processes that train or calibrate one network together."""

from __future__ import annotations

import torch
from torch import Tensor, distributed


def is_shared() -> bool:
    """Whether this process is one of several."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


@torch.no_grad()
def across_ranks(lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
    """Extrema of what all processes saw; of one process, its own."""
    if is_shared():
        distributed.all_reduce(lo, distributed.ReduceOp.MIN)
        distributed.all_reduce(hi, distributed.ReduceOp.MAX)
    return lo, hi
