"""What one calibration pass costs: an observer against torch's on one batch, and a pass against plain forward passes.

The sketch that is timed serves every calibration; torch's HistogramObserver serves one. All sides are timed in random
interleaving in one process; a ratio is the fastest call over the fastest call.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import record
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.ao.quantization import HistogramObserver

from qexp import models
from qexp.engines.latency import interleave
from qexp.quant import compiled
from qexp.quant.convert import fold_batchnorm_, quantize_, quantizers, set_mode_
from qexp.quant.dataflow import Dataflow
from qexp.quant.observers import Observer
from qexp.quant.quantizer import Mode
from qexp.quant.recipe import Recipe

PLAIN, OURS, TORCH = "forward pass alone", "qexp, calibration pass", "torch HistogramObserver, calibration pass"
console = Console(stderr=True, highlight=False)


def observers(seconds: float) -> list[dict]:
    """One batch after another into one observer: a tensor of 16x64x28x28 after a ReLU, and one with both signs."""
    rows = []
    for name, batches in ("after ReLU", _batches(relu=True)), ("both signs", _batches(relu=False)):
        sketch, fast, histogram = Observer(), Observer(), HistogramObserver()
        calls = {
            "extrema alone (aminmax)": _feed(torch.aminmax, batches),
            "qexp sketch": _feed(_uncompiled(sketch.update), batches),
            "qexp sketch, compiled": _feed(fast.update, batches),
            "torch HistogramObserver": _feed(histogram, batches),
        }
        timings = interleave(calls, seconds)
        base = timings.fastest_ms("torch HistogramObserver")
        rows += [
            {"what": f"{side}, {name}", "fastest_ms": ms, "ratio": ms / base}
            for side, ms in ((side, timings.fastest_ms(side)) for side in calls)
        ]
    return rows


def _uncompiled(function: Callable) -> Callable:
    def call(*args: Tensor) -> object:
        with mock.patch.object(compiled, "is_loaded", lambda: False):
            return function(*args)

    return call


def _batches(relu: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(16, 64, 28, 28, generator=generator) for _ in range(4)]
    return [x.relu() if relu else x for x in drawn]


def _feed(update: Callable[[Tensor], object], batches: list[Tensor]) -> Callable[[], object]:
    position = 0

    def call() -> object:
        nonlocal position
        position += 1
        return update(batches[position % len(batches)])

    return call


def passes(batch: int, seconds: float) -> list[dict]:
    """ResNet-18 at 224: every input of every convolution, addition, pool and linear layer observed."""
    torch.manual_seed(0)
    net, images = models.resnet18().eval(), torch.randn(batch, 3, 224, 224)
    flow, plain = Dataflow(net, images[:2]), copy.deepcopy(net)
    fold_batchnorm_(plain, flow)
    ours, theirs = copy.deepcopy(plain), copy.deepcopy(plain)
    for model in ours, theirs:
        quantize_(model, Recipe())
        set_mode_(model, Mode.OFF)
        for quantizer in quantizers(model):
            if not quantizer.is_weight:
                quantizer.start_observing()
                if model is theirs:
                    quantizer.observer = _Histogram()
    ours_pass = _forward(ours, images)
    calls = {
        PLAIN: _forward(plain, images), TORCH: _forward(theirs, images),
        OURS: _uncompiled(ours_pass), f"{OURS}, compiled": ours_pass,
    }  # fmt: skip
    timings = interleave(calls, seconds, least=8)
    fastest = {name: timings.fastest_ms(name) for name in calls}
    return [{"what": name, "fastest_ms": ms, "ratio": ms / fastest[PLAIN]} for name, ms in fastest.items()]


class _Histogram(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.histogram = HistogramObserver()

    def update(self, x: Tensor) -> None:
        self.histogram(x)


def _forward(model: nn.Module, images: Tensor) -> Callable[[], object]:
    def call() -> Tensor:
        with torch.no_grad():
            return model(images)

    return call


def table(heading: str, results: list[dict]) -> Table:
    """One row a side, one column a number of threads; Markdown."""
    shown = Table(box=box.MARKDOWN)
    shown.add_column(heading)
    for result in results:
        shown.add_column(f"{result['threads']} thread{'s' * (result['threads'] > 1)}", justify="right")
    for position, row in enumerate(results[0]["rows"]):
        cells = [result["rows"][position] for result in results]
        shown.add_row(row["what"], *(f"{cell['ratio']:.2f}x" for cell in cells))
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench/calibration", description=__doc__)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--batch", type=int, default=8, help="images in a batch of the pass")
    parser.add_argument("--seconds", type=float, default=20, help="a case")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    compiled.warm_up()
    of_observers, of_passes = [], []
    for threads in options.threads:
        torch.set_num_threads(threads)
        console.print(f"[dim]{threads} threads[/dim]")
        of_observers.append({"threads": threads, "rows": observers(options.seconds / 2)})
        of_passes.append({"threads": threads, "rows": passes(options.batch, options.seconds)})
    screen = Console(width=200)
    screen.print(table("one batch, over torch's HistogramObserver", of_observers))
    screen.print(table("resnet18, over a plain forward pass", of_passes))
    if options.json:
        record.write(options.json, {"observers": of_observers, "passes": of_passes})


if __name__ == "__main__":
    main()
