"""Latency of int8 networks against the best fp32 engine and against other tools on the same network.

All sides of one configuration are timed in random interleaving in one process; only their ratios count.
Weights are random: latency does not depend on what a network has learned.
"""

from __future__ import annotations

import argparse
import copy
import gc
import logging
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import record
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from qexp import models
from qexp.engines.base import Session
from qexp.engines.deploy import deploy, simulation_for
from qexp.engines.export import export_float, export_quantized
from qexp.engines.latency import Timings, interleave
from qexp.engines.onnxruntime import OnnxRuntime
from qexp.engines.openvino import OpenVino
from qexp.quant.convert import QUANTIZED, calibrating, fold_batchnorm_, quantize_
from qexp.quant.dataflow import Dataflow
from qexp.quant.granularity import PerChannel
from qexp.quant.grid import IntegerGrid
from qexp.quant.recipe import Recipe, Scheme

Call = Callable[[], object]
RECIPE = Recipe(Scheme(IntegerGrid(8, "restricted"), PerChannel(0)), Scheme(IntegerGrid(8, "affine")))
IMAGE = (3, 224, 224)
NETWORKS = ["resnet18", "mobilenet_v2"]
# The second session of an engine shows what a ratio is worth that should be 1.
AGAIN, AGAIN_OF = "OpenVINO fp32 again (A/A)", "OpenVINO fp32"
PEERS = ("nncf", "torchao")
console = Console(stderr=True, highlight=False)


@dataclass(frozen=True)
class Network:
    """One network and its graphs; `coverage` is the share of MACs that each engine runs in int8."""

    net: nn.Module
    images: Tensor
    fp32: onnx.ModelProto
    int8: dict[str, onnx.ModelProto]
    coverage: dict[str, float]


@dataclass(frozen=True)
class Case:
    """One configuration: a network, its input and how many threads may compute."""

    network: Network
    images: Tensor
    threads: int

    def session(self, engine: OnnxRuntime | OpenVino, graph: onnx.ModelProto) -> Call:
        """A call of the engine on this case's input."""
        return _runs(engine.session(graph, tuple(self.images.shape), self.threads), self.images.numpy())

    def ours(self, engine: OnnxRuntime | OpenVino) -> Call:
        """A call of what qexp deployed on the engine."""
        return self.session(engine, self.network.int8[engine.name])


def _runs(session: Session, batch: np.ndarray) -> Call:
    return lambda: session.run(batch)


def prepare(name: str) -> Network:
    """Build, settle BatchNorm, quantize and export one network."""
    torch.manual_seed(0)
    net, images = getattr(models, name)().train(), torch.rand(8, *IMAGE)
    with torch.no_grad():
        for _ in range(3):
            net(torch.rand(8, *IMAGE))
    flow = Dataflow(net.eval(), images[:2])
    model = copy.deepcopy(net)
    fold_batchnorm_(model, flow)
    layers = {layer for layer, module in model.named_modules() if type(module) in QUANTIZED}
    quantize_(model, RECIPE, tuple(flow.open_layers(layers)))
    with torch.no_grad(), calibrating(model):
        model(images)
    graph = export_quantized(model, flow)
    engines = (OnnxRuntime(), OpenVino())
    deployed = [deploy(engine, graph, simulation_for(engine, model, flow), flow, 1) for engine in engines]
    return Network(
        net, images, export_float(flow),
        {d.engine.name: d.artefact.model for d in deployed}, {d.engine.name: d.mac_coverage for d in deployed},
    )  # fmt: skip


def _eager(case: Case) -> Call:
    def call() -> Tensor:
        with torch.inference_mode():
            return case.network.net(case.images)

    return call


def _compiled(model: nn.Module, images: Tensor) -> Call:
    import torch._inductor.config as inductor

    torch.compiler.reset()
    # Freezing folds BatchNorm and packs weights, which every other engine here does too.
    with inductor.patch(freezing=True):
        compiled = torch.compile(model, dynamic=False)
        compiled(images)
    return lambda: compiled(images)


