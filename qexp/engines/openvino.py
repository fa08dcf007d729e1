"""OpenVINO on the CPU."""

from __future__ import annotations

import re

import numpy as np
import onnx
import openvino as ov

from qexp.quant.dataflow import Dataflow

PRODUCTS = ("Convolution", "FullyConnected", "MatMul")
PRECISIONS = ("f32", "bf16", "f16")


class OpenVino:
    """OpenVINO adds the residual inside the convolution before it, on its float accumulator.

    It ignores a quantizer on that branch, so the recipe leaves it out and the simulation follows. `precision` is the
    type of what is not int8: its default on many CPUs is bfloat16, which would be no honest float32.
    Errors: ValueError for a precision that OpenVINO does not know.
    """

    name = "openvino"

    def __init__(self, precision: str = "f32") -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"precision={precision!r}: allowed are {', '.join(PRECISIONS)}")
        self.precision = precision

    def version(self) -> str:
        return ov.get_version().split("-")[0]

    def float_sites(self, flow: Dataflow, sites: set[str]) -> set[str]:
        branches = {f"{add}.{sides[0]}" for add, sides in flow.convolution_branches().items() if sides}
        return branches & sites

    def session(
        self, model: onnx.ModelProto, shape: tuple[int, ...], threads: int, traced: bool = False
    ) -> OpenVinoSession:
        return OpenVinoSession(model, shape, threads, self.precision)


class OpenVinoSession:
    """One compiled model with one inference request."""

    def __init__(self, model: onnx.ModelProto, shape: tuple[int, ...], threads: int, precision: str) -> None:
        core = ov.Core()
        graph = core.read_model(model.SerializeToString())
        graph.reshape(list(shape))
        options = {
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
        }
        self._compiled = core.compile_model(graph, "CPU", options)
        # OpenVINO calls a node that returns an output of the graph by the name of that output.
        outputs = {output.name for output in model.graph.output}
        self._renamed = {name: node.name for node in model.graph.node for name in node.output if name in outputs}
        self._request = self._compiled.create_infer_request()

    def run(self, batch: np.ndarray) -> list[np.ndarray]:
        # Tensors set by hand: infer([batch]) would spend 0.1 ms in Python, 5 % of a MobileNet.
        self._request.set_input_tensor(ov.Tensor(batch, shared_memory=True))
        self._request.infer()
        return [tensor.data.copy() for tensor in self._request.output_tensors]

    def layers(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for node in self._compiled.get_runtime_model().get_ordered_ops():
            info = {key: str(node.rt_info[key].value) for key in node.rt_info}
            kind = f"{info['layerType']} int8" if _integer(node, info) else info["layerType"]
            for original in info.get("originalLayersNames", "").split(","):
                name = re.sub(r"/WithoutBiases.*$", "", original)
                name = self._renamed.get(name, name)
                if name not in found or info["layerType"] in PRODUCTS:
                    found[name] = kind
        return found


def _integer(node: ov.Node, info: dict[str, str]) -> bool:
    """Whether a node of the optimized graph computes on integers."""
    kernel = info.get("primitiveType", "").endswith("_I8")
    if info["layerType"] in PRODUCTS:
        # The precision of these is their weights', which a float kernel may decompress.
        return kernel
    # A small multi-layer perceptron becomes one generated kernel, which takes the int8 weights as they are.
    sources = [entry.get_source_output().get_node() for entry in node.inputs()]
    perceptron = info["layerType"] == "Subgraph" and any(_is_int8_constant(source) for source in sources)
    return kernel or perceptron or info.get("runtimePrecision") in ("u8", "i8")


def _is_int8_constant(node: ov.Node) -> bool:
    return str(node.rt_info["layerType"].value) == "Const" and node.get_output_element_type(0) == ov.Type.i8
