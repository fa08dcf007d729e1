"""The same fake-quantize in one pass over memory, compiled for this CPU.

Values and gradients are equal to the bit, but for that of a learned scale: a sum, in another order.

The first use compiles for some seconds (a C++ compiler is needed), the next ones of this machine load what was made.
Stochastic rounding gains most: its hash costs a dozen passes otherwise.
"""

from __future__ import annotations

import ctypes
import time
from functools import cache, lru_cache
from importlib.resources import files
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils import deterministic

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
    return _FakeQuantize.apply(x, qparams, grid, rounding)


def serves(x: Tensor, rounding: Rounding) -> bool:
    """Whether there is a kernel for it."""
    return isinstance(rounding, (HalfEven, Stochastic)) and x.dtype == torch.float32 and x.device.type == "cpu"


class _Rows(NamedTuple):
    """How a tensor lies in memory: rows of `inner` elements, the scales taking turns from row to row."""

    numel: int
    inner: int
    words: int  # of 16 bits, that hold a bit for each element, one for each vector of a row
    expands: torch.Size | None  # the shape that gives scales a row each, where their blocks are no rows of memory


@lru_cache(maxsize=4096)
def _rows(shape: torch.Size, params: torch.Size) -> _Rows:
    """The rows of a tensor for scales of this shape, which broadcast."""
    numel, inner, expands = shape.numel(), PIECE, None
    if params.numel() != 1:
        aligned = (1,) * (len(shape) - len(params)) + tuple(params)
        own = [d for d, p in enumerate(aligned) if p > 1]
        first, last = own[0], own[-1]
        if aligned[first : last + 1] != tuple(shape[first : last + 1]):
            expands, last = shape, len(shape) - 1
        inner = shape[last + 1 :].numel()
    return _Rows(numel, inner, -(-numel // inner) * -(-inner // library().width()), expands)


class _KernelFills:
    """What is allocated inside is not filled first, as deterministic training does, which costs a pass over memory."""

    __slots__ = ("before",)

    def __enter__(self) -> None:
        self.before = deterministic.fill_uninitialized_memory
        deterministic.fill_uninitialized_memory = False

    def __exit__(self, *_) -> None:
        deterministic.fill_uninitialized_memory = self.before


def _quantized(
    x: Tensor, qparams: QParams, grid: CodeRange, rounding: Rounding
) -> tuple[Tensor, Tensor, _Rows, Tensor]:
    """Values, the bits that say which codes are in range, and the rows with their scales."""
    scale, zero_point = qparams.scale, qparams.zero_point
    rows = _rows(x.shape, scale.shape)
    if rows.expands is not None:
        scale, zero_point = scale.expand(rows.expands), zero_point.expand(rows.expands)
    scale, zero_point = scale.contiguous(), zero_point.contiguous()
    with _KernelFills():
        y, inside = torch.empty_like(x), torch.empty(rows.words, dtype=torch.int16)
    arguments = (
        x.data_ptr(), y.data_ptr(), inside.data_ptr(), scale.data_ptr(), zero_point.data_ptr(),
        grid.quant_min, grid.quant_max, rows.numel, rows.inner, scale.numel(), torch.get_num_threads(),
    )  # fmt: skip
    if rounding.is_random:
        library().drawn(*arguments, rounding.stream, rounding.first(rows.numel))
    else:
        library().nearest(*arguments)
    return y, inside, rows, scale


class _FakeQuantize(torch.autograd.Function):
    """Of x one bit an element is kept: whether its code is in range."""

    @staticmethod
    def forward(ctx, x: Tensor, qparams: QParams, grid: CodeRange, rounding: Rounding) -> Tensor:
        y, ctx.inside, ctx.rows, _ = _quantized(x.contiguous(), qparams, grid, rounding)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad, rows = grad.contiguous(), ctx.rows
        with _KernelFills():
            out = torch.empty_like(grad)
        pointers = grad.data_ptr(), out.data_ptr(), ctx.inside.data_ptr()
        library().where_inside(*pointers, rows.numel, rows.inner, torch.get_num_threads())
        return out, None, None, None


class _LearnedScale(torch.autograd.Function):
    """The same with the gradient of the scale, from two sums over each block."""

    @staticmethod
    def forward(ctx, x: Tensor, learned: Tensor, factor: float, qparams: QParams, grid: CodeRange, rounding: Rounding):
        x = x.contiguous()
        y, ctx.inside, ctx.rows, scale = _quantized(x, qparams, grid, rounding)
        ctx.save_for_backward(x, y, scale)
        ctx.factor, ctx.shapes = factor, (learned.shape, qparams.scale.shape)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        (x, y, scale), rows = ctx.saved_tensors, ctx.rows
        grad, (shape, params) = grad.contiguous(), ctx.shapes
        with _KernelFills():
            out, of_scale = torch.empty_like(grad), torch.empty(shape if rows.expands is None else rows.expands)
        tensors = x, y, grad, ctx.inside, scale, out, of_scale
        library().learned_scale(
            *map(Tensor.data_ptr, tensors), ctx.factor, rows.numel, rows.inner, scale.numel(), torch.get_num_threads()
        )
        if rows.expands is not None:
            of_scale = of_scale.sum_to_size(params).view(shape)
        return out, of_scale, None, None, None, None


def learned_scale(
    x: Tensor, learned: Tensor, factor: float, qparams: QParams, grid: CodeRange, rounding: Rounding
) -> Tensor:
    """`fake_quantize` whose scale is learned: dL/dS = factor / S (sum dL/dx~ x~ - sum dL/dx x) over each block.

    `learned` gets the gradient; it holds the numbers of `qparams.scale`, in that shape or another.
    """
    return _LearnedScale.apply(x, learned, factor, qparams, grid, rounding)


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
    lib.learned_scale.argtypes = [tensor] * 7 + [number] + [size] * 3 + [count]
    lib.nearest.restype = lib.drawn.restype = lib.where_inside.restype = lib.learned_scale.restype = None
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
