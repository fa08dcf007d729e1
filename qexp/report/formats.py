"""What tables and figures of formats show: levels and thresholds at one scale, staircases, samples."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from qexp.metrics.sqnr import sqnr_db
from qexp.quant.affine import QParams
from qexp.quant.codebooks import Binary
from qexp.quant.grid import HALF_EVEN, Grid, IntegerGrid
from qexp.quant.recipe import Scheme
from qexp.quant.rounding import Rounding
from qexp.quant.stats import Statistics

SAMPLE = 8192  # values in a sample
POINTS = 4001  # of a staircase with more steps than these
AFFINE_RANGE = -0.4, 1.0  # what affine codes are drawn for: more above zero than below, as activations are
MARGIN = 0.15  # of the range: how far beyond it a staircase goes


@dataclass(frozen=True)
class View:
    """A format with its rounding at one scale; `fitted` says what its levels were made for, where they were made."""

    grid: Grid
    rounding: Rounding
    qparams: QParams
    fitted: str = ""

    @cached_property
    def units(self) -> Tensor:
        """The levels X_i, increasing, in units of S; of integers q - Z."""
        return self.grid.levels(self.qparams._replace(scale=torch.ones(()))).flatten()

    @cached_property
    def levels(self) -> Tensor:
        """The levels as values, S X_i."""
        return self.grid.levels(self.qparams).flatten()

    @cached_property
    def thresholds(self) -> Tensor | None:
        """Thresholds Delta_i in units of S: level i + 1 is taken from above Delta_i on; None where a draw decides."""
        if self.rounding.is_random:
            return None
        if not isinstance(self.grid, IntegerGrid):
            return self.grid.thresholds_for(self.rounding, self.qparams)
        return self.rounding.thresholds(self.units, (self.units[:-1] + self.units[1:]) / 2, self.units[:-1])

    @cached_property
    def uniform(self) -> bool:
        """Whether all steps are equal."""
        steps = self.units.double().diff()
        return bool((steps - steps[0]).abs().max() < 1e-6 * steps[0])

    def quantized(self, r: Tensor) -> Tensor:
        """Q(r)."""
        return self.grid.decode(self.grid.encode(r, self.qparams, self.rounding), self.qparams)

    def staircase(self, lo: float, hi: float) -> tuple[Tensor, Tensor]:
        """r from lo to hi, at and just beside every threshold, where there are too many of them evenly; and Q(r)."""
        thresholds = self.thresholds
        if thresholds is None or len(thresholds) > POINTS:
            r = torch.linspace(lo, hi, POINTS)
        else:
            steps = thresholds * self.qparams.scale
            beside = 2**-20 * steps.abs() + 2**-120  # further away than a rounding error
            r = torch.cat([steps.new_tensor([lo, hi]), steps, steps - beside, steps + beside])
            r = r[(r >= lo) & (r <= hi)].unique()
        return r, self.quantized(r)


def view(grid: Grid, rounding: Rounding = HALF_EVEN, seed: int = 0) -> View:
    """A format at the scale that brings its range to [-1, 1], without a sign to [0, 1], and affine to [-0.4, 1]."""
    lo, hi = ((-1.0, 1.0) if grid.signed else (0.0, 1.0)) if grid.symmetric else AFFINE_RANGE
    qparams = grid.qparams(torch.tensor(lo), torch.tensor(hi))
    if not grid.fits_data:
        return View(grid, rounding, qparams)
    sample = weight_sample(seed)
    sample = sample / sample.abs().max()
    qparams = grid.fit(Statistics.of(sample, tuple(sample.shape)), qparams)
    return View(grid, rounding, qparams, f"levels fitted to {SAMPLE:,} normal values, seed {seed}")


def weight_sample(seed: int) -> Tensor:
    """Values of a standard normal distribution, as weights are."""
    return torch.randn(SAMPLE, generator=torch.Generator().manual_seed(seed))


def activation_sample(seed: int) -> Tensor:
    """Values with a heavy tail after a ReLU: Student's t with 3 degrees of freedom, negative ones at 0."""
    normal = torch.randn(4, SAMPLE, generator=torch.Generator().manual_seed(seed))
    return (normal[0] / normal[1:].square().mean(0).sqrt()).relu()


@dataclass(frozen=True)
class Fit:
    """A sample x under a format whose range a calibration found."""

    x: Tensor
    view: View

    @cached_property
    def sqnr_db(self) -> float:
        """10 log10(sum x^2 / sum (x - Q(x))^2)."""
        x = self.x.double()
        noise = (x - self.view.quantized(self.x).double()).square().sum()
        return sqnr_db(x.square().sum(), noise)

    @cached_property
    def used(self) -> Tensor:
        """For each code from the smallest to the largest whether a value of x has it."""
        grid, qparams = self.view.grid, self.view.qparams
        index = (grid.encode(self.x, qparams, self.view.rounding) - grid.quant_min).long()
        return torch.bincount(index, minlength=grid.quant_max - grid.quant_min + 1) > 0


def fit(x: Tensor, scheme: Scheme) -> Fit:
    """One scale for all of x, in the format, with the calibration and the rounding of a scheme."""
    stats = Statistics.of(x, tuple(x.shape))
    lo, hi = scheme.calibration.range(stats, scheme.grid)
    qparams = scheme.grid.fit(stats, scheme.grid.qparams(lo[0], hi[0]))
    return Fit(x, View(scheme.grid, scheme.rounding, qparams))


def symmetric_and_affine(scheme: Scheme) -> tuple[Scheme, Scheme]:
    """A scheme with a symmetric format and with affine integers, of the same bits; its own format is one if it can."""
    grid, bits = scheme.grid, min(scheme.grid.bits, 16)
    scale = grid.scale if grid.scale == "power_of_two" else "float32"
    symmetric, affine = grid, grid
    if not (grid.symmetric and grid.signed):
        symmetric = Binary() if bits == 1 else IntegerGrid(bits, "restricted", scale)
    if grid.symmetric:
        affine = IntegerGrid(bits, "affine", scale)
    return replace(scheme, grid=symmetric), replace(scheme, grid=affine)
