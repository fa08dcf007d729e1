"""What is quantized and how, as frozen values; importing this file needs no torch."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass, field, replace

from qexp.quant.calibration import Calibration, MinMax, MovingAverage
from qexp.quant.granularity import Granularity, PerChannel, PerColumn, PerGroup, PerTensor, PerToken
from qexp.quant.grid import Grid, IntegerGrid
from qexp.quant.rounding import HalfEven, Rounding

COMPUTED = (
    "of 8 bits and by minmax, ONNX Runtime computes affine per_tensor and restricted per_token, OpenVINO restricted "
    "per_group, which it takes for per_tensor too"
)


@dataclass(frozen=True)
class Scheme:
    """The whole choice for one kind of tensor: which values exist, who shares a scale, how range and code are found.

    `dynamic` activations have the range of each call (Gholami et al. 2021, section III.D), and so has what is blocked
    within one sample.

    >>> print(Scheme(IntegerGrid(4, "full_range")))
    int4 full_range, per_tensor, minmax
    """

    grid: Grid = field(default_factory=IntegerGrid)
    granularity: Granularity = field(default_factory=PerTensor)
    calibration: Calibration = field(default_factory=MinMax)
    rounding: Rounding = field(default_factory=HalfEven)
    dynamic: bool = False

    @property
    def of_call(self) -> bool:
        """Whether the range of an activation is computed in each call, and none is stored."""
        return self.dynamic or self.granularity.follows_batch

    @property
    def dynamic_form(self) -> str | None:
        """How an engine computes the range of each call; None where none does.

        per_tensor, affine: ONNX's DynamicQuantizeLinear; per_token, symmetric: written out in operators; per_group,
        symmetric: OpenVINO's own.

        >>> Scheme(IntegerGrid(8, "affine"), dynamic=True).dynamic_form
        'per_tensor'
        """
        if self.calibration != MinMax() or self.rounding != HalfEven() or not self.of_call:
            return None
        if self.grid == IntegerGrid(8, "affine") and self.granularity == PerTensor():
            return "per_tensor"
        if self.grid != IntegerGrid(8, "restricted"):
            return None
        if self.granularity == PerToken():
            return "per_token"
        return "per_group" if isinstance(self.granularity, PerGroup) else None

    def not_in_int8(self, is_weight: bool) -> str | None:
        """Why no int8 engine can run this; None where one can."""
        if is_weight:
            fits = self.grid.stores_as_int8
            shared = self.granularity in (PerTensor(), PerChannel(0), PerColumn())
        else:
            fits = isinstance(self.grid, IntegerGrid) and self.grid.stores_as_int8
            shared = self.granularity == PerTensor()
            if self.rounding != HalfEven():
                return f"rounded by {self.rounding}, while engines round half to even"
            if fits and self.of_call:
                return None if self.dynamic_form else f"{self}, which no engine computes in each call; {COMPUTED}"
        if not fits:
            return f"{self.grid}, whose values are no 8-bit integers times a scale"
        return None if shared else f"{self.granularity}, whose scales do not stand outside of a sum of products"

    def __str__(self) -> str:
        rounding = "" if self.rounding == HalfEven() else f", {self.rounding}"
        return f"{self.grid}, {self.granularity}, {self.calibration}{rounding}{', dynamic' if self.dynamic else ''}"


@dataclass(frozen=True)
class Recipe:
    """Which layers get which quantizers; layers whose name fits `exclude` (`stem`, `*.conv1`) stay in float.

    `layers` gives weights of some layers a scheme of their own, by name or pattern, and `sites` activations
    (`stem.input`, `*.scores.b`); of two that fit, the last counts.
    `logits` is a calibration for the output of the last layer, which stays in float without it. Errors: ValueError
    for a calibration that cannot serve a format.
    """

    weight: Scheme = field(default_factory=Scheme)
    activation: Scheme = field(default_factory=lambda: Scheme(IntegerGrid(8, "affine")))
    exclude: tuple[str, ...] = ()
    logits: Calibration | None = None
    layers: tuple[tuple[str, Scheme], ...] = ()
    sites: tuple[tuple[str, Scheme], ...] = ()

    def __post_init__(self) -> None:
        for tensor, scheme in ("weight", self.weight), ("activation", self.activation):
            if scheme.calibration.needs_rows:
                raise ValueError(f"calibration.{tensor}={scheme.calibration}: is for calibration.logits alone")
        if self.activation.dynamic and isinstance(self.activation.calibration, MovingAverage):
            raise ValueError(
                f"calibration.activation={self.activation.calibration}: averages over batches, but ranges of "
                f"{self.activation.granularity} are of each call; choose minmax"
            )
        # The statistics of a weight, and of what is calibrated in each call, are its own values.
        if not self.activation.of_call:
            for tensor, calibration in ("activation", self.activation.calibration), ("logits", self.logits):
                self._require_resolution(tensor, calibration)
        if self.logits is not None and self.activation.granularity != PerTensor():
            raise ValueError(f"calibration.logits={self.logits}: the logits are quantized per_tensor only")
        if self.logits is not None and self.activation.dynamic:
            raise ValueError(f"calibration.logits={self.logits}: nothing is calibrated where ranges are of each call")

    def _require_resolution(self, tensor: str, calibration: Calibration | None) -> None:
        try:
            if calibration is not None:
                calibration.require_resolution(self.activation.grid)
        except ValueError as error:
            raise ValueError(f"calibration.{tensor}={error}") from None

    @property
    def logits_scheme(self) -> Scheme | None:
        """The scheme of the last layer's output."""
        return None if self.logits is None else replace(self.activation, calibration=self.logits)

    @property
    def simulation_only(self) -> str | None:
        """Why no int8 engine can run any layer of this recipe; None where one can."""
        for tensor, scheme, is_weight in ("weights", self.weight, True), ("activations", self.activation, False):
            if why := scheme.not_in_int8(is_weight):
                return f"{tensor} are {why}"
        return None

    def excludes(self, name: str) -> bool:
        """Whether this layer, or a module that holds it, stays in float by the user's wish."""
        return any(_fits(name, pattern) for pattern in self.exclude)

    def weight_of(self, name: str) -> Scheme:
        """The scheme of a layer's weight.

        >>> recipe = Recipe(layers=(("stem", Scheme(IntegerGrid(4))),))
        >>> [recipe.weight_of(name).grid.bits for name in ("stem.conv", "head")]
        [4, 8]
        """
        return next((scheme for pattern, scheme in reversed(self.layers) if _fits(name, pattern)), self.weight)

    def activation_of(self, site: str, of_product: bool = False) -> Scheme:
        """The scheme of an activation; an operand of a product of two activations has blocks of tokens at least.

        Scales along what such a product sums over, or of channels, belong to layers with weights.
        """
        usual = self.activation
        if of_product and usual.granularity not in (PerTensor(), PerToken()):
            usual = replace(usual, granularity=PerToken() if usual.of_call else PerTensor(), dynamic=usual.of_call)
        return next((scheme for pattern, scheme in reversed(self.sites) if _fits(site, pattern)), usual)


def _fits(name: str, pattern: str) -> bool:
    """Whether a pattern means this layer, or a module that holds it."""
    parts = name.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[: i + 1]), pattern) for i in range(len(parts)))
