"""What is quantized and how, as frozen values; importing this file needs no torch."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass, field

from qexp.quant.calibration import Calibration, MinMax
from qexp.quant.granularity import Granularity, PerChannel, PerTensor
from qexp.quant.grid import IntegerGrid


@dataclass(frozen=True)
class Scheme:
    """The whole choice for one kind of tensor: which values exist, who shares a scale, how the range is found.

    >>> print(Scheme(IntegerGrid(4, "full_range")))
    int4 full_range, per_tensor, minmax
    """

    grid: IntegerGrid = field(default_factory=IntegerGrid)
    granularity: Granularity = field(default_factory=PerTensor)
    calibration: Calibration = field(default_factory=MinMax)

    def __str__(self) -> str:
        return f"{self.grid}, {self.granularity}, {self.calibration}"


@dataclass(frozen=True)
class Recipe:
    """Which layers get which quantizers; layers whose name fits `exclude` (`stem`, `*.conv1`) stay in float.

    Errors: ValueError for a granularity that no layer here can compute with.
    """

    weight: Scheme = field(default_factory=Scheme)
    activation: Scheme = field(default_factory=lambda: Scheme(IntegerGrid(8, "affine")))
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.activation.granularity != PerTensor():
            raise ValueError(
                f"granularity.activation={self.activation.granularity}: activations are quantized per_tensor only"
            )
        if self.weight.granularity not in (PerTensor(), PerChannel(0)):
            raise ValueError(
                f"granularity.weight={self.weight.granularity}: weights are quantized per_tensor or per_channel(axis=0)"
            )

    def excludes(self, name: str) -> bool:
        """Whether this layer, or a module that holds it, stays in float by the user's wish."""
        parts = name.split(".")
        holders = [".".join(parts[: i + 1]) for i in range(len(parts))]
        return any(fnmatch.fnmatchcase(holder, pattern) for holder in holders for pattern in self.exclude)
