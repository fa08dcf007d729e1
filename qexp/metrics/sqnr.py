"""Signal to quantization noise ratio."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchmetrics import Metric


def sqnr_db(signal_power: Tensor | float, noise_power: Tensor | float) -> float:
    """SQNR = 10 log10(sum x^2 / sum (x - x~)^2) in decibels, from the two sums; infinite without noise.

    >>> sqnr_db(100.0, 1.0)
    20.0
    """
    signal, noise = float(signal_power), float(noise_power)
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


PIECE = 2**14  # so small that torch does not spread it over threads


class QuantizationNoise(Metric):
    """Noise of one site over a whole set, from float64 sums; never a mean of decibels.

    >>> noise = QuantizationNoise()
    >>> noise.update(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5]), torch.tensor(0))
    >>> noise.compute()
    {'sqnr_db': 20.0, 'mse': 0.125, 'clipped_share': 0.0}
    """

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        for name in ("signal", "noise", "clipped", "count"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, x: Tensor, quantized: Tensor, clipped: Tensor) -> None:
        """x and quantized of one shape; clipped is the number of values outside the representable range."""
        # Piece by piece, because copies in float64 of a whole activation would leave the caches.
        signal = noise = 0.0
        for values, rounded in zip(x.reshape(-1).split(PIECE), quantized.reshape(-1).split(PIECE), strict=True):
            values = values.double()
            error = values - rounded.double()
            signal, noise = signal + values @ values, noise + error @ error
        self.signal += signal
        self.noise += noise
        self.clipped += clipped
        self.count += x.numel()

    def compute(self) -> dict[str, float]:
        """SQNR in decibels, mean squared error, share of clipped values."""
        return {
            "sqnr_db": sqnr_db(self.signal, self.noise),
            "mse": float(self.noise / self.count),
            "clipped_share": float(self.clipped / self.count),
        }
