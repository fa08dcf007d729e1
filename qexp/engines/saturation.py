"""Whether an engine's int8 products saturate in 16 bits, as on x86 CPUs without VNNI (instruction vpmaddubsw)."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

from qexp.engines.base import Engine, start
from qexp.quant.onnx_form import OPSET

CHANNELS, SIZE = 64, 4


def saturates(engine: Engine) -> bool:
    """Convolve the largest codes, 255 x 127 in every product, and compare with the exact sum.

    A pair of such products is 64,770 and does not fit 16 signed bits: a saturating kernel is off by half.
    """
    images = np.full((1, CHANNELS, SIZE, SIZE), 255, np.float32)
    (result,) = start(engine, _probe(), images.shape, 1).run(images)
    exact = 255.0 * 127 * CHANNELS
    # The output is quantized to 255 steps; saturated sums are 50 steps and more away.
    return bool(np.abs(result - exact).max() > 2 * exact / 255)


def _probe() -> onnx.ModelProto:
    """Quantize, 1x1 convolution with all weights 127, ReLU, quantize."""
    constants = {
        "one": np.float32(1), "u8": np.uint8(0), "s8": np.int8(0),
        "weights": np.full((CHANNELS, CHANNELS, 1, 1), 127, np.int8),
        "step": np.float32(255.0 * 127 * CHANNELS / 255),
    }  # fmt: skip
    nodes = [
        ("QuantizeLinear", ["images", "one", "u8"], "codes"),
        ("DequantizeLinear", ["codes", "one", "u8"], "x"),
        ("DequantizeLinear", ["weights", "one", "s8"], "w"),
        ("Conv", ["x", "w"], "sums"),
        ("Relu", ["sums"], "rectified"),
        ("QuantizeLinear", ["rectified", "step", "u8"], "out_codes"),
        ("DequantizeLinear", ["out_codes", "step", "u8"], "out"),
    ]
    shape = [1, CHANNELS, SIZE, SIZE]
    graph = helper.make_graph(
        [helper.make_node(kind, inputs, [output]) for kind, inputs, output in nodes],
        "saturation",
        [helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
