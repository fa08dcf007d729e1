"""torch's own operators, and ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper

from conformance_.compare import Answers, Tool, gradient
from conformance_.inputs import Case
from conformance_.reasons import denormal_reciprocal, reciprocal, wraps_in_int64


def fake_quantize_torch(case: Case) -> Answers:
    """torch's own operators, values and gradients."""
    grid, x = case.grid, case.tensor
    bounds = (grid.quant_min, grid.quant_max)
    scale, zero = torch.from_numpy(case.scale[:, 0]), torch.from_numpy(case.zero[:, 0]).int()

    def call(x: torch.Tensor) -> torch.Tensor:
        if case.granularity == "per tensor":
            return torch.fake_quantize_per_tensor_affine(x, scale[0], zero[0], *bounds)
        return torch.fake_quantize_per_channel_affine(x, scale, zero, 0, *bounds)

    return {"values": call(x).numpy(), "gradient": gradient(call, x).numpy()}


def torch_formula(case: Case) -> Answers:
    """clamp(rint(x (1/S)) + Z), per channel through int64."""
    code = np.rint(case.x * (np.float32(1) / case.scale))
    if case.granularity == "per channel":
        code = np.where(np.abs(code) < np.float32(2**63), code, np.float32(-(2.0**63)))
    code = code + case.zero
    lowest, highest = np.float32(case.grid.quant_min), np.float32(case.grid.quant_max)
    inside = (code >= lowest) & (code <= highest)
    values = (np.clip(code, lowest, highest) - case.zero) * case.scale
    return {"values": values, "gradient": inside.astype(np.float32)}


def quantize_onnxruntime(case: Case) -> Answers:
    """QuantizeLinear, Clip where the codes are narrower than their type, DequantizeLinear."""
    session = onnxruntime.InferenceSession(qdq(case).SerializeToString(), providers=["CPUExecutionProvider"])
    codes, values = session.run(None, {"x": case.x})
    return {"codes": codes.astype(np.float32), "values": values}


def qdq(case: Case, shift: int = 0) -> onnx.ModelProto:
    """The ONNX graph of a case, with codes and zero point moved up by `shift`: uint8 if none is negative, else int8."""
    low, high = case.grid.quant_min + shift, case.grid.quant_max + shift
    dtype = np.int8 if low < 0 else np.uint8
    scale, zero = case.scale[:, 0], (case.zero[:, 0] + shift).astype(dtype)
    if case.granularity == "per tensor":
        scale, zero = scale[0], zero[0]
    constants = {"scale": scale, "zero": zero, "low": dtype(low), "high": dtype(high)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["wide"], axis=0),
        helper.make_node("Clip", ["wide", "low", "high"], ["codes"]),
        helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["values"], axis=0),
    ]
    kind = TensorProto.INT8 if dtype is np.int8 else TensorProto.UINT8
    shape = list(case.x.shape)
    graph = helper.make_graph(
        nodes, "qdq", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("codes", kind, shape),
         helper.make_tensor_value_info("values", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def definition(case: Case) -> Answers:
    """ONNX: saturate(rint(x / S) + Z), (q - Z) S."""
    lowest, highest = np.float32(case.grid.quant_min), np.float32(case.grid.quant_max)
    codes = np.clip(np.rint(case.x / case.scale) + case.zero, lowest, highest)
    return {"codes": codes, "values": (codes - case.zero) * case.scale}


TORCH_REASONS = tuple(
    reason
    for aspect in ("codes", "gradient")
    for reason in (wraps_in_int64(aspect), reciprocal(aspect), denormal_reciprocal(aspect))
)


def tools() -> list[Tool]:
    """What the project's environment holds besides OpenVINO, for integers."""
    return [
        Tool("torch.fake_quantize", "torch", "`clamp(rint(x * (1/S)) + Z)`, per channel by way of int64",
             fake_quantize_torch, torch_formula, TORCH_REASONS, ("codes", "values", "gradient")),
        Tool("ONNX Runtime QuantizeLinear, DequantizeLinear", "onnxruntime",
             "`saturate(rint(x / S) + Z)` in uint8 or int8, and a Clip of the codes below 8 bits",
             quantize_onnxruntime, definition),
    ]  # fmt: skip
