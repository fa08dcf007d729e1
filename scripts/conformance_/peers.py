"""Other research tools, where they are installed, each in the conventions that it implements."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

from conformance_.compare import Answers, Points, Reason, Tool
from conformance_.floats import round_to
from conformance_.inputs import Array, Case
from conformance_.reasons import denormal_reciprocal, exact_tie, last_place, odd_tie, reciprocal, ulp
from qexp.quant.grid import Grid, IntegerGrid
from qexp.quant.minifloat import Minifloat

MODELOPT_ZERO = 2.0**-24
E4M3, E5M2 = Minifloat(4, 3, "fn"), Minifloat(5, 2, "ieee")
TORCHAO_FLOATS = {
    Minifloat(3, 2, "none"): "f6_e3m2", Minifloat(2, 3, "none"): "f6_e2m3", Minifloat(2, 1, "none"): "f4",
}  # fmt: skip


def _only(conventions: tuple[str, ...], why: str):
    return lambda grid: None if isinstance(grid, IntegerGrid) and grid.convention in conventions else why


def quantize_torchao(case: Case) -> Answers:
    """quantize_affine and dequantize_affine, with scale and zero point of its own."""
    import torchao.quantization.quant_primitives as ao

    grid, block = case.grid, (1, case.x.shape[1])
    dtype = torch.int8 if grid.quant_min < 0 else torch.uint8
    kind = ao.MappingType.SYMMETRIC if grid.quant_min < 0 else ao.MappingType.ASYMMETRIC
    # Without a sign the range starts at 0, which makes an asymmetric Z 0.
    ends = [torch.from_numpy(end[:, 0]) for end in (case.lo if grid.convention != "unsigned" else 0 * case.lo, case.hi)]
    scale, zero = ao.choose_qparams_affine_with_min_max(*ends, kind, block, dtype, grid.quant_min, grid.quant_max)
    codes = ao.quantize_affine(case.tensor, block, scale, zero, dtype, grid.quant_min, grid.quant_max)
    values = ao.dequantize_affine(codes, block, scale, zero, dtype, grid.quant_min, grid.quant_max)
    return {"codes": codes.float().numpy(), "values": values.numpy(), "scale": scale.numpy()[:, None]}


def torchao_formula(case: Case) -> Answers:
    """clamp(rint(x (1/S)) + Z), (q - Z) S."""
    lowest, highest = np.float32(case.grid.quant_min), np.float32(case.grid.quant_max)
    codes = np.clip(np.rint(case.x * (np.float32(1) / case.scale)) + case.zero, lowest, highest)
    return {"codes": codes, "values": (codes - case.zero) * case.scale, "scale": case.scale}


@lru_cache
def _brevitas(signed: bool, narrow: bool) -> tuple:
    from brevitas.core.function_wrapper import Identity
    from brevitas.core.quant import IntQuant
    from brevitas.core.scaling import IntScaling

    return IntQuant(narrow, signed, input_view_impl=Identity()), IntScaling(narrow, signed)


def quantize_brevitas(case: Case) -> Answers:
    """IntQuant with the divisor of IntScaling, and S at least 2^-126 as in qexp; affine S and Z are qexp's."""
    grid, bits = case.grid, torch.tensor(float(case.grid.bits))
    quantizer, scaling = _brevitas(grid.quant_min < 0, grid.convention == "restricted")
    scale, zero, found = torch.from_numpy(case.scale), torch.from_numpy(case.zero), {}
    if grid.symmetric:
        scale = (torch.from_numpy(case.amax) / scaling(bits)).clamp(min=2.0**-126)
        found["scale"] = scale.numpy()
    found["codes"] = quantizer.to_int(scale, zero, bits, case.tensor).numpy()
    return found | {"values": quantizer(scale, zero, bits, case.tensor).numpy()}


