"""Training of the float network that everything else starts from."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qexp.tasks.evaluated import EvaluatedTask


class Float32Task(EvaluatedTask):
    """Cross-entropy, AdamW and a one-cycle learning rate. Errors: ValueError when the loss is not finite."""

    def __init__(self, net: nn.Module, num_classes: int, lr: float = 0.03, weight_decay: float = 0.1) -> None:
        super().__init__(net, num_classes)
        self.lr, self.weight_decay = lr, weight_decay

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        images, labels = batch
        self.require_classes(labels)
        loss = F.cross_entropy(self(images), labels)
        if not bool(loss.isfinite()):
            raise ValueError(
                f"training diverged: the loss is {loss.item()} in epoch {self.current_epoch}, step {index}; "
                f"lower trainer.lr={self.lr} or look at the data"
            )
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=self.lr, total_steps=int(self.trainer.estimated_stepping_batches)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
