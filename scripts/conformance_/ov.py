"""OpenVINO: its FakeQuantize, and what it makes of the ONNX graph that qexp exports for an activation."""

from __future__ import annotations

import numpy as np
import openvino
import openvino.opset13 as op

from conformance_.compare import Answers, Points, Reason, Tool
from conformance_.inputs import Array, Case
from conformance_.own import qdq
from conformance_.reasons import code_count, last_place, odd_tie, ulp

FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32"}
STORED = 255  # steps between the ends of uint8


def range_ends(case: Case) -> tuple[Array, Array]:
    """What FakeQuantize takes in place of S and Z: the values of the lowest and highest code."""
    grid = case.grid
    return (np.float32(grid.quant_min) - case.zero) * case.scale, (np.float32(grid.quant_max) - case.zero) * case.scale


def fake_quantize(case: Case) -> Answers:
    """FakeQuantize with codes as its output range, and with values; the latter without the rewriting for int8."""
    grid = case.grid
    shape = np.ones_like(case.scale)
    codes = (shape * np.float32(grid.quant_min), shape * np.float32(grid.quant_max))
    plain = {"LP_TRANSFORMS_MODE": "NO"}
    return {"codes": _fake_quantize(case, codes, {}), "values": _fake_quantize(case, range_ends(case), plain)}


def _fake_quantize(case: Case, out: tuple[Array, Array], options: dict[str, str]) -> Array:
    x = op.parameter(list(case.x.shape), np.float32)
    ends = [op.constant(end) for end in (*range_ends(case), *out)]
    levels = case.grid.quant_max - case.grid.quant_min + 1
    model = openvino.Model([op.fake_quantize(x, *ends, levels)], [x])
    return openvino.Core().compile_model(model, "CPU", FLOAT32 | options)([case.x])[0]


def steps(case: Case, low: Array, high: Array, n: int) -> Array:
    """rint(clamp(x) s - low s) with s = n / (high - low), all in float32."""
    s = np.float32(n) / (high - low)
    offset = -low * s
    if case.granularity == "per channel":  # a tensor of constants is stored without denormals
        s = np.where(s < np.float32(2.0**-126), np.float32(0), s)
    return np.rint(np.minimum(np.maximum(case.x, low), high) * s + offset)


def fake_quantize_formula(case: Case) -> Answers:
    """Codes: steps + quant_min; values: fma(steps, (high - low) / n, low)."""
    low, high = range_ends(case)
    n = case.grid.quant_max - case.grid.quant_min
    found = steps(case, low, high, n)
    back = (high - low) / np.float32(n)
    # Exact in float64: a step has 8 bits.
    values = (found.astype(np.float64) * back + low).astype(np.float32)
    return {"codes": found + np.float32(case.grid.quant_min), "values": values}


def _shift(case: Case) -> int:
    return 128 if case.grid.quant_min < 0 else 0


def exported(case: Case) -> Answers:
    """QuantizeLinear to uint8, Clip, DequantizeLinear, as qexp exports an activation."""
    model = openvino.Core().read_model(qdq(case, _shift(case)).SerializeToString())
    codes, values = openvino.Core().compile_model(model, "CPU", FLOAT32)([case.x]).values()
    return {"codes": codes.astype(np.float32) - np.float32(_shift(case)), "values": values}


def exported_formula(case: Case) -> Answers:
    """The steps of FakeQuantize over all of uint8, then Clip and (q - Z) S."""
    shift = np.float32(_shift(case))
    low, high = ((np.float32(end) - case.zero - shift) * case.scale for end in (0, STORED))
    found = steps(case, low, high, STORED)
    codes = np.where(np.isnan(found), np.float32(0), found) - shift
    codes = np.clip(codes, np.float32(case.grid.quant_min), np.float32(case.grid.quant_max))
    return {"codes": codes, "values": (codes - case.zero) * case.scale}


def _overflows(p: Points, n: int | None = None) -> Array:
    return p.scale.astype(np.float32) * np.float32(n or code_count(p)) == np.inf


def _rounded_sum(n: str, bound: float | None = None) -> Reason:
    return Reason(
        "codes", f"quotient within 10 ulp of {n} from a tie: S and Z are recovered from two rounded range ends, and"
        " x/S + Z is rounded to float32 before it is rounded to an integer",
        lambda p: p.tie_distance <= 10 * ulp(np.full_like(p.x, bound or code_count(p))),
    )  # fmt: skip


REASONS = (
    Reason(
        "codes", "S (2^b - 1) above the largest float32: high - low is infinite and every input gets the lowest code",
        _overflows,
    ),
    Reason(
        "codes", "S above 2^126, per channel: s is denormal and is taken as 0, every code becomes Z",
        lambda p: (1 / p.scale < 2.0**-126) & (p.case.granularity == "per channel"),
    ),
    odd_tie("Z - quant_min", lambda p: p.zero - p.case.grid.quant_min),
    _rounded_sum("2^b - 1"),
    Reason("values", "S (2^b - 1) above the largest float32: infinite and not-a-number values", _overflows),
    last_place(
        "`k (high - low) / n + low` counts from the lower range end, so that even 0 need not come back as 0",
        lambda p: 4 * ulp(p.scale * code_count(p)),
    ),
)  # fmt: skip
EXPORTED_REASONS = (
    Reason("codes", "255 S above the largest float32: high - low is infinite and every input gets the lowest code",
           lambda p: _overflows(p, STORED)),
    odd_tie("stored Z", lambda p: p.zero),
    _rounded_sum("255", STORED),
)  # fmt: skip


def tools() -> list[Tool]:
    """Both ways into the engine."""
    return [
        Tool("OpenVINO FakeQuantize", "openvino",
             "`k = rint(clamp(x, low, high) * s - low * s)` with s = (2^b - 1) / (high - low); its range ends are those"
             " of S and Z, in float32; values with the engine's own rewriting of int8 graphs off",
             fake_quantize, fake_quantize_formula, REASONS),
        Tool("OpenVINO on an exported activation", "openvino",
             "the same with the ends of uint8, 2^b - 1 being 255, and clips the codes after that: the graph is"
             " QuantizeLinear, Clip, DequantizeLinear, signed codes moved up by 128", exported, exported_formula,
             EXPORTED_REASONS),
    ]  # fmt: skip