def brevitas_formula(case: Case) -> Answers:
    """clamp(rint(x / S + Z)), (q - Z) S."""
    lowest, highest = np.float32(case.grid.quant_min), np.float32(case.grid.quant_max)
    codes = np.clip(np.rint(case.x / case.scale + case.zero), lowest, highest)
    return {"codes": codes, "values": (codes - case.zero) * case.scale, "scale": case.scale}


def _modelopt_input(case: Case) -> Array:
    # Negative values raise an error in unsigned quantization; qexp makes them 0.
    return np.maximum(case.x, np.float32(0)) if case.grid.quant_min == 0 else case.x


def quantize_modelopt(case: Case) -> Answers:
    """fake_tensor_quant of max|x|."""
    from modelopt.torch.quantization.tensor_quant import fake_tensor_quant

    grid = case.grid
    options = (grid.bits, grid.quant_min == 0, grid.convention == "restricted")
    x, amax = torch.from_numpy(_modelopt_input(case)), torch.from_numpy(case.amax)
    return {"values": fake_tensor_quant(x, amax, None, *options).numpy()}


def modelopt_formula(case: Case) -> Answers:
    """clamp(rint(x t)) / t with t = quant_max / max|x|; all is 0 where max|x| is at most 2^-24."""
    lowest, highest = np.float32(case.grid.quant_min), np.float32(case.grid.quant_max)
    t = highest / case.amax
    empty = case.amax <= MODELOPT_ZERO
    codes = np.clip(np.rint(_modelopt_input(case) * np.where(empty, np.float32(0), t)), lowest, highest)
    return {"values": codes / np.where(empty, np.float32(1), t)}


def _tiny_amax(p: Points) -> Array:
    return p.case.amax[p.where[0], 0] <= MODELOPT_ZERO


def _modelopt_tiny(aspect: str, becomes: str) -> Reason:
    return Reason(aspect, f"max|x| at most 2^-24, taken for an empty tensor: {becomes}", _tiny_amax)


def quantize_modelopt_float(case: Case) -> Answers:
    """scaled_e4m3 of max|x|."""
    from modelopt.torch.quantization.tensor_quant import scaled_e4m3

    return {"values": scaled_e4m3(case.tensor, torch.from_numpy(case.amax), None, 4, 3).numpy()}


def modelopt_float_formula(case: Case) -> Answers:
    """E4M3(clamp(x t)) (1/t) with t = (1 / max|x|) 448, which is how torch divides a number by a tensor."""
    top = np.float32(448)
    t = np.float32(1) / np.where(case.amax <= MODELOPT_ZERO, np.float32(1), case.amax) * top
    return {"values": round_to(E4M3, np.clip(case.x * t, -top, top)) * (np.float32(1) / t)}


def near_boundary(ulps: int):
    """Within so many ulps of a quotient at which the nearest level changes."""

    def holds(p: Points) -> Array:
        levels = np.array(p.case.grid.unit)
        middles = (levels[1:] + levels[:-1]) / 2
        above = np.clip(np.searchsorted(middles, p.quotient), 1, len(middles) - 1)
        distance = np.minimum(np.abs(p.quotient - middles[above - 1]), np.abs(p.quotient - middles[above]))
        return distance <= ulps * ulp(p.quotient)

    return holds


def quantize_torchao_float(case: Case) -> Answers:
    """The conversions of its FP8 and MX formats, of x / S."""
    import torchao.prototype.mx_formats.kernels as kernels
    import torchao.quantization.quant_primitives as ao

    scale = torch.from_numpy(case.scale)
    if case.grid in (E4M3, E5M2):
        dtype = torch.float8_e4m3fn if case.grid == E4M3 else torch.float8_e5m2
        codes = ao._quantize_affine_float8(case.tensor, scale, dtype)
        return {"values": ao._dequantize_affine_float8(codes, scale).numpy()}
    name = TORCHAO_FLOATS[case.grid]
    codes = getattr(kernels, f"f32_to_{name}_unpacked")(case.tensor / scale)
    return {"values": (getattr(kernels, f"{name}_unpacked_to_f32")(codes) * scale).numpy()}


