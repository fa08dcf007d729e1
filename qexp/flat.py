"""How flat the minimum is that a run ends in: figures of the loss at its weights, and slices of it around them.

The loss is that of the network in float, with BatchNorm folded, over training images. Its weights are those that the
run evaluates: of method=fp32 the float ones, otherwise the values that the quantizers give them. Activations stay in
float, because a quantized network is a staircase, which has neither a slope nor a Hessian.
"""

from __future__ import annotations

import copy
import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from qexp import prepare
from qexp.data.base import DataModule
from qexp.metrics.flatness import Flatness, flatness, half_steps, half_width
from qexp.metrics.surface import STILL, Direction, Loss, Point, Slice, random_direction, slice_1d, slice_2d
from qexp.quant.convert import layers, set_mode_
from qexp.quant.quantizer import Mode
from qexp.report import terminal

IMAGES = 256  # of the training set
SAMPLES = 30  # products with the Hessian for its trace
SEEDS = 0, 1  # of the two directions, in all runs the same
LINE = [round(0.03 * i, 2) for i in range(-20, 21)]
PLANE = [round(0.06 * i, 2) for i in range(-6, 7)]
LINE_COLUMNS = "distance", "loss", "accuracy", "half_width"
PLANE_COLUMNS = "x", "y", "loss", "accuracy"
MOST_EVALUATIONS = 250 + len(LINE) + len(PLANE) ** 2  # about


@dataclass(frozen=True, eq=False)
class Landscape:
    """A minimum and what lies around it; `half_width` is the distance along the line that is worth half a step."""

    flatness: Flatness
    line: Slice
    plane: Slice
    half_width: float

    def metrics(self) -> dict[str, float]:
        """Figures by their names in a run."""
        return self.flatness.metrics()

    def write(self, folder: Path) -> None:
        """Write flatness.csv and flatness_plane.csv."""
        rows = zip(*(t.tolist() for t in (*self.line.distances, self.line.losses, self.line.accuracies)), strict=True)
        _write(folder / "flatness.csv", LINE_COLUMNS, [(*row, self.half_width) for row in rows])
        x, y = torch.meshgrid(*self.plane.distances, indexing="ij")
        columns = (t.flatten().tolist() for t in (x, y, self.plane.losses, self.plane.accuracies))
        _write(folder / "flatness_plane.csv", PLANE_COLUMNS, list(zip(*columns, strict=True)))


def _write(path: Path, columns: tuple[str, ...], rows: list[tuple[float, ...]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)


def landscape(calibrated: nn.Module, rounded: bool, data: pl.LightningDataModule, seed: int) -> Landscape:
    """Measure around the weights of a calibrated network: those in float or, `rounded`, those that it quantizes to.

    The network is left as it is. Errors: ValueError for one that cannot be differentiated twice.
    """
    cell, model = half_steps(calibrated), in_float(calibrated, rounded)
    with terminal.stage("flatness: curvature, cell and slices of the minimum") as update:
        loss = _Told(model, images(data, seed), update=_counting(update))
        first, second = (random_direction(loss, seed) for seed in SEEDS)
        return Landscape(
            flatness(loss, cell, seed=SEEDS[0], samples=SAMPLES),
            slice_1d(loss, first, LINE),
            slice_2d(loss, (first, second), PLANE, PLANE),
            half_width(first, cell),
        )


@torch.no_grad()
def in_float(calibrated: nn.Module, rounded: bool) -> nn.Module:
    """A copy that quantizes nothing; `rounded` has quantized its weights once and for all."""
    model = copy.deepcopy(calibrated).eval().requires_grad_(True)
    for _, layer in layers(model) if rounded else ():
        if hasattr(layer, "weight_quantizer"):
            layer.weight.copy_(layer.weight_quantizer(layer.weight))
    set_mode_(model, Mode.OFF)
    return model


def images(data: pl.LightningDataModule, seed: int) -> list[tuple[Tensor, Tensor]]:
    """The first IMAGES of the order in which calibration images are drawn; without augmentation, and less if need be.

    Of a foreign data module they are the first of its own calibration loader, however many it offers.
    """
    if isinstance(data, DataModule):
        data = copy.copy(data)
        data.calibration_size = min(IMAGES, len(data.splits[0]))
        data.calibration_outlier = 1
    found, count = [], 0
    for x, labels in prepare.calibration_loader(data, seed):
        found.append((x[: IMAGES - count], labels[: IMAGES - count]))
        count += len(found[-1][1])
        if count == IMAGES:
            break
    return found


@dataclass(frozen=True, eq=False)
class _Told(Loss):
    """A loss that tells of each evaluation."""

    update: Callable[[], None] = lambda: None

    def measure(self, moved: Direction = STILL) -> Point:
        self.update()
        return super().measure(moved)

    def derive(self, derivative: Callable, moved: Direction = STILL) -> tuple[float, dict[str, Any]]:
        self.update()
        return super().derive(derivative, moved)


def _counting(update: terminal.Update) -> Callable[[], None]:
    done = 0

    def one_more() -> None:
        nonlocal done
        done += 1
        update(done, max(done, MOST_EVALUATIONS))

    return one_more
