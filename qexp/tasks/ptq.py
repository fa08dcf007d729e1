"""Post-training quantization: a calibration pass, then the common test pass."""

from __future__ import annotations

from torch import Tensor

from qexp.tasks.evaluated import EvaluatedTask


class PTQTask(EvaluatedTask):
    """Runs a quantized network; `trainer.validate` over the calibration data feeds its observers.

    Use it inside `with calibrating(net)`, which fixes the ranges when the block ends.
    """

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self(batch[0])