def torchao_float_formula(case: Case) -> Answers:
    """S cast(clamp(x / S))."""
    quotient = np.clip(case.x / case.scale, np.float32(case.grid.unit[0]), np.float32(case.grid.unit[-1]))
    return {"values": round_to(case.grid, quotient) * case.scale}


BREVITAS_REASONS = (
    odd_tie("Z", lambda p: p.zero),
    Reason(
        "codes", "x/S + Z, rounded to float32, is a tie or on its other side, where x/S is not",
        lambda p: ~exact_tie(p) & (p.tie_distance <= ulp(np.abs(p.quotient) + np.abs(p.zero))),
    ),
)  # fmt: skip
LAST_PLACE = last_place("`q / t` with a rounded t, in place of `q * S`", lambda p: 4 * ulp(p.mine))
MODELOPT_REASONS = (
    _modelopt_tiny("codes", "every value becomes 0"),
    reciprocal("codes", "x * (quant_max / max|x|)", 3),
    denormal_reciprocal("codes"),
    LAST_PLACE,
    Reason("values", "max|x| / quant_max above 2^126: t is denormal and has lost bits",
           lambda p: 1 / p.scale < 2.0**-126),
)  # fmt: skip
MODELOPT_FLOAT_REASONS = (
    _modelopt_tiny("values", "the scale becomes 1/448"),
    Reason("values", "quotient within 4 ulp of a tie: `x * (1 / max|x| * 448)` rounds three times", near_boundary(4)),
    last_place("a product with the rounded 1/t, in place of S", lambda p: 4 * ulp(p.mine)),
)  # fmt: skip


def _torchao_refuses(grid: Grid) -> str | None:
    if isinstance(grid, IntegerGrid):
        why = "its scales are max / ((quant_max - quant_min) / 2) or the larger one of two ratios"
        return _only(("affine", "full_range", "restricted", "unsigned"), why)(grid)
    return None if grid in (E4M3, E5M2, *TORCHAO_FLOATS) else "no such format"


def tools() -> list[Tool]:
    """Rows of the optional environment."""
    aspects = ("scale", "codes", "values")
    by_code = "its divisor is the magnitude of its own lowest code, or of its largest if unsigned"
    return [
        Tool("torchao quantize_affine", "torchao", "`clamp(rint(x * (1/S)) + Z)`", quantize_torchao, torchao_formula,
             (reciprocal("codes"), denormal_reciprocal("codes")), aspects, _torchao_refuses),
        Tool("brevitas IntQuant", "brevitas", "`clamp(rint(x / S + Z))`; an affine S is taken from qexp",
             quantize_brevitas, brevitas_formula, BREVITAS_REASONS, aspects,
             _only(("affine", "restricted", "pow2_divisor", "unsigned"), by_code)),
        Tool("modelopt fake_tensor_quant", "modelopt",
             "`clamp(rint(x * t)) / t` with t = quant_max / max|x|; unsigned with negative inputs set to 0, which it"
             " refuses", quantize_modelopt, modelopt_formula, MODELOPT_REASONS, ("codes", "values"),
             _only(("restricted", "wide_codes", "unsigned"), "it has no zero point, and t is quant_max / max|x|")),
        Tool("torchao floats", "torchao", "`S * cast(clamp(x / S))`, nearest, ties to even", quantize_torchao_float,
             torchao_float_formula, (), ("values",), _torchao_refuses),
        Tool("modelopt scaled_e4m3", "modelopt", "`E4M3(clamp(x * t)) * (1/t)` with t = 1 / max|x| * 448",
             quantize_modelopt_float, modelopt_float_formula, MODELOPT_FLOAT_REASONS, ("values",),
             lambda grid: None if grid == E4M3 else "its other floats need a GPU"),
    ]  # fmt: skip
