"""The same fake-quantize in one pass over memory, compiled for this CPU; values and gradients are equal to the bit.

The first use compiles for some seconds (a C++ compiler is needed), the next ones of this machine load what was made.
Stochastic rounding gains most: its hash costs a dozen passes otherwise.
"""

from __future__ import annotations

import ctypes
import time
from functools import cache
from importlib.resources import files
from typing import NamedTuple

import torch
from torch import Tensor

from qexp.quant.affine import CodeRange, QParams
from qexp.quant.rounding import HalfEven, Rounding, Stochastic

HALF_EVEN = HalfEven()
PIECE = 4096  # elements of a row where one scale serves all


def fake_quantize(x: Tensor, qparams: QParams, grid: CodeRange, rounding: Rounding = HALF_EVEN) -> Tensor:
    """`qexp.quant.affine.fake_quantize`, compiled: the same values and the same gradient.

    Errors: ValueError for a rounding other than half_even and stochastic, and for a tensor that is not float32 on a
    CPU; RuntimeError without a C++ compiler.
    """
    if not serves(x, rounding):
        what = f"rounding={rounding}, {x.dtype} on {x.device}"
        raise ValueError(f"{what}: compiled are half_even and stochastic of float32 on a CPU")
    return _FakeQuantize.apply(x, _Rows.of(x.shape, qparams), grid, rounding)


def serves(x: Tensor, rounding: Rounding) -> bool:
    """Whether there is a kernel for it."""
    return isinstance(rounding, (HalfEven, Stochastic)) and x.dtype == torch.float32 and x.device.type == "cpu"


