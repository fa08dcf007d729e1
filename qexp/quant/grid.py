"""Which values exist: the number formats. Importing this file needs no torch, so a wrong format is refused at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from qexp.quant.affine import QParams


class Convention(NamedTuple):
    """A meaning of "b-bit": how codes and scale follow from the bits; `divisor` is None for affine."""

    divisor: object
    lowest: object
    highest: object
    who: str


# The four incompatible meanings of "symmetric b-bit" in use, and affine. S = max|x| / divisor(b).
CONVENTIONS = {
    "affine": Convention(None, lambda b: 0, lambda b: 2**b - 1, "Gholami et al. 2021, eq. 2-3; ONNX"),
    "full_range": Convention(
        lambda b: (2**b - 1) / 2, lambda b: -(2 ** (b - 1)), lambda b: 2 ** (b - 1) - 1, "torch.ao, compressed-tensors"
    ),
    "restricted": Convention(
        lambda b: 2 ** (b - 1) - 1,
        lambda b: -(2 ** (b - 1) - 1),
        lambda b: 2 ** (b - 1) - 1,
        "Wu et al. 2020; TensorRT",
    ),
    "wide_codes": Convention(
        lambda b: 2 ** (b - 1) - 1, lambda b: -(2 ** (b - 1)), lambda b: 2 ** (b - 1) - 1, "modelopt, quanto"
    ),
    "pow2_divisor": Convention(
        lambda b: 2 ** (b - 1), lambda b: -(2 ** (b - 1)), lambda b: 2 ** (b - 1) - 1, "brevitas, MCT"
    ),
}


@dataclass(frozen=True)
class IntegerGrid:
    """Uniformly spaced values S (q - Z) with b-bit integers q, in a named convention.

    affine:        S = (hi - lo) / (2^b - 1),    q in [0, 2^b - 1]
    full_range:    S = 2 max|x| / (2^b - 1),     q in [-2^(b-1), 2^(b-1) - 1]
    restricted:    S = max|x| / (2^(b-1) - 1),   q in [-(2^(b-1) - 1), 2^(b-1) - 1]
    wide_codes:    S = max|x| / (2^(b-1) - 1),   q in [-2^(b-1), 2^(b-1) - 1]
    pow2_divisor:  S = max|x| / 2^(b-1),         q in [-2^(b-1), 2^(b-1) - 1]

    Errors: ValueError for bits outside 2 to 8 or an unknown convention.

    >>> grid = IntegerGrid(bits=4, convention="restricted")
    >>> grid.quant_min, grid.quant_max, str(grid)
    (-7, 7, 'int4 restricted')
    """

    bits: int = 8
    convention: str = "restricted"

    def __post_init__(self) -> None:
        if self.convention not in CONVENTIONS:
            raise ValueError(f"convention={self.convention!r}: allowed are {', '.join(CONVENTIONS)}")
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 2 <= self.bits <= 8:
            why = ""
            if self.bits == 1 and self.symmetric:
                why = ", because one symmetric bit has no level besides zero (restricted divides by 2^0 - 1 = 0)"
            raise ValueError(f"bits={self.bits!r}: allowed are the integers 2 to 8{why}")

    @property
    def symmetric(self) -> bool:
        """Whether the zero point is fixed at 0."""
        return self.convention != "affine"

    @property
    def quant_min(self) -> int:
        """Smallest code."""
        return CONVENTIONS[self.convention].lowest(self.bits)

    @property
    def quant_max(self) -> int:
        """Largest code."""
        return CONVENTIONS[self.convention].highest(self.bits)

    @property
    def format(self) -> str:
        """Short name of the codes: int4, uint8."""
        return f"{'int' if self.symmetric else 'uint'}{self.bits}"

    def __str__(self) -> str:
        return f"{self.format} {self.convention}"

    def qparams(self, lo: Tensor, hi: Tensor) -> QParams:
        """Scale and zero point of the clipping range [lo, hi], which is first widened to contain 0.

        An empty range (lo = hi = 0) gets S = 1: its only value, 0, is exact. Errors: ValueError when a range is
        not finite or lo > hi.

        >>> import torch
        >>> IntegerGrid(8, "affine").qparams(torch.tensor(-1.0), torch.tensor(4.1)).zero_point
        tensor(50.)
        """
        from qexp.quant.affine import QParams

        if not bool((lo <= hi).all()) or not bool((hi - lo).isfinite().all()):
            raise ValueError("a clipping range needs finite lo <= hi")
        lo, hi = lo.float().clamp(max=0.0), hi.float().clamp(min=0.0)
        if self.symmetric:
            scale = lo.neg().maximum(hi) / CONVENTIONS[self.convention].divisor(self.bits)
        else:
            scale = (hi - lo) / (2**self.bits - 1)
        scale = _nonzero(scale)
        zero_point = scale.new_zeros(scale.shape) if self.symmetric else self.quant_min - (lo / scale).round()
        return QParams(scale, zero_point.clamp(self.quant_min, self.quant_max))

    def encode(self, x: Tensor, qparams: QParams) -> Tensor:
        """Codes of x (float32 integers)."""
        from qexp.quant.affine import quantize

        return quantize(x, qparams, self)

    def decode(self, codes: Tensor, qparams: QParams) -> Tensor:
        """Values of codes."""
        from qexp.quant.affine import dequantize

        return dequantize(codes, qparams)

    def levels(self, qparams: QParams) -> Tensor:
        """All representable values in increasing order; shape: that of the scale, plus one last dimension."""
        import torch

        codes = torch.arange(self.quant_min, self.quant_max + 1, dtype=torch.float32)
        return (codes - qparams.zero_point[..., None]) * qparams.scale[..., None]


def _nonzero(scale: Tensor) -> Tensor:
    """S = 1 for an empty block; otherwise S is kept a normal float32, so that x / S never divides by zero."""
    return scale.clamp(min=2.0**-126).where(scale > 0, scale.new_ones(()))
