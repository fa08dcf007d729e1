"""How a quantizer is trained through: what it computes and what gradient it hands back. Importing needs no torch.

A staircase has the gradient zero almost everywhere (Gholami et al. 2021, section III.G), so an estimator stands in for
it while a network trains. In evaluation every quantizer computes what the engine will, whatever its estimator.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from torch import Tensor

    from qexp.quant.affine import QParams
    from qexp.quant.quantizer import Quantizer
    from qexp.quant.recipe import Scheme
    from qexp.quant.rounding import Rounding


@dataclass(frozen=True)
class Estimator:
    """Base of all estimators; a new one implements `values`, and the hooks for what it learns.

    Learned parameters are those of the quantizer, by the names in `learns`; its scale and zero point are set from
    them after every step of the optimizer, so evaluation, biases and export never look at anything else.
    """

    learns: ClassVar[tuple[str, ...]] = ()
    transforms: ClassVar[bool] = False  # whether `before` is more than the identity

    def refusal(self, scheme: Scheme, is_weight: bool) -> str | None:
        """Why this estimator cannot train a tensor of this scheme; None where it can."""
        return None

    def fits(self, quantizer: Quantizer) -> bool:
        """Whether a calibrated quantizer of an allowed scheme can be trained by it; where not, take another."""
        return True

    def attach_(self, quantizer: Quantizer) -> None:
        """Give a calibrated quantizer the parameters that are learned, starting from its scale and zero point."""

    def before(self, quantizer: Quantizer, x: Tensor) -> Tensor:
        """What is quantized instead of x, in training and in evaluation."""
        return x

    def start(self, quantizer: Quantizer, x: Tensor) -> Tensor:
        """The parameter that `before` turns into x."""
        return x

    def values(self, quantizer: Quantizer, x: Tensor, qparams: QParams) -> Tensor:
        """What training sees of x, and its gradient; scales and x broadcast."""
        raise TypeError(f"{type(self).__name__} must define values")

    def penalty(self, quantizer: Quantizer) -> Tensor | float:
        """What is added to the loss."""
        return 0.0

    def sync_(self, quantizer: Quantizer) -> None:
        """Set scale and zero point from what is learned. Errors: ValueError where they became impossible."""

    def rounding(self, quantizer: Quantizer) -> Rounding:
        """The rounding of this training step."""
        return quantizer.rounding

    @property
    def draws(self) -> bool:
        """Whether numbers are drawn in training."""
        return False

    def __str__(self) -> str:
        return type(self).__name__


@dataclass(frozen=True)
class StraightThrough(Estimator):
    """The straight-through estimator: the staircase in the forward pass, another gradient in the backward pass.

    gradient = "clipped":  dL/dx = dL/dx~ where the code of x is in range, else 0   (Hinton 2012; Bengio et al. 2013)
    gradient = "identity": dL/dx = dL/dx~ everywhere
    gradient = "none":     dL/dx = 0, the staircase's own: the control that cannot learn

    `rounding` replaces that of the scheme while training, as stochastic rounding does; evaluation and export round as
    the scheme says. Errors: ValueError for another gradient.

    >>> print(StraightThrough("identity"))
    ste identity
    """

    gradient: str = "clipped"
    rounding_in_training: Rounding | None = None

    GRADIENTS: ClassVar[tuple[str, ...]] = ("clipped", "identity", "none")

    def __post_init__(self) -> None:
        if self.gradient not in self.GRADIENTS:
            raise ValueError(f"gradient={self.gradient!r}: allowed are {', '.join(self.GRADIENTS)}")

    @property
    def draws(self) -> bool:
        return self.rounding_in_training is not None and self.rounding_in_training.is_random

    def rounding(self, quantizer: Quantizer) -> Rounding:
        mode = self.rounding_in_training
        return quantizer.rounding if mode is None else quantizer.drawn(mode)

    def values(self, quantizer: Quantizer, x: Tensor, qparams: QParams) -> Tensor:
        from qexp.quant.affine import straight_through

        fake_quantize, rounding = quantizer.grid.fake_quantize, self.rounding(quantizer)
        if self.gradient == "clipped":
            return fake_quantize(x, qparams, rounding)
        values = fake_quantize(x.detach(), qparams, rounding)
        return values if self.gradient == "none" else straight_through(x, values)

    def __str__(self) -> str:
        drawn = "" if self.rounding_in_training is None else f" {self.rounding_in_training}"
        return f"ste {self.gradient}{drawn}"


@dataclass(frozen=True)
class LSQ(Estimator):
    """Learned step size (Esser et al. 2020): the scale is a parameter that starts at the calibrated one.

    dx~/dS = round(x / S) - x / S  inside of the range, -Q_N or Q_P outside          (equation 3)
    dL/dS is multiplied by g = 1 / sqrt(N Q_P), N elements sharing S                 (section 2.2)

    Q_P is the largest code above the zero point; of activations N counts the whole batch, as in torch's own operator,
    where the paper counts the features of one sample. `gradient_scale` is the paper's ablation (table 3): "full" as
    above, "size" for 1 / sqrt(N), "none" for 1. Two sums are enough: S dL/dS = sum dL/dx~ x~ - sum dL/dx x.
    Errors: ValueError for another gradient_scale, and where S is no longer a positive number.

    >>> print(LSQ())
    lsq
    """

    gradient_scale: str = "full"

    learns: ClassVar[tuple[str, ...]] = ("learned_scale",)
    SCALES: ClassVar[tuple[str, ...]] = ("full", "size", "none")

    def __post_init__(self) -> None:
        if self.gradient_scale not in self.SCALES:
            raise ValueError(f"gradient_scale={self.gradient_scale!r}: allowed are {', '.join(self.SCALES)}")

    def refusal(self, scheme: Scheme, is_weight: bool) -> str | None:
        from qexp.quant.grid import IntegerGrid

        if not isinstance(scheme.grid, IntegerGrid) or scheme.grid.scale != "float32":
            return f"a scale that is learned needs an integer grid with scale=float32, not {scheme.grid}"
        return "a scale of each call cannot be learned" if not is_weight and scheme.of_call else None

    def attach_(self, quantizer: Quantizer) -> None:
        from torch import nn

        quantizer.learned_scale = nn.Parameter(quantizer.scale.clone())
        quantizer.most = max(float(quantizer.grid.quant_max - quantizer.zero_point.mean()), 1.0)  # Q_P

    def values(self, quantizer: Quantizer, x: Tensor, qparams: QParams) -> Tensor:
        from qexp.quant import compiled
        from qexp.quant.affine import tell_scale

        learned, factor, rounding = quantizer.learned_scale, self.factor(quantizer, x), self.rounding(quantizer)
        if compiled.is_loaded() and compiled.serves(x, rounding):
            return compiled.learned_scale(x, learned, factor, qparams, quantizer.grid, rounding)
        scale = learned.view(qparams.scale.shape)
        told = tell_scale(x, scale, -factor)
        return tell_scale(quantizer.grid.fake_quantize(told, qparams, rounding), scale, factor)

    def factor(self, quantizer: Quantizer, x: Tensor) -> float:
        """What dL/dS is multiplied by."""
        if self.gradient_scale == "none":
            return 1.0
        from qexp.quant.distributed import ranks

        most = quantizer.most if self.gradient_scale == "full" else 1.0
        numel = x.numel() * (1 if quantizer.is_weight else ranks())
        return (numel / quantizer.scale.numel() * most) ** -0.5

    def sync_(self, quantizer: Quantizer) -> None:
        set_scales_({quantizer: quantizer.learned_scale.detach()})

    def __str__(self) -> str:
        return "lsq" if self.gradient_scale == "full" else f"lsq {self.gradient_scale}"


def sync_(quantizers: Iterable[Quantizer]) -> None:
    """`Estimator.sync_` of all these sites; scales that are learned as they are, as in LSQ, are stored in one go."""
    learning = [quantizer for quantizer in quantizers if quantizer.estimator is not None]
    as_learned = [quantizer for quantizer in learning if type(quantizer.estimator).sync_ is LSQ.sync_]
    set_scales_({quantizer: quantizer.learned_scale.detach() for quantizer in as_learned})
    for quantizer in learning:
        if type(quantizer.estimator).sync_ is not LSQ.sync_:
            quantizer.estimator.sync_(quantizer)


def set_scales_(scales: dict[Quantizer, Tensor]) -> None:
    """Store learned scales. Errors: ValueError naming a site unless all are normal positive float32 numbers."""
    import torch

    from qexp.quant.scale import SMALLEST_NORMAL

    if not scales:
        return
    every = torch.cat([scale.flatten() for scale in scales.values()])
    lowest, highest = map(float, every.aminmax())
    if not SMALLEST_NORMAL <= lowest <= highest < float("inf"):
        for quantizer, scale in scales.items():
            for worst in scale[~((scale >= SMALLEST_NORMAL) & scale.isfinite())].tolist():
                raise ValueError(f"{quantizer.site}: its learned scale became {worst:.3g}; lower the learning rate")
    torch._foreach_copy_([quantizer.scale for quantizer in scales], list(scales.values()))
