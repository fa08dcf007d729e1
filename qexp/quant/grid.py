"""Which values exist: the number formats. Importing this file needs no torch, so a wrong format is refused at once.

Here is what every format has in common, and the uniform ones; `levels.py` has those given by a list of levels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from qexp.quant.rounding import HalfEven, Rounding
from qexp.quant.scale import SCALE_FORMATS, as_format

if TYPE_CHECKING:
    from torch import Tensor

    from qexp.quant.affine import QParams
    from qexp.quant.stats import Statistics

HALF_EVEN = HalfEven()


@dataclass(frozen=True)
class Grid:
    """Base of all formats: codes between `quant_min` and `quant_max` that stand for values, up to a scale S.

    A new format implements `qparams`, `encode`, `decode`, `fake_quantize` and `levels`, and the properties below.
    """

    fits_data: ClassVar[bool] = False  # whether levels come from the data (`fit`), besides the scale

    @property
    def symmetric(self) -> bool:
        """Whether the zero point is fixed at 0."""
        return True

    @property
    def signed(self) -> bool:
        """Whether there are values below zero at zero point 0."""
        return self.quant_min < 0

    @property
    def step(self) -> float | None:
        """S times this, times integers, are all values: 1 for integers, 0.5 for FP4; None where there is no such."""
        return None

    @property
    def stores_as_int8(self) -> bool:
        """Whether those integers fit into 8 bits, so that an int8 engine can hold them."""
        return False

    def stored(self, codes: Tensor) -> Tensor:
        """Those integers."""
        return codes

    def clipped(self, x: Tensor, qparams: QParams) -> Tensor:
        """Number of values further than half a step outside the representable range."""
        raise TypeError(f"{type(self).__name__} must define clipped")

    @property
    def overhead_bits(self) -> int:
        """Bits that one block costs beside its codes: scale and zero point."""
        return SCALE_FORMATS[self.scale][0]

    def __str__(self) -> str:
        return f"{self.format} {self.convention}"

    def fit(self, stats: Statistics, qparams: QParams) -> QParams:
        """The same scale with levels made for the data, where a format has such."""
        return qparams


class Convention(NamedTuple):
    """A meaning of "b-bit": how codes and scale follow from the bits; `divisor` is None for affine."""

    divisor: object
    lowest: object
    highest: object
    who: str


# The four incompatible meanings of "symmetric b-bit" in use, affine, and unsigned. S = max|x| / divisor(b).
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
    "unsigned": Convention(lambda b: 2**b - 1, lambda b: 0, lambda b: 2**b - 1, "activations after ReLU"),
}


@dataclass(frozen=True)
class IntegerGrid(Grid):
    """Uniformly spaced values S (q - Z) with b-bit integers q, in a named convention.

    affine:        S = (hi - lo) / (2^b - 1),    q in [0, 2^b - 1]
    full_range:    S = 2 max|x| / (2^b - 1),     q in [-2^(b-1), 2^(b-1) - 1]
    restricted:    S = max|x| / (2^(b-1) - 1),   q in [-(2^(b-1) - 1), 2^(b-1) - 1]
    wide_codes:    S = max|x| / (2^(b-1) - 1),   q in [-2^(b-1), 2^(b-1) - 1]
    pow2_divisor:  S = max|x| / 2^(b-1),         q in [-2^(b-1), 2^(b-1) - 1]
    unsigned:      S = max(x) / (2^b - 1),       q in [0, 2^b - 1], Z = 0: what is negative becomes 0

    `scale` says which numbers S may be (`qexp.quant.scale`): a power of two, say, rounded up from the above.
    Errors: ValueError for bits outside 1 to 16, one symmetric bit, an unknown convention or format of the scale.

    >>> grid = IntegerGrid(bits=4, convention="restricted")
    >>> grid.quant_min, grid.quant_max, str(grid)
    (-7, 7, 'int4 restricted')
    """

    bits: int = 8
    convention: str = "restricted"
    scale: str = "float32"

    def __post_init__(self) -> None:
        if not isinstance(self.convention, str) or self.convention not in CONVENTIONS:
            raise ValueError(f"convention={self.convention!r}: allowed are {', '.join(CONVENTIONS)}")
        least = 1 if self.convention in ("affine", "unsigned") else 2
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not least <= self.bits <= 16:
            why = ""
            if self.bits == 1 and self.bits is not True:
                why = ", because one symmetric bit has no level besides zero (restricted divides by 2^0 - 1 = 0)"
            raise ValueError(f"bits={self.bits!r}: allowed are the integers {least} to 16{why}")
        allowed = tuple(SCALE_FORMATS) if self.symmetric else ("float32", "power_of_two")
        if self.scale not in allowed:
            raise ValueError(f"scale={self.scale!r}: allowed are {', '.join(allowed)} for {self.convention} codes")

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
        return f"{'int' if self.signed else 'uint'}{self.bits}"

    @property
    def step(self) -> float:
        return 1.0

    @property
    def stores_as_int8(self) -> bool:
        return self.bits <= 8

    @property
    def overhead_bits(self) -> int:
        return super().overhead_bits + (0 if self.symmetric else self.bits)

    def __str__(self) -> str:
        return f"{self.format} {self.convention}{'' if self.scale == 'float32' else f' {self.scale}'}"

    def qparams(self, lo: Tensor, hi: Tensor) -> QParams:
        """Scale and zero point of the clipping range [lo, hi], which is first widened to contain 0.

        An empty range (lo = hi = 0) gets S = 1: its only value, 0, is exact. Errors: ValueError when a range is
        not finite or lo > hi.

        >>> import torch
        >>> IntegerGrid(8, "affine").qparams(torch.tensor(-1.0), torch.tensor(4.1)).zero_point
        tensor(50.)
        """
        from qexp.quant.affine import QParams

        lo, hi = checked_range(lo, hi)
        if self.symmetric:
            magnitude = lo.neg().maximum(hi) if self.signed else hi
            scale = as_format(self.scale, magnitude, CONVENTIONS[self.convention].divisor(self.bits))
            return QParams(scale, scale.new_zeros(scale.shape))
        if not bool((hi - lo).isfinite().all()):
            raise ValueError("a clipping range from lo to hi is wider than the largest float32")
        scale = as_format(self.scale, hi - lo, 2**self.bits - 1)
        zero_point = self.quant_min - (lo / scale).round()
        return QParams(scale, zero_point.clamp(self.quant_min, self.quant_max))

    def encode(self, x: Tensor, qparams: QParams, rounding: Rounding = HALF_EVEN) -> Tensor:
        """Codes of x (float32 integers)."""
        from qexp.quant.affine import quantize

        return quantize(x, qparams, self, rounding)

    def decode(self, codes: Tensor, qparams: QParams) -> Tensor:
        """Values of codes."""
        from qexp.quant.affine import dequantize

        return dequantize(codes, qparams)

    def fake_quantize(self, x: Tensor, qparams: QParams, rounding: Rounding = HALF_EVEN) -> Tensor:
        """decode(encode(x)) with the straight-through gradient."""
        from qexp.quant import affine, compiled

        fast = compiled.is_loaded() and compiled.serves(x, rounding)
        return (compiled if fast else affine).fake_quantize(x, qparams, self, rounding)

    def clipped(self, x: Tensor, qparams: QParams) -> Tensor:
        import torch

        codes = (x / qparams.scale).add_(qparams.zero_point)
        lowest, highest = codes.aminmax() if codes.numel() else (codes.sum(), codes.sum())
        if lowest >= self.quant_min - 0.5 and highest <= self.quant_max + 0.5:
            return codes.new_zeros((), dtype=torch.int64)
        return ((codes < self.quant_min - 0.5) | (codes > self.quant_max + 0.5)).sum()

    def levels(self, qparams: QParams) -> Tensor:
        """All representable values in increasing order; shape: that of the scale, plus one last dimension."""
        import torch

        codes = torch.arange(self.quant_min, self.quant_max + 1.0, device=qparams.scale.device)
        return (codes - qparams.zero_point[..., None]) * qparams.scale[..., None]


def checked_range(lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
    """The clipping range [lo, hi] as float32, widened to contain 0. Errors: ValueError unless finite and lo <= hi."""
    if not bool((lo <= hi).all()) or not bool((lo.isfinite() & hi.isfinite()).all()):
        raise ValueError("a clipping range needs finite lo <= hi")
    return lo.float().clamp(max=0.0), hi.float().clamp(min=0.0)
