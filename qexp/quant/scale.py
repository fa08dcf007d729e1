"""Which numbers a scale may be. Importing this file needs no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# name -> (bits that one scale takes, who uses it)
SCALE_FORMATS = {
    "float32": (32, "the usual one"),
    "power_of_two": (8, "shifts in place of products: Jain et al. 2020 (TQT), section 3; S rounded up to 2^k"),
    "e8m0": (8, "OCP Microscaling Formats v1.0, section 6.3: 2^k rounded down, the maximum saturates"),
    "e4m3": (8, "NVFP4: an FP8 scale for each block, and one float32 for the tensor"),
}
SMALLEST_NORMAL = 2.0**-126


def nonzero(scale: Tensor) -> Tensor:
    """S = 1 for an empty block; otherwise S is kept a normal float32, so that x / S never divides by zero."""
    return scale.clamp(min=SMALLEST_NORMAL).where(scale > 0, scale.new_ones(()))


def as_format(name: str, magnitude: Tensor, top: float) -> Tensor:
    """Scales S of blocks whose largest magnitude should meet the level `top`.

    float32:       S = magnitude / top
    power_of_two:  S = 2^ceil(log2(magnitude / top)), so that nothing is clipped
    e8m0:          S = 2^(floor(log2 magnitude) - floor(log2 top))
    e4m3:          S = T e4m3(magnitude / top / T),  T = max(magnitude) / (448 top) for the whole tensor

    >>> import torch
    >>> as_format("power_of_two", torch.tensor([3.0, 4.0]), 4.0), as_format("e8m0", torch.tensor([3.0, 7.9]), 6.0)
    (tensor([1., 1.]), tensor([0.5000, 1.0000]))
    """
    scale = nonzero(magnitude / top)
    if name == "power_of_two":
        scale = _power_of_two(scale, up=True)
    elif name == "e8m0":
        scale = (_power_of_two(magnitude, up=False) / 2.0 ** _floor_log2(top)).clamp(min=SMALLEST_NORMAL)
    elif name == "e4m3":
        whole = nonzero(magnitude.max() / top / 448)
        # A block far below the largest one would get the scale 0: 2^-9 is the smallest e4m3 number above it.
        scale = (whole * _e4m3(scale / whole).clamp(min=2.0**-9)).clamp(min=SMALLEST_NORMAL)
    return scale.where(magnitude > 0, scale.new_ones(()))


def _floor_log2(value: float) -> int:
    import math

    return math.frexp(value)[1] - 1


def _power_of_two(x: Tensor, up: bool) -> Tensor:
    import torch

    mantissa, exponent = torch.frexp(x)  # x = mantissa 2^exponent, 1/2 <= mantissa < 1
    exponent = exponent - (mantissa == 0.5).int() if up else exponent - 1
    return torch.ldexp(torch.ones_like(x), exponent.clamp(-126, 127))


def _e4m3(x: Tensor) -> Tensor:
    """Nearest FP8 E4M3 number of values in [0, 448], ties to even."""
    import torch

    _, exponent = torch.frexp(x)
    step = torch.ldexp(torch.ones_like(x), (exponent - 4).clamp(min=-9))  # 3 stored bits below the leading one
    return ((x / step).round() * step).clamp(max=448)