class _Rows(NamedTuple):
    """A tensor as rows of memory, and which scale belongs to which row."""

    numel: int
    inner: int
    scale: Tensor
    zero_point: Tensor

    @classmethod
    def of(cls, shape: torch.Size, qparams: QParams) -> _Rows:
        scale, zero_point = qparams.scale, qparams.zero_point
        if scale.numel() == 1:
            return cls(shape.numel(), PIECE, scale, zero_point)
        params = (1,) * (len(shape) - scale.dim()) + tuple(scale.shape)
        own = [d for d, p in enumerate(params) if p > 1]
        first, last = own[0], own[-1]
        if params[first : last + 1] != tuple(shape[first : last + 1]):  # blocks that are not rows of memory
            scale, last = scale.expand(shape), len(shape) - 1
        scale, zero_point = scale.contiguous(), zero_point.expand(scale.shape).contiguous()
        return cls(shape.numel(), shape[last + 1 :].numel(), scale, zero_point)

    @property
    def words(self) -> int:
        """Words of 16 bits that hold a bit for each element, one for each vector of a row."""
        return -(-self.numel // self.inner) * -(-self.inner // library().width())


def _quantized(x: Tensor, rows: _Rows, grid: CodeRange, rounding: Rounding) -> tuple[Tensor, Tensor]:
    """Values, and the bits that say which codes are in range."""
    y, inside = torch.empty_like(x), torch.empty(rows.words, dtype=torch.int16)
    arguments = (
        x.data_ptr(), y.data_ptr(), inside.data_ptr(), rows.scale.data_ptr(), rows.zero_point.data_ptr(),
        grid.quant_min, grid.quant_max, rows.numel, rows.inner, rows.scale.numel(), torch.get_num_threads(),
    )  # fmt: skip
    if rounding.is_random:
        library().drawn(*arguments, rounding.stream, rounding.first(rows.numel))
    else:
        library().nearest(*arguments)
    return y, inside


class _FakeQuantize(torch.autograd.Function):
    """Of x one bit an element is kept: whether its code is in range."""

    @staticmethod
    def forward(ctx, x: Tensor, rows: _Rows, grid: CodeRange, rounding: Rounding) -> Tensor:
        y, ctx.inside = _quantized(x.contiguous(), rows, grid, rounding)
        ctx.size = rows.numel, rows.inner
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad = grad.contiguous()
        out = torch.empty_like(grad)
        arguments = grad.data_ptr(), out.data_ptr(), ctx.inside.data_ptr(), *ctx.size, torch.get_num_threads()
        library().where_inside(*arguments)
        return out, None, None, None


class _LearnedScale(torch.autograd.Function):
    """The same with the gradient of the scale, from two sums over each block."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, factor: float, rows: _Rows, grid: CodeRange, rounding: Rounding):
        x = x.contiguous()
        y, ctx.inside = _quantized(x, rows, grid, rounding)
        ctx.save_for_backward(x, y, scale)
        ctx.rows, ctx.factor = rows, factor
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        (x, y, scale), rows = ctx.saved_tensors, ctx.rows
        grad = grad.contiguous()
        out = torch.empty_like(grad)
        sums = torch.empty(-(-rows.numel // rows.inner), dtype=torch.float64)
        tensors = (tensor.data_ptr() for tensor in (x, y, grad, out, ctx.inside, sums))
        library().where_inside_and_sums(*tensors, rows.numel, rows.inner, torch.get_num_threads())
        total = sums.view(-1, rows.scale.numel()).sum(0).view(rows.scale.shape).sum_to_size(scale.shape)
        return out, total.float() * (ctx.factor / scale), None, None, None, None


def learned_scale(
    x: Tensor, scale: Tensor, factor: float, qparams: QParams, grid: CodeRange, rounding: Rounding
) -> Tensor:
    """`fake_quantize` whose scale learns: S dL/dS = factor (sum dL/dx~ x~ - sum dL/dx x) over each block."""
    return _LearnedScale.apply(x, scale, factor, _Rows.of(x.shape, qparams), grid, rounding)


@cache
def library() -> ctypes.CDLL:
    """The compiled kernels, made on first use. Errors: RuntimeError where that fails."""
    from torch._inductor.codecache import CppCodeCache
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    source = files("qexp.quant").joinpath("kernels.cpp").read_text()
    try:
        lib = CppCodeCache.load(source, extra_flags=["-ftree-loop-vectorize"])
    except (CppCompileError, InvalidCxxCompiler, OSError) as error:
        raise RuntimeError(f"compiled fake-quantize needs a C++ compiler: {str(error).splitlines()[0]}") from error
    tensor, number, size, count = ctypes.c_void_p, ctypes.c_float, ctypes.c_int64, ctypes.c_int
    lib.nearest.argtypes = [tensor] * 5 + [number] * 2 + [size] * 3 + [count]
    lib.drawn.argtypes = [*lib.nearest.argtypes, ctypes.c_int32, ctypes.c_int32]
    lib.where_inside.argtypes = [tensor] * 3 + [size] * 2 + [count]
    lib.where_inside_and_sums.argtypes = [tensor] * 6 + [size] * 2 + [count]
    lib.where_inside_and_sums.restype = None
    lib.nearest.restype = lib.drawn.restype = lib.where_inside.restype = None
    lib.count_cells.argtypes = [tensor] * 3 + [size] * 2 + [count] * 2 + [size, count]
    lib.count_cells.restype = None
    lib.width.restype = size
    return lib


def is_loaded() -> bool:
    """Whether this process has compiled or loaded the kernels."""
    return library.cache_info().currsize > 0


def count_cells(rows: Tensor, fraction: int, lowest: int, side: int) -> tuple[Tensor, Tensor]:
    """How many values each cell of a sketch gets, (G, 2 side), and the zeros among those of the smallest cell, (G,)."""
    threads = torch.get_num_threads()
    counts = torch.zeros(2 * threads, len(rows), 2 * side, dtype=torch.int32)
    zeros = torch.zeros(len(rows), dtype=torch.int64)
    where = rows.data_ptr(), counts.data_ptr(), zeros.data_ptr()
    library().count_cells(*where, rows.numel(), len(rows), fraction, lowest, side, threads)
    return counts.sum(0), zeros


def warm_up() -> float:
    """Compile now; returns the seconds that it took."""
    start = time.perf_counter()
    library()
    return time.perf_counter() - start