def _nncf(case: Case) -> Call:
    import nncf
    import openvino as ov

    nncf.set_log_level(logging.ERROR)
    core = ov.Core()
    samples = nncf.Dataset([image[None].numpy() for image in case.network.images])
    model = nncf.quantize(core.read_model(case.network.fp32.SerializeToString()), samples)
    model.reshape(list(case.images.shape))
    options = {
        "INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": case.threads,
        "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY",
    }  # fmt: skip
    request, batch = core.compile_model(model, "CPU", options).create_infer_request(), case.images.numpy()

    def call() -> list[np.ndarray]:
        # The shortest way through OpenVINO's Python, so that the peer pays no more than a session of qexp.
        request.set_input_tensor(ov.Tensor(batch, shared_memory=True))
        request.infer()
        return [tensor.data.copy() for tensor in request.output_tensors]

    return call


def _torchao(case: Case) -> Call:
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as x86
    from torchao.quantization.pt2e import move_exported_model_to_eval
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    exported = torch.export.export(case.network.net, (case.images,), strict=True).module()
    config = x86.get_default_x86_inductor_quantization_config()
    prepared = prepare_pt2e(exported, x86.X86InductorQuantizer().set_global(config))
    prepared(case.images)
    return _compiled(move_exported_model_to_eval(convert_pt2e(prepared)), case.images)


# Side -> (what it computes in, how its call is made). A new rival is one row here.
SIDES: dict[str, tuple[str, Callable[[Case], Call]]] = {
    "torch eager": ("fp32", _eager),
    "torch.compile": ("fp32", lambda case: _compiled(case.network.net, case.images)),
    "ONNX Runtime fp32": ("fp32", lambda case: case.session(OnnxRuntime(), case.network.fp32)),
    AGAIN_OF: ("fp32", lambda case: case.session(OpenVino(), case.network.fp32)),
    AGAIN: ("fp32", lambda case: case.session(OpenVino(), case.network.fp32)),
    "OpenVINO bf16": ("bf16", lambda case: case.session(OpenVino("bf16"), case.network.fp32)),
    "NNCF + OpenVINO": ("peer", _nncf),
    "torchao PT2E, compiled": ("peer", _torchao),
    "qexp + ONNX Runtime": ("ours", lambda case: case.ours(OnnxRuntime())),
    "qexp + OpenVINO": ("ours", lambda case: case.ours(OpenVino())),
}
REQUIRES = {"NNCF + OpenVINO": "nncf", "torchao PT2E, compiled": "torchao"}
ENGINE = {"qexp + ONNX Runtime": "onnxruntime", "qexp + OpenVINO": "openvino"}


def build(case: Case) -> tuple[dict[str, Call], dict[str, str]]:
    """Side -> its call, and side -> why it has none."""
    calls, missing = {}, {}
    for name, (_, make) in SIDES.items():
        package = REQUIRES.get(name)
        if package and not find_spec(package):
            missing[name] = "not installed"
            continue
        try:
            calls[name] = make(case)
            calls[name]()
        except Exception as error:  # a rival may fail in any way, which its row tells
            if SIDES[name][0] not in ("peer", "fp32"):
                raise
            calls.pop(name, None)
            missing[name] = f"failed: {type(error).__name__}: {str(error).strip().splitlines()[0][:60]}"
    return calls, missing


def figures(case: Case, seconds: float) -> list[dict]:
    """Measure one case; one row a side, ratios against the fp32 side with the fastest call."""
    before = torch.get_num_threads()
    torch.set_num_threads(case.threads)  # compiled code is made for the number of threads at compile time
    try:
        with torch.no_grad():
            calls, missing = build(case)
            timings = interleave(calls, seconds)
    finally:
        torch.set_num_threads(before)
    fastest = {name: timings.fastest_ms(name) for name in timings.names}
    best = min((name for name in fastest if SIDES[name][0] == "fp32"), key=fastest.__getitem__)
    return [_row(name, case, timings, fastest, best) | {"note": missing.get(name)} for name in SIDES]


