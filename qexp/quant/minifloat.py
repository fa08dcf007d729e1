"""Floating-point formats of 4 to 8 bits, alone and with a shared block exponent. Importing this file needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from qexp.quant.levels import LevelGrid
from qexp.quant.scale import SCALE_FORMATS

# What the codes with the largest exponent mean.
SPECIALS = {
    "ieee": "infinity and NaN: E5M2",
    "fn": "NaN in the last one alone: E4M3 (Micikevicius et al. 2022, table 1)",
    "none": "ordinary numbers: FP4 and FP6 (OCP Microscaling Formats v1.0, section 5.3)",
}


@dataclass(frozen=True)
class Minifloat(LevelGrid):
    """A sign, `exponent_bits` and `mantissa_bits`: +-2^(e - bias) (1 + m / 2^M), subnormals below; bias 2^(E-1) - 1.

    Values beyond the largest number become the largest number. S is a float32, or what `scale` says: MXFP4 is E2M1
    in groups of 32 with scale e8m0, NVFP4 is E2M1 in groups of 16 with scale e4m3.

    >>> Minifloat(2, 1, "none").unit[7:]
    (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    """

    exponent_bits: int = 4
    mantissa_bits: int = 3
    specials: str = "fn"
    scale: str = "float32"

    def __post_init__(self) -> None:
        for name, value, least, most in ("exponent_bits", self.exponent_bits, 1, 5), (
            "mantissa_bits", self.mantissa_bits, 0, 6
        ):  # fmt: skip
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise ValueError(f"{name}={value!r}: allowed are the integers {least} to {most}")
        if self.specials not in SPECIALS:
            raise ValueError(f"specials={self.specials!r}: allowed are {', '.join(SPECIALS)}")
        if self.scale not in SCALE_FORMATS:
            raise ValueError(f"scale={self.scale!r}: allowed are {', '.join(SCALE_FORMATS)}")
        if self.bits > 8:
            most = 7 - self.exponent_bits
            raise ValueError(f"mantissa_bits={self.mantissa_bits}: E{self.exponent_bits} leaves {most} of 8 bits")
        if len(self.unit) < 3:
            raise ValueError(f"specials={self.specials!r}: leaves {self.format} no number besides zero")

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def format(self) -> str:
        return f"fp{self.bits}_e{self.exponent_bits}m{self.mantissa_bits}"

    @property
    def convention(self) -> str:
        return self.specials

    @property
    def unit(self) -> tuple[float, ...]:
        count = 2 ** (self.exponent_bits + self.mantissa_bits)
        reserved = {"ieee": 2**self.mantissa_bits, "fn": 1, "none": 0}[self.specials]
        magnitudes = [self._magnitude(code) for code in range(1, count - reserved)]
        return (*(-x for x in reversed(magnitudes)), 0.0, *magnitudes)

    def _magnitude(self, code: int) -> float:
        exponent, mantissa = divmod(code, 2**self.mantissa_bits)
        bias = 2 ** (self.exponent_bits - 1) - 1
        if exponent == 0:
            return mantissa * 2.0 ** (1 - bias - self.mantissa_bits)
        return (2**self.mantissa_bits + mantissa) * 2.0 ** (exponent - bias - self.mantissa_bits)
