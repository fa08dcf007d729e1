"""The whole choice of one fine-tuning as a frozen value; importing this file needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from qexp.quant.estimators import Estimator
from qexp.quant.rounding import Rounding


class Factory(Protocol):
    """Makes an optimizer or a scheduler; of what is `offered`, it takes the arguments that it has names for."""

    section: dict[str, Any]

    def __call__(self, *args: Any, **options: Any) -> Any: ...

    def offered(self, **options: Any) -> dict[str, Any]: ...


@dataclass(frozen=True)
class FineTune:
    """What trains, with which optimizer and through which estimators, and in which epoch something changes.

    weight, activation  estimators of the two kinds of tensors; None: they stay in float while the network trains
    epochs, optimizer   the length, and a factory that gets the groups of parameters
    range_lr            absolute: learned ranges have the same learning rate; relative: times their own size, for
                        optimizers whose steps do not follow the size of the gradient, as Adam
    scheduler           a factory that gets the optimizer (and T_max or total_steps where it has such), or None
    start               the epoch in which quantization begins; the network trains in float before
    observe             ranges follow the data for so many epochs, then they freeze
    gradual             widths before the final one, each for an equal share of the epochs, as in (8, 6)
    batchnorm           folded (before training), batch or corrected (Krishnamoorthi 2018, section 3.2.2)
    batchnorm_freeze    the epoch from which running statistics normalise, and no longer change
    reestimate          whether running statistics are estimated anew after training
    distill             share of the loss that is the distance to the float network's logits, at `temperature`
    update              rounding of weights to their grid after every step, as in training at low precision; or None
    frozen              parameters that do not train, by names or patterns
    after               convert, or recalibrate the ranges on the trained weights

    Errors: ValueError naming the field, its value and what is allowed.

    >>> FineTune(None, None, epochs=3, observe=4)
    Traceback (most recent call last):
    ValueError: finetune.observe=4: must be between 0 and finetune.epochs=3
    """

    weight: Estimator | None
    activation: Estimator | None
    epochs: int = 3
    optimizer: Factory | None = None
    range_lr: str = "absolute"
    scheduler: Factory | None = None
    start: int = 0
    observe: int = 0
    gradual: tuple[int, ...] = ()
    batchnorm: str = "folded"
    batchnorm_freeze: int | None = None
    reestimate: bool = False
    distill: float = 0.0
    temperature: float = 1.0
    update: Rounding | None = None
    frozen: tuple[str, ...] = ()
    after: str = "convert"

    BATCHNORMS: ClassVar[tuple[str, ...]] = ("folded", "batch", "corrected")
    AFTER: ClassVar[tuple[str, ...]] = ("convert", "recalibrate")

    def __post_init__(self) -> None:
        self._whole("epochs", 1, None)
        self._whole("start", 0, self.epochs - 1)
        self._whole("observe", 0, self.epochs)
        if self.batchnorm_freeze is not None:
            self._whole("batchnorm_freeze", 0, self.epochs)
        self._choice("batchnorm", self.BATCHNORMS)
        self._choice("after", self.AFTER)
        self._choice("range_lr", ("absolute", "relative"))
        self._choice("reestimate", (True, False))
        self._number("distill", 0.0, 1.0)
        self._number("temperature", 1e-6, None)
        if self.batchnorm == "folded" and (self.reestimate or self.batchnorm_freeze is not None):
            name = "reestimate" if self.reestimate else "batchnorm_freeze"
            raise ValueError(f"finetune.{name}={getattr(self, name)}: needs batchnorm=batch or batchnorm=corrected")
        if self.observe and any(estimator.learns for estimator in self.estimators):
            raise ValueError(
                f"finetune.observe={self.observe}: ranges that are learned do not follow the data; choose 0"
            )
        if self.range_lr == "relative" and any(e.learns for e in self.estimators) and self.lr is None:
            raise ValueError("finetune.range_lr=relative: needs finetune.optimizer.lr, of which it is a multiple")
        if self.update is not None and (self.weight is None or self.weight.learns):
            raise ValueError(
                f"finetune.update={self.update}: needs weights whose grid is fixed, not weight={self.weight}"
            )
        if self.batchnorm != "folded" and self.update is not None:
            raise ValueError(f"finetune.update={self.update}: needs batchnorm=folded, as weights have no other grid")
        if self.batchnorm != "folded" and self.weight is not None and self.weight.transforms:
            raise ValueError(f"finetune.batchnorm={self.batchnorm}: weight={self.weight} needs batchnorm=folded")
        if self.start and self.weight is not None and self.weight.transforms:
            raise ValueError(f"finetune.start={self.start}: weight={self.weight} is trained in its own form throughout")
        for bits in self.gradual:
            if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 16:
                raise ValueError(f"finetune.gradual={list(self.gradual)}: must be a list of widths from 1 to 16")
        if len(self.gradual) >= self.epochs:
            raise ValueError(f"finetune.gradual={list(self.gradual)}: needs more than {len(self.gradual)} epochs")

    @property
    def estimators(self) -> tuple[Estimator, ...]:
        """Those in use."""
        return tuple(estimator for estimator in (self.weight, self.activation) if estimator is not None)

    @property
    def lr(self) -> float | None:
        """The learning rate that the optimizer is given."""
        return None if self.optimizer is None else self.optimizer.section.get("lr")

    @property
    def is_float(self) -> bool:
        """Whether the float network trains: the control that sees as many steps."""
        return not self.estimators

    def bits_in(self, epoch: int, final: int) -> int:
        """The width in this epoch."""
        stages = [*(max(bits, final) for bits in self.gradual), final]
        return stages[epoch * len(stages) // self.epochs]

    def _whole(self, name: str, least: int, most: int | None) -> None:
        value = getattr(self, name)
        fits = isinstance(value, int) and not isinstance(value, bool) and value >= least
        if not fits or (most is not None and value > most):
            last = f"finetune.epochs={self.epochs}" if most == self.epochs else most
            allowed = f"an integer of at least {least}" if most is None else f"between {least} and {last}"
            raise ValueError(f"finetune.{name}={value!r}: must be {allowed}")

    def _number(self, name: str, least: float, most: float | None) -> None:
        value = getattr(self, name)
        fits = isinstance(value, (int, float)) and not isinstance(value, bool) and value >= least
        if not fits or (most is not None and value > most):
            allowed = f"a number of at least {least}" if most is None else f"between {least:g} and {most:g}"
            raise ValueError(f"finetune.{name}={value!r}: must be {allowed}")

    def _choice(self, name: str, allowed: tuple) -> None:
        value = getattr(self, name)
        if not any(value is option or (isinstance(option, str) and value == option) for option in allowed):
            raise ValueError(f"finetune.{name}={value!r}: allowed are {', '.join(map(str, allowed))}")

    def __str__(self) -> str:
        if self.is_float:
            return f"float, {self.epochs} epochs"
        weight, activation = (e or "float" for e in (self.weight, self.activation))
        both = str(weight) if str(weight) == str(activation) else f"weights {weight}, activations {activation}"
        return f"{both}, {self.epochs} epochs"
