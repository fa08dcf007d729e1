"""ONNX Runtime on the CPU."""

from __future__ import annotations

import re
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

from qexp.engines.base import EngineRefused, beside_weights, symmetric
from qexp.engines.graph import Graph
from qexp.quant.dataflow import Dataflow
from qexp.quant.recipe import Recipe, Scheme

# Operators whose kernels multiply or add integers; QDQ pairs that found no such kernel remain float operators.
INT8_OPERATORS = {
    "QLinearConv", "ConvInteger", "QGemm", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul", "QLinearAdd", "QLinearGlobalAveragePool", "QLinearAveragePool",
}  # fmt: skip


class OnnxRuntime:
    """ONNX Runtime wants every input and the output of a convolution quantized, residual additions included.

    It multiplies uint8 by int8: of a product of two activations the second is int8 with zero point 0.
    """

    name = "onnxruntime"

    def version(self) -> str:
        return ort.__version__

    def recipe(self, recipe: Recipe, flow: Dataflow) -> Recipe:
        form = recipe.activation.dynamic_form
        if form == "per_group":
            raise EngineRefused(self, "it computes ranges of each call for tensors and tokens, not for groups")
        if form is not None:
            return recipe
        second = tuple((f"{name}.b", symmetric(recipe.activation_of(f"{name}.b", True))) for name in flow.products())
        return replace(recipe, sites=second + recipe.sites)

    def float_sites(self, flow: Dataflow, schemes: dict[str, Scheme]) -> set[str]:
        return beside_weights(flow, schemes)

    def signed_sites(self, flow: Dataflow, schemes: dict[str, Scheme]) -> set[str]:
        return {f"{name}.b" for name in flow.products()} & schemes.keys()

    def rewrite(self, graph: Graph) -> None:
        pass

    def session(
        self, model: onnx.ModelProto, shape: tuple[int, ...], threads: int, traced: bool = False
    ) -> OnnxRuntimeSession:
        return OnnxRuntimeSession(model, shape, threads, traced)


class OnnxRuntimeSession:
    """One InferenceSession with all graph optimizations."""

    def __init__(self, model: onnx.ModelProto, shape: tuple[int, ...], threads: int, traced: bool) -> None:
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # Threads that spin after a run would take a core from whatever runs next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        for symbol in {d.dim_param for d in model.graph.input[0].type.tensor_type.shape.dim if d.dim_param}:
            # A known batch size folds the arithmetic on shapes away.
            options.add_free_dimension_override_by_name(symbol, shape[0])
        self._optimized: onnx.ModelProto | None = None
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "optimized.onnx"
            if traced:
                options.optimized_model_filepath = str(path)
            self._session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
            if traced:
                self._optimized = onnx.load(path)
        self._input = self._session.get_inputs()[0].name

    def run(self, batch: np.ndarray) -> list[np.ndarray]:
        return self._session.run(None, {self._input: batch})

    def layers(self) -> dict[str, str]:
        found = {}
        for node in self._optimized.graph.node:
            kind = f"{node.op_type} int8" if node.op_type in INT8_OPERATORS else node.op_type
            # A product that has taken in the sum with its bias is the layer itself.
            found[re.sub(r"(/MatMulAddFusion)?(_token_\d+)?$", "", node.name)] = kind
        return found
