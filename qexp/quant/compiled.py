"""The same fake-quantize compiled into one pass over memory, for training; results are equal to the bit.

The first call for a shape compiles for some seconds (a C++ compiler is needed on a CPU), which pays off when a network
trains for minutes. Stochastic rounding gains most: its hash costs a dozen passes otherwise.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch._inductor
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from qexp.quant.affine import CodeRange, QParams
from qexp.quant.rounding import HalfEven, Rounding, Stochastic, hashed_uniform

HALF_EVEN = HalfEven()


def fake_quantize(x: Tensor, qparams: QParams, grid: CodeRange, rounding: Rounding = HALF_EVEN) -> Tensor:
    """`qexp.quant.affine.fake_quantize`, compiled: the same values and the same gradient.

    Errors: ValueError for a rounding other than half_even and stochastic.
    """
    if not isinstance(rounding, (HalfEven, Stochastic)):
        raise ValueError(f"rounding={rounding}: compiled are half_even and stochastic")
    inputs = [qparams.scale, qparams.zero_point, torch.tensor([grid.quant_min, grid.quant_max], dtype=torch.float32)]
    if rounding.is_random:
        inputs.append(torch.tensor(rounding.stream, dtype=torch.int32))
    return _Compiled.apply(x, *inputs)


class _Compiled(torch.autograd.Function):
    """Forward and backward are one generated loop each; backward finds the codes anew, so only x is kept."""

    @staticmethod
    def forward(ctx, x: Tensor, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(x, *inputs)
        return _run(_values, x, *inputs)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _run(_gradient, grad, *ctx.saved_tensors), *[None] * (len(ctx.saved_tensors) - 1)


def _codes(x: Tensor, scale: Tensor, zero_point: Tensor, key: Tensor | None) -> Tensor:
    quotient = x / scale
    if key is None:
        return torch.round(quotient) + zero_point
    lower = quotient.floor()
    index = torch.arange(x.numel(), dtype=torch.int32).view(x.shape)
    return lower + (quotient - lower > hashed_uniform(index, key)) + zero_point


def _values(x: Tensor, scale: Tensor, zero_point: Tensor, bounds: Tensor, key: Tensor | None = None) -> Tensor:
    codes = _codes(x, scale, zero_point, key).maximum(bounds[0]).minimum(bounds[1])
    return (codes - zero_point) * scale


def _gradient(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, bounds: Tensor, key: Tensor | None = None
) -> Tensor:
    # A drawn code is inside for certain exactly where x / S itself is (see `affine.fake_quantize`).
    codes = _codes(x, scale, zero_point, None) if key is None else x / scale + zero_point
    return torch.where((codes >= bounds[0]) & (codes <= bounds[1]), grad, 0.0)


# (function, threads, shapes and strides) -> its loop; code is made for one shape and one number of threads.
_loops: dict[tuple, Callable] = {}


def _run(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Call the generated loop; past torch.compile's checks of every argument, which would take longer than the loop."""
    key = function, torch.get_num_threads(), *((x.shape, x.stride(), x.dtype, x.device) for x in inputs)
    if key not in _loops:
        detached = [x.detach() for x in inputs]
        _loops[key] = torch._inductor.compile(make_fx(lambda *args: function(*args))(*detached), detached)
    return _loops[key](*inputs)


def warm_up(x: Tensor, qparams: QParams, grid: CodeRange, rounding: Rounding = HALF_EVEN) -> float:
    """Compile for inputs like this one; returns the seconds that it took."""
    start = time.perf_counter()
    x = x.detach().clone().requires_grad_()
    fake_quantize(x, qparams, grid, rounding).backward(torch.ones_like(x))
    return time.perf_counter() - start
