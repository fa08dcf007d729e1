"""OpenVINO on the CPU."""

from __future__ import annotations

import numpy as np
import onnx
import openvino as ov

from qexp.quant.dataflow import Dataflow


class OpenVino:
    """OpenVINO adds the residual inside the convolution before it, on its float accumulator.

    It ignores a quantizer on that branch, so the recipe leaves it out and the simulation follows. `precision` is the
    type of what is not int8: its default on many CPUs is bfloat16, which would be no honest float32.
    """

    name = "openvino"

    def __init__(self, precision: str = "f32") -> None:
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
        self._request = self._compiled.create_infer_request()

    def run(self, batch: np.ndarray) -> list[np.ndarray]:
        outputs = self._request.infer([batch], share_inputs=True, share_outputs=False)
        return list(outputs.values())

    def layers(self) -> dict[str, str]:
        found = {}
        for node in self._compiled.get_runtime_model().get_ordered_ops():
            info = {key: str(node.rt_info[key].value) for key in node.rt_info}
            integer = info.get("runtimePrecision") in ("u8", "i8") or info.get("primitiveType", "").endswith("_I8")
            for original in info.get("originalLayersNames", "").split(","):
                found.setdefault(original.removesuffix("/WithoutBiases").split("/WithoutBiases/")[0], f"{info['layerType']}{' int8' * integer}")
        return found
