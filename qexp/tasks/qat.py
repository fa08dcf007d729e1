"""Quantization-aware training: cross-entropy, or the float network's logits as the teacher, through quantizers."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qexp.finetune.plan import FineTune
from qexp.quant.convert import quantizers
from qexp.quant.quantizer import Mode
from qexp.tasks.evaluated import EvaluatedTask


class QATTask(EvaluatedTask):
    """Trains a network whose quantizers have estimators, by a plan.

    loss = (1 - d) CE(y, labels) + d T^2 KL(softmax(y_teacher / T) || softmax(y / T)) + penalties
    (Hinton et al. 2015, section 2), d = plan.distill, T = plan.temperature. Biases and learned ranges are
    not decayed. Errors: ValueError when the loss is not finite, and for `plan.frozen` that
    matches nothing.
    """

    def __init__(self, net: nn.Module, num_classes: int, plan: FineTune, teacher: nn.Module | None = None) -> None:
        super().__init__(net, num_classes)
        if plan.distill and teacher is None:
            raise ValueError(f"finetune.distill={plan.distill}: needs a float network to learn from")
        self.plan = plan
        self._teacher = [teacher]  # in a list it is no part of this module, nor of its checkpoints

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        images, labels = batch
        self.require_classes(labels)
        logits = self(images)
        loss = F.cross_entropy(logits, labels)
        if self.plan.distill:
            loss = torch.lerp(loss, self._distance(images, logits), self.plan.distill)
        loss = loss + self._penalties()
        if not bool(loss.isfinite()):
            raise ValueError(self._diverged(loss, index))
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def _penalties(self) -> Tensor | float:
        """Of each set of learned parameters once; sites that read one tensor share one."""
        learning = [q for q in quantizers(self.net) if q.learned and q.mode is Mode.QUANTIZE]
        once = {id(getattr(q, q.learned[0])): q for q in learning}
        return sum(q.estimator.penalty(q) for q in once.values())

    def _distance(self, images: Tensor, logits: Tensor) -> Tensor:
        (teacher,), temperature = self._teacher, self.plan.temperature
        with torch.no_grad():
            wanted = F.log_softmax(teacher.to(images.device)(images) / temperature, dim=1)
        found = F.log_softmax(logits / temperature, dim=1)
        return temperature**2 * F.kl_div(found, wanted, reduction="batchmean", log_target=True)

    def _diverged(self, loss: Tensor, index: int) -> str:
        names = (name for name, p in self.net.named_parameters() if not bool(p.isfinite().all()))
        first = next(names, None)
        where = "" if first is None else f"; the first parameter that is not finite is {first}"
        epoch = f"epoch {self.current_epoch}, step {index}"
        return f"finetune: training diverged: the loss is {loss.item()} in {epoch}{where}; lower finetune.optimizer.lr"

    def configure_optimizers(self):
        plan = self.plan
        trained = {name: p for name, p in self.net.named_parameters() if p.requires_grad}
        for pattern in plan.frozen:
            found = fnmatch.filter(trained, pattern)
            if not found:
                raise ValueError(f"finetune.frozen={pattern!r}: matches no parameter")
            for name in found:
                trained.pop(name).requires_grad_(False)
        if not trained:
            raise ValueError(f"finetune.frozen={list(plan.frozen)}: leaves no parameter to train")
        optimizer = plan.optimizer(list(self._groups(trained)))
        if plan.scheduler is None:
            return optimizer
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = plan.scheduler(optimizer, **plan.scheduler.offered(T_max=steps, total_steps=steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _groups(self, trained: dict[str, nn.Parameter]) -> Iterator[dict[str, Any]]:
        """Matrices; biases and the like; learned ranges, by themselves where each has a learning rate of its size."""
        alone = self.plan.range_lr == "relative"
        ranges = {name: trained.pop(name) for name in list(trained) if "learned_" in name}
        matrices = [p for p in trained.values() if p.dim() > 1]
        if matrices:
            yield {"params": matrices}
        if len(matrices) < len(trained):
            yield {"params": [p for p in trained.values() if p.dim() <= 1], "weight_decay": 0.0}
        if ranges and not alone:
            yield {"params": list(ranges.values()), "weight_decay": 0.0}
        for parameter in ranges.values() if alone else ():
            rate = self.plan.lr * float(parameter.detach().abs().mean())
            yield {"params": [parameter], "weight_decay": 0.0, "lr": rate}