def _row(name: str, case: Case, timings: Timings, fastest: dict[str, float], best: str) -> dict:
    row: dict = {"side": name, "kind": SIDES[name][0]}
    if name not in fastest:
        return row
    base = AGAIN_OF if name == AGAIN else best
    median, low, high = timings.ratio(base, name)
    return row | {
        "fastest_ms": fastest[name], "median_ms": timings.median_ms(name), "against": base,
        "ratio_fastest": fastest[base] / fastest[name], "ratio_median": median, "ratio_interval": [low, high],
        "mac_coverage": case.network.coverage.get(ENGINE.get(name)), "rounds": len(timings.rounds),
    }  # fmt: skip


def table(title: str, rows: list[dict]) -> Table:
    """One configuration; the best fp32 side is the one with ratio 1."""
    shown = Table(title=title, title_justify="left", title_style="bold")
    shown.add_column("")
    for column in ("fastest, ms", "median, ms", "fastest over fastest", "median ratio, 95 %", "MACs in int8"):
        shown.add_column(column, justify="right")
    best = max((row for row in rows if row["kind"] == "ours"), key=lambda row: row["ratio_fastest"])
    for row in rows:
        if row["note"]:
            shown.add_row(row["side"], f"[dim]{row['note']}[/dim]")
            continue
        low, high = row["ratio_interval"]
        coverage = row["mac_coverage"]
        shown.add_row(
            row["side"], f"{row['fastest_ms']:.3f}", f"{row['median_ms']:.3f}",
            f"{row['ratio_fastest']:.2f}x",
            f"{row['ratio_median']:.2f}x [{low:.2f}, {high:.2f}]",
            "" if coverage is None else f"{100 * coverage:.1f} %", style="bold" if row is best else "",
        )  # fmt: skip
    return shown


def summary(results: list[dict]) -> Table:
    """All configurations, fastest over fastest; Markdown, so that it can go into a page as it is."""
    shown = Table(box=box.MARKDOWN)
    shown.add_column("b: batch, t: threads")
    for case in results:
        shown.add_column(f"{case['model']} b{case['batch']} t{case['threads']}", justify="right")
    for position, name in enumerate(SIDES):
        rows = [case["rows"][position] for case in results]
        cells = [row["note"] or f"{row['ratio_fastest']:.2f}x" for row in rows]
        if name != AGAIN:
            shown.add_row(name, *cells)
    return shown


def measure(options: argparse.Namespace) -> list[dict]:
    """All configurations, one table each."""
    results: list[dict] = []
    total, start = len(options.models) * len(options.batch) * len(options.threads), time.perf_counter()
    for name in options.models:
        console.print(f"[dim]preparing {name}[/dim]")
        network = prepare(name)
        for batch in options.batch:
            for threads in options.threads:
                _progress(f"{name}, batch {batch}, {threads} threads", len(results), total, start)
                rows = figures(Case(network, torch.rand(batch, *IMAGE), threads), options.seconds)
                title = f"{name}, batch {batch}, {threads} thread{'s' * (threads > 1)}"
                Console(width=130).print(table(title, rows))
                results.append({"model": name, "batch": batch, "threads": threads, "rows": rows})
                gc.collect()  # sessions of the last case would keep their threads
    return results


def _progress(what: str, done: int, total: int, start: float) -> None:
    left = (time.perf_counter() - start) / done * (total - done) if done else None
    to_go = f", about {left / 60:.0f} min to go" if left else ""
    console.print(f"[dim]{done + 1} of {total}: {what}{to_go}[/dim]")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench/latency", description=__doc__)
    parser.add_argument("--models", nargs="+", default=NETWORKS, choices=NETWORKS)
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16], help="images in one call")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--seconds", type=float, default=20, help="a configuration; at least 20 rounds")
    parser.add_argument("--json", type=Path, help="write the figures here")
    return parser.parse_args()


def main() -> None:
    options = _arguments()
    warnings.filterwarnings("ignore")
    results = measure(options)
    Console(width=400).print(summary(results))
    if options.json:
        record.write(options.json, {"results": results}, PEERS)


if __name__ == "__main__":
    main()
