"""Forward and backward of a fake-quantize against `x * 1.0`, which moves the same bytes and does nothing.

All sides of one case are timed in random interleaving in one process; a figure is the fastest call over the fastest
call of the floor. "exact" says whether values and gradient are those of the definition to the bit.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import record
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from qexp.engines.latency import interleave
from qexp.quant import compiled
from qexp.quant.affine import QParams, fake_quantize
from qexp.quant.grid import IntegerGrid
from qexp.quant.rounding import Stochastic

Function = Callable[[Tensor], Tensor]
FLOOR, EXACT = "x * 1.0", "definition"
console = Console(stderr=True, highlight=False)


@dataclass(frozen=True)
class Case:
    """One tensor and how it is quantized."""

    name: str
    x: Tensor
    qparams: QParams
    grid: IntegerGrid

    @property
    def per_channel(self) -> bool:
        """Whether each index of dimension 0 has a scale."""
        return self.qparams.scale.numel() > 1


def cases() -> list[Case]:
    """An activation with one scale and a weight with one for each output channel."""
    generator = torch.Generator().manual_seed(0)
    activation = torch.randn(16, 64, 28, 28, generator=generator)
    affine = IntegerGrid(8, "affine")
    weight = torch.randn(512, 512, 3, 3, generator=generator) * 0.02
    restricted = IntegerGrid(8, "restricted")
    lo, hi = weight.amin((1, 2, 3), keepdim=True), weight.amax((1, 2, 3), keepdim=True)
    return [
        Case("activation 16x64x28x28, per tensor", activation, affine.qparams(*activation.aminmax()), affine),
        Case("weight 512x512x3x3, per channel", weight, restricted.qparams(lo, hi), restricted),
    ]  # fmt: skip


def definition(case: Case) -> Function:
    """The equations as they stand, each a pass of its own."""
    scale, zero_point = case.qparams.scale, case.qparams.zero_point

    def function(x: Tensor) -> Tensor:
        codes = torch.round(x.detach() / scale) + zero_point
        inside = (codes >= case.grid.quant_min) & (codes <= case.grid.quant_max)
        values = (codes.clamp(case.grid.quant_min, case.grid.quant_max) - zero_point) * scale
        return values + (x - x.detach()) * inside

    return function


def _torch(case: Case) -> Function:
    scale, zero_point = case.qparams.scale.flatten(), case.qparams.zero_point.flatten().int()
    bounds = case.grid.quant_min, case.grid.quant_max
    if case.per_channel:
        return lambda x: torch.fake_quantize_per_channel_affine(x, scale, zero_point, 0, *bounds)
    return lambda x: torch.fake_quantize_per_tensor_affine(x, float(scale), int(zero_point), *bounds)


def _torch_ao(case: Case) -> Function:
    from torch.ao.quantization import FusedMovingAvgObsFakeQuantize, MovingAveragePerChannelMinMaxObserver

    kind = {"observer": MovingAveragePerChannelMinMaxObserver, "ch_axis": 0} if case.per_channel else {}
    bounds = {"quant_min": -128, "quant_max": 127} if case.per_channel else {"quant_min": 0, "quant_max": 255}
    dtype = torch.qint8 if case.per_channel else torch.quint8
    return FusedMovingAvgObsFakeQuantize(**kind, **bounds, dtype=dtype)


def _brevitas(case: Case) -> Function:
    from brevitas.nn import QuantConv2d, QuantIdentity
    from brevitas.quant import Int8WeightPerChannelFloat, ShiftedUint8ActPerTensorFloat

    if not case.per_channel:
        layer = QuantIdentity(act_quant=ShiftedUint8ActPerTensorFloat)
        layer.train()
        for _ in range(3):
            layer(case.x)
        return lambda x: layer.eval()(x)
    conv = QuantConv2d(512, 512, 3, bias=False, weight_quant=Int8WeightPerChannelFloat)
    return lambda x: conv.weight_quant(x)[0]


def _modelopt(case: Case) -> Function:
    from modelopt.torch.quantization.config import QuantizerAttributeConfig
    from modelopt.torch.quantization.nn import TensorQuantizer

    quantizer = TensorQuantizer(QuantizerAttributeConfig(num_bits=8, axis=0 if case.per_channel else None))
    x = case.x.abs()
    quantizer.amax = x.amax((1, 2, 3), keepdim=True) if case.per_channel else x.amax()
    return quantizer


def _torchao(case: Case) -> Function:
    from torchao.quantization.granularity import PerAxis
    from torchao.quantization.qat import IntxFakeQuantizeConfig, IntxFakeQuantizer

    if not case.per_channel:
        raise NotOffered
    quantizer = IntxFakeQuantizer(IntxFakeQuantizeConfig(torch.int8, PerAxis(0), is_symmetric=True))
    return lambda x: quantizer(x.flatten(1)).view(x.shape)  # it takes matrices alone


class NotOffered(Exception):
    """A rival has no such quantizer."""


# Side -> (package it needs, how its function is made). A new rival is one row here.
SIDES: dict[str, tuple[str, Callable[[Case], Function]]] = {
    FLOOR: ("torch", lambda case: lambda x: x * 1.0),
    "qexp": ("torch", lambda case: lambda x: fake_quantize(x, case.qparams, case.grid)),
    "qexp, compiled": ("torch", lambda case: lambda x: compiled.fake_quantize(x, case.qparams, case.grid)),
    "qexp, stochastic": ("torch", lambda case: lambda x: fake_quantize(x, case.qparams, case.grid, Stochastic())),
    "qexp, stochastic, compiled": (
        "torch", lambda case: lambda x: compiled.fake_quantize(x, case.qparams, case.grid, Stochastic()),
    ),
    "torch.fake_quantize": ("torch", _torch),
    "torch.ao FusedMovingAvgObsFakeQuantize": ("torch", _torch_ao),
    "torchao IntxFakeQuantizer": ("torchao", _torchao),
    "brevitas": ("brevitas", _brevitas),
    "modelopt TensorQuantizer": ("modelopt", _modelopt),
}  # fmt: skip


def _both_ways(function: Function, x: Tensor, grad: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    def call() -> tuple[Tensor, Tensor]:
        y = function(x)
        return y, torch.autograd.grad(y, x, grad)[0]

    return call


def figures(case: Case, seconds: float) -> list[dict]:
    """Measure one case at the current number of threads; one row a side."""
    x = case.x.clone().requires_grad_()
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    calls, missing, seconds_to_compile = {}, {}, {}
    for name, (package, make) in SIDES.items():
        if not find_spec(package):
            missing[name] = "not installed"
            continue
        try:
            if name.endswith("compiled"):
                seconds_to_compile[name] = compiled.warm_up()
            calls[name] = _both_ways(make(case), x, grad)
            calls[name]()
        except NotOffered:
            missing[name] = "not offered"
        except Exception as error:  # a rival may fail in any way, which its row tells
            calls.pop(name, None)
            missing[name] = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:80]}"
    expected = _both_ways(definition(case), x, grad)()
    timings = interleave(calls, seconds)
    floor = timings.fastest_ms(FLOOR)
    rows = []
    for name in SIDES:
        row = {"side": name, "note": missing.get(name)}
        if name in calls:
            same = all(torch.equal(a, b) for a, b in zip(calls[name](), expected, strict=True))
            row |= {"fastest_ms": timings.fastest_ms(name), "ratio": timings.fastest_ms(name) / floor, "exact": same}
        rows.append(row | {"compile_s": seconds_to_compile.get(name)})
    return rows


def table(results: list[dict]) -> Table:
    """All cases, ratios to the floor; Markdown, so that it can go into a page as it is."""
    shown = Table(box=box.MARKDOWN)
    shown.add_column("forward + backward over x * 1.0")
    for case in results:
        shown.add_column(f"{case['case'].split(' ')[0]} t{case['threads']}", justify="right")
    shown.add_column("exact")
    for position, name in enumerate(SIDES):
        rows = [case["rows"][position] for case in results]
        cells = [row["note"] or f"{row['ratio']:.2f}x" for row in rows]
        exact = {row.get("exact") for row in rows}
        random = "stochastic" in name or name == FLOOR
        shown.add_row(name, *cells, "" if random or None in exact else ("yes" if exact == {True} else "no"))
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench/fake_quantize", description=__doc__)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--seconds", type=float, default=20, help="a case; at least 20 rounds")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    results = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        for case in cases():
            console.print(f"[dim]{case.name}, {threads} threads[/dim]")
            results.append({"case": case.name, "threads": threads, "rows": figures(case, options.seconds)})
    Console(width=200).print(table(results))
    for case in results:
        spent = {row["side"]: row["compile_s"] for row in case["rows"] if row["compile_s"] is not None}
        said = ", ".join(f"{side} {seconds:.1f} s" for side, seconds in spent.items())
        console.print(f"[dim]compiled once, {case['case']}, {case['threads']} threads: {said}[/dim]")
    if options.json:
        record.write(options.json, {"results": results})


if __name__ == "__main__":
    main()
