"""One engine's share of a run: its graph, its certificate, its int8 coverage."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from qexp.engines.base import Engine, EngineRefused, Session, start
from qexp.engines.latency import Timings, interleave
from qexp.engines.parity import Certificate, certify
from qexp.engines.place import Artefact, place
from qexp.quant.convert import layers, quantizers
from qexp.quant.dataflow import Dataflow, NotExportable
from qexp.quant.layers import Add
from qexp.quant.quantizer import Mode
from qexp.quant.recipe import Scheme


@dataclass
class Deployment:
    """What one engine made of the quantized model; `simulation` has its quantizers where the engine has them."""

    engine: Engine
    simulation: nn.Module
    artefact: Artefact
    executed: dict[str, list[str]]  # layer -> the operators of its calls
    macs: dict[str, int]
    certificate: Certificate = field(default_factory=Certificate)

    def runs_int8(self, layer: str) -> bool:
        """Whether the engine's optimized graph runs this layer on integers."""
        kinds = self.executed.get(layer, [])
        return bool(kinds) and all(kind.endswith("int8") for kind in kinds)

    @property
    def mac_coverage(self) -> float:
        """Share of all multiply-accumulates that are executed in int8."""
        total = sum(self.macs.values())
        return sum(n for layer, n in self.macs.items() if self.runs_int8(layer)) / total if total else 0.0

    def islands(self, flow: Dataflow) -> list[str]:
        """Layers with products or residual sums that the engine runs in float."""
        normalized = flow.normalized_additions()
        sums = [name for name, module in flow.modules.items() if isinstance(module, Add) and name not in normalized]
        return [layer for layer in (*self.macs, *sums) if not self.runs_int8(layer)] + flow.functional_additions()


def simulation_for(engine: Engine, model: nn.Module, flow: Dataflow) -> nn.Module:
    """A copy of the calibrated model without the quantizers that the engine leaves out."""
    placed = copy.deepcopy(model)
    off = engine.float_sites(flow, activation_schemes(placed))
    for quantizer in quantizers(placed):
        if quantizer.site in off:
            quantizer.mode = Mode.OFF
    return placed


def activation_schemes(model: nn.Module) -> dict[str, Scheme]:
    """Site -> scheme of all activations that are quantized."""
    active = (q for q in quantizers(model) if not q.is_weight and q.mode is Mode.QUANTIZE)
    return {quantizer.site: quantizer.scheme for quantizer in active}


def deploy(engine: Engine, graph: onnx.ModelProto, simulation: nn.Module, flow: Dataflow, threads: int) -> Deployment:
    """Write the graph for the engine and see which layers it runs in int8. Errors: EngineRefused."""
    off = {quantizer.site for quantizer in quantizers(simulation) if quantizer.mode is Mode.OFF}
    schemes = {site: scheme for site, scheme in activation_schemes(simulation).items() if scheme.grid.symmetric}
    try:
        artefact = place(graph, off, engine.signed_sites(flow, schemes), engine.rewrite)
    except NotExportable as error:
        raise EngineRefused(engine, str(error)) from None
    session = start(engine, artefact.model, tuple(flow.example[:1].shape), threads, traced=True)
    executed = _by_layer(session.layers(), {name for name, _ in layers(simulation)})
    return Deployment(engine, simulation, artefact, executed, flow.macs())


def _by_layer(nodes: dict[str, str], names: set[str]) -> dict[str, list[str]]:
    """Layer -> the operators that bear its name, one a call, or else those of its other nodes ("pool/ReduceMean")."""
    own: dict[str, list[str]] = {}
    parts: dict[str, list[str]] = {}
    for node, kind in nodes.items():
        name = re.sub(r"#\d+$", "", node)
        if name in names:
            own.setdefault(name, []).append(kind)
        elif (layer := name.rpartition("/")[0]) in names:
            parts.setdefault(layer, []).append(kind)
    return parts | own


def certify_deployment(deployment: Deployment, batches: Iterable[tuple[Tensor, Tensor]], threads: int) -> np.ndarray:
    """Fill in the certificate over all batches; returns the engine's logits. Errors: EngineRefused."""
    deployment.certificate = certify(deployment.engine, deployment.artefact, deployment.simulation, batches, threads)
    return np.concatenate(deployment.certificate.outputs)


def measure(
    engines: list[Engine],
    graphs: dict[str, onnx.ModelProto],
    net: nn.Module,
    images: Tensor,
    seconds: float,
    threads: int,
) -> Timings:
    """Latency of every engine in fp32 (twice: the second is the A/A pair) and, where it has a graph, in int8.

    Errors: EngineRefused.
    """
    batch = np.ascontiguousarray(images.numpy())
    calls: dict[str, Callable[[], object]] = {}
    for engine in engines:
        fp32 = start(engine, graphs["fp32"], batch.shape, threads)
        calls[f"{engine.name}/fp32"] = _call(fp32, batch)
        calls[f"{engine.name}/fp32 again"] = _call(fp32, batch)
        if engine.name in graphs:
            calls[f"{engine.name}/int8"] = _call(start(engine, graphs[engine.name], batch.shape, threads), batch)
    calls["torch/fp32"] = lambda: net(images)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            return interleave(calls, seconds)
    finally:
        torch.set_num_threads(before)


def _call(session: Session, batch: np.ndarray) -> Callable[[], object]:
    return lambda: session.run(batch)
