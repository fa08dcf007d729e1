"""Estimators of the literature that learn more than a scale, or train on something else. Importing needs no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from qexp.quant.estimators import LSQ, Estimator, set_scales_
from qexp.quant.grid import IntegerGrid
from qexp.quant.rounding import Stochastic
from qexp.quant.scale import SMALLEST_NORMAL

if TYPE_CHECKING:
    from torch import Tensor

    from qexp.quant.affine import QParams
    from qexp.quant.quantizer import Quantizer
    from qexp.quant.recipe import Scheme


@dataclass(frozen=True)
class LSQPlus(LSQ):
    """LSQ+ (Bhalgat et al. 2020): LSQ that learns the offset of asymmetric codes as well as their scale.

    x~ = S (clamp(round(x / S) + Z) - Z),  dx~/dZ = 0 inside of the range, -S outside,  dx~/dS as in LSQ

    dL/dZ is multiplied by LSQ's g, as dL/dS is. The paper (section 3.1) adds a real offset beta = -S Z after rounding;
    engines have an integer zero point, so Z is a real parameter that is used rounded, with the straight-through
    gradient, and is kept among the codes. Both start where calibration put them, and not as in the paper's section
    3.2. Symmetric codes (its choice for weights) have no offset: LSQ. Errors: as LSQ, and where Z is no longer finite.

    >>> print(LSQPlus())
    lsq+
    """

    learns: ClassVar[tuple[str, ...]] = ("learned_scale", "learned_zero_point")

    def attach_(self, quantizer: Quantizer) -> None:
        from torch import nn

        super().attach_(quantizer)
        if not quantizer.grid.symmetric:
            quantizer.learned_zero_point = nn.Parameter(quantizer.zero_point.clone())

    def values(self, quantizer: Quantizer, x: Tensor, qparams: QParams) -> Tensor:
        if quantizer.grid.symmetric:
            return super().values(quantizer, x, qparams)
        zero_point = quantizer.learned_zero_point.view(qparams.scale.shape)
        # Zero, with a gradient: + S before and - S after leave - S of what is clipped in between.
        shift = qparams.scale * self.factor(quantizer, x) * (zero_point - zero_point.detach())
        return super().values(quantizer, x + shift, qparams) - shift

    def sync_(self, quantizer: Quantizer) -> None:
        import torch

        super().sync_(quantizer)
        if quantizer.grid.symmetric:
            return
        with torch.no_grad():
            learned = quantizer.learned_zero_point
            if not bool(learned.isfinite().all()):
                raise ValueError(f"{quantizer.site}: its learned zero point became nan or inf; lower the learning rate")
            quantizer.zero_point.copy_(learned.clamp_(quantizer.grid.quant_min, quantizer.grid.quant_max).round())

    def __str__(self) -> str:
        return super().__str__().replace("lsq", "lsq+")


@dataclass(frozen=True)
class PACT(Estimator):
    """PACT (Choi et al. 2018): activations that begin at zero are clipped at a learned alpha.

    y = clamp(x, 0, alpha), x~ = S round(y / S), S = alpha / (2^b - 1)                  (equations 1 and 2)
    dL/dx = dL/dx~ where 0 <= x < alpha, else 0;  dL/dalpha = sum dL/dx~ where x >= alpha   (equation 3)
    decay alpha^2 is added to the loss                                                  (section 3: L2)

    So alpha is told of clipping alone, and not of rounding. It starts at the calibrated end of the range, not at a
    constant as in the paper, and decay = 1e-4 is a choice of this library. Ask `fits` first: a site whose range begins
    below zero needs another estimator. Errors: ValueError for a negative decay, attached to a site that does not fit,
    and where alpha is no longer a positive number.

    >>> print(PACT(decay=0.0))
    pact
    """

    decay: float = 1e-4

    learns: ClassVar[tuple[str, ...]] = ("learned_alpha",)

    def __post_init__(self) -> None:
        if isinstance(self.decay, bool) or not isinstance(self.decay, (int, float)) or not 0 <= self.decay < math.inf:
            raise ValueError(f"decay={self.decay!r}: must be a number of at least 0")

    def refusal(self, scheme: Scheme, is_weight: bool) -> str | None:
        if is_weight:
            return None  # `fits` says that another estimator takes these
        if not isinstance(scheme.grid, IntegerGrid) or scheme.grid.signed or scheme.grid.scale != "float32":
            return f"clipping at 0 and alpha needs convention=affine or unsigned with scale=float32, not {scheme.grid}"
        return "an alpha of each call cannot be learned" if scheme.of_call else None

    def fits(self, quantizer: Quantizer) -> bool:
        if quantizer.is_weight or self.refusal(quantizer.scheme, False) is not None:
            return False
        return bool((quantizer.zero_point == quantizer.grid.quant_min).all())

    def attach_(self, quantizer: Quantizer) -> None:
        from torch import nn

        if not self.fits(quantizer):
            raise ValueError(f"{quantizer.site}: {self} trains activations whose range begins at zero, and no others")
        quantizer.learned_alpha = nn.Parameter(quantizer.scale * quantizer.grid.quant_max)
        # A scale that is no quotient of a range, which is rare, may move by its last bit: alpha rules from now on.
        self.sync_(quantizer)

    def values(self, quantizer: Quantizer, x: Tensor, qparams: QParams) -> Tensor:
        import torch

        from qexp.quant.affine import straight_through

        alpha = quantizer.learned_alpha.view(qparams.scale.shape)
        clipped = torch.where(x >= alpha, alpha, x.clamp(min=0.0))
        return straight_through(clipped, quantizer.grid.fake_quantize(x.detach(), qparams, self.rounding(quantizer)))

    def penalty(self, quantizer: Quantizer) -> Tensor | float:
        return self.decay * quantizer.learned_alpha.square().sum() if self.decay else 0.0

    def sync_(self, quantizer: Quantizer) -> None:
        set_scales_({quantizer: quantizer.learned_alpha.detach() / quantizer.grid.quant_max})

    def __str__(self) -> str:
        return "pact"


@dataclass(frozen=True)
class TQT(Estimator):
    """Trained quantization thresholds (Jain et al. 2020): S is a power of two, and the log of a threshold is learned.

    S = 2^ceil(log2 t) / 2^(b-1), signed codes;  S = 2^ceil(log2 t) / 2^b, unsigned ones     (section 3.2)
    dx~/d(log2 t) = S ln 2 (round(x / S) - x / S)  inside of the range, S ln 2 (n or p) outside  (equation 7)
    dL/dx = dL/dx~ where the code of x is in range, else 0                                (equation 8)

    The ceiling has the straight-through gradient. log2 t starts in the middle of the unit interval that gives the
    calibrated S, log2(S 2^(b-1)) - 1/2, where the paper starts from 3 standard deviations or a divergence. Affine
    codes, which the paper has not, keep their zero point. The gradient is not normalised (appendix B): use Adam.
    Errors: ValueError where S leaves the powers of two that float32 holds.

    >>> print(TQT())
    tqt
    """

    learns: ClassVar[tuple[str, ...]] = ("learned_log2_threshold",)

    def refusal(self, scheme: Scheme, is_weight: bool) -> str | None:
        if not isinstance(scheme.grid, IntegerGrid) or scheme.grid.scale != "power_of_two":
            return f"needs an integer grid with scale=power_of_two, as that of quantizer=int8_pow2, not {scheme.grid}"
        return "a threshold of each call cannot be learned" if not is_weight and scheme.of_call else None

    def attach_(self, quantizer: Quantizer) -> None:
        from torch import nn

        exponent = quantizer.scale.frexp().exponent - 1  # the scale is 2 to this power
        quantizer.learned_log2_threshold = nn.Parameter(exponent + (self._shift(quantizer) - 0.5))

    @staticmethod
    def _shift(quantizer: Quantizer) -> int:
        """log2(2^ceil(log2 t) / S)."""
        return quantizer.grid.bits - quantizer.grid.signed

    def values(self, quantizer: Quantizer, x: Tensor, qparams: QParams) -> Tensor:
        from qexp.quant.affine import tell_scale

        log2 = quantizer.learned_log2_threshold.view(qparams.scale.shape)
        scale = qparams.scale * (log2 - log2.detach()).exp2()
        told = tell_scale(x, scale, -1.0)
        return tell_scale(quantizer.grid.fake_quantize(told, qparams, self.rounding(quantizer)), scale, 1.0)

    def sync_(self, quantizer: Quantizer) -> None:
        import torch

        exponent = quantizer.learned_log2_threshold.detach().ceil() - self._shift(quantizer)
        set_scales_({quantizer: torch.ldexp(torch.ones_like(exponent), exponent)})

    def __str__(self) -> str:
        return "tqt"


@dataclass(frozen=True)
class DoReFa(Estimator):
    """The weights of DoReFa-Net (Zhou et al. 2016): the tanh of a free parameter is what is quantized.

    w = m tanh(w0) / max |tanh(w0)|,  then the grid of the scheme with dL/dw = dL/dw~ where in range  (equation 9)

    m is a constant, the largest |w| at the start, so that the calibrated scale goes on to fit, where the paper has
    weights in [-1, 1] on 2^b levels without a zero. Training starts from the calibrated weights: `start` gives
    w0 = atanh(c w / m), c = tanh(1), which lies in [-1, 1]; the paper starts from w0 = w. The gradient goes through the
    maximum too. Errors: ValueError for activations, which the paper clips to [0, 1].

    >>> print(DoReFa())
    dorefa
    """

    transforms: ClassVar[bool] = True
    learns: ClassVar[tuple[str, ...]] = ("magnitude",)  # a buffer: no gradient, but as long-lived as what is learned

    def refusal(self, scheme: Scheme, is_weight: bool) -> str | None:
        return None if is_weight else "is made for weights alone; activations can have ste"

    def attach_(self, quantizer: Quantizer) -> None:
        if not hasattr(quantizer, "magnitude"):
            quantizer.register_buffer("magnitude", quantizer.hi.maximum(-quantizer.lo).max())

    def start(self, quantizer: Quantizer, x: Tensor) -> Tensor:
        magnitude = x.detach().abs().max()
        quantizer.magnitude.copy_(magnitude)
        return (x / magnitude.clamp(min=SMALLEST_NORMAL) * math.tanh(1.0)).atanh()

    def before(self, quantizer: Quantizer, x: Tensor) -> Tensor:
        squashed = x.tanh()
        return squashed * (quantizer.magnitude / squashed.abs().amax().clamp(min=SMALLEST_NORMAL))

    def values(self, quantizer: Quantizer, x: Tensor, qparams: QParams) -> Tensor:
        return quantizer.grid.fake_quantize(x, qparams, self.rounding(quantizer))

    def __str__(self) -> str:
        return "dorefa"


@dataclass(frozen=True)
class AdditiveNoise(Estimator):
    """Uniform noise in place of rounding (Baskin et al. 2018, UNIQ; Défossez et al. 2021, DiffQ, section 3).

    x~ = clamp(x, S (quant_min - Z), S (quant_max - Z)) + S u,  u uniform in [-1/2, 1/2)
    dL/dx = dL/dx~ in that range, else 0

    It has the mean and the variance of the error of rounding, and a derivative that is no invention. Evaluation rounds
    as the scheme says. UNIQ's quantile transform and DiffQ's learned number of bits are left out. Draws are a hash of
    (seed, site, step, element). Errors: ValueError for a wrong seed.

    >>> print(AdditiveNoise())
    additive noise
    """

    seed: int = 0

    def __post_init__(self) -> None:
        Stochastic(self.seed)  # refuses a wrong seed

    @property
    def draws(self) -> bool:
        return True

    def refusal(self, scheme: Scheme, is_weight: bool) -> str | None:
        even = isinstance(scheme.grid, IntegerGrid)
        return None if even else f"noise of one step needs evenly spaced values, an integer grid, not {scheme.grid}"

    def values(self, quantizer: Quantizer, x: Tensor, qparams: QParams) -> Tensor:
        grid, (scale, zero_point, _) = quantizer.grid, qparams
        clipped = x.clamp(scale * (grid.quant_min - zero_point), scale * (grid.quant_max - zero_point))
        draws = quantizer.drawn(Stochastic(self.seed)).uniform(x)
        return clipped + scale * (draws - 0.5)

    def __str__(self) -> str:
        return "additive noise"
