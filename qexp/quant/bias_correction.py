"""Bias correction: the mean error of each output channel goes into the bias of its layer, with the opposite sign.

Rounding and clipping shift what a layer gives, and every layer behind it reads the shift. With y of the float network
and y~ of the quantized one (Nagel et al. 2019, arXiv 1906.04721, section 4.2; from data, as in its appendix D):

b' = Q(b) + E[y] - E[y~]

for one layer after the other, each fed by those that were corrected before it. One pass is enough for all of them,
because the samples are one batch: where a layer's means are known, nothing behind it has computed yet.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from qexp.quant.convert import fit_biases_, layers, quantizers, set_mode_
from qexp.quant.quantizer import Mode

Hook = Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]


@torch.no_grad()
def correct_biases_(model: nn.Module, inputs: Tensor, read: Tensor | None = None) -> tuple[list[str], list[str]]:
    """Correct the biases of a calibrated network in place; the names of its layers that were, and that were not.

    A layer without a bias gets one. One that is used more than once has as many means and one bias, which stays.
    `read` (N, T) says which positions anybody reads, so that padding has no say in the means of outputs (N, T, C).

    >>> from qexp.quant.convert import calibrating, quantize_
    >>> from qexp.quant.grid import IntegerGrid
    >>> from qexp.quant.recipe import Recipe, Scheme
    >>> net, x = nn.Sequential(nn.Linear(2, 1, bias=False)), torch.ones(8, 2)
    >>> net[0].weight = nn.Parameter(torch.tensor([[1.0, 0.3]]))
    >>> quantize_(net, Recipe(weight=Scheme(IntegerGrid(2))))  # to 1.0 and 0.0
    >>> with calibrating(net), torch.no_grad(): _ = net(x)
    >>> correct_biases_(net, x), round(net[0].bias.item(), 6)
    ((['0'], []), 0.3)
    """
    modes = {quantizer: quantizer.mode for quantizer in quantizers(model)}
    weighted = {layer: name for name, layer in layers(model) if hasattr(layer, "weight")}
    wanted: dict[nn.Module, Tensor] = {}
    uses: Counter[nn.Module] = Counter()

    def note(layer: nn.Module, _: tuple[Tensor, ...], y: Tensor) -> None:
        uses[layer] += 1
        wanted[layer] = _channel_means(layer, y, read)

    def correct(layer: nn.Module, x: tuple[Tensor, ...], y: Tensor) -> Tensor:
        shift = wanted[layer] - _channel_means(layer, y, read)
        # y was computed with Q(b): what b lost to rounding is a part of the shift.
        before = layer.bias_quantizer(layer.bias, layer.input_quantizer, layer.weight_quantizer)
        bias = shift if before is None else before.double() + shift
        # A new parameter, because another layer may share the old one.
        layer.bias = nn.Parameter(bias.to(layer.weight.dtype))
        return layer.forward(*x)

    set_mode_(model, Mode.OFF)
    try:
        with _hooked(weighted, note):
            model(inputs)
    finally:
        for quantizer, mode in modes.items():
            quantizer.mode = mode
    once = {layer: name for layer, name in weighted.items() if uses[layer] == 1}
    with _hooked(once, correct):
        model(inputs)
    fit_biases_(model)
    return list(once.values()), [name for layer, name in weighted.items() if layer not in once]


@contextmanager
def _hooked(layers: dict[nn.Module, str], hook: Hook) -> Iterator[None]:
    handles = [layer.register_forward_hook(hook) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _channel_means(layer: nn.Module, y: Tensor, read: Tensor | None) -> Tensor:
    """Mean of each output channel (C,) in float64, over samples and positions."""
    if isinstance(layer, nn.Conv2d):
        return y.mean((0, 2, 3), dtype=torch.float64)
    if read is not None and y.shape[:-1] == read.shape and bool(read.any()):
        y = y[read]
    return y.flatten(0, -2).mean(0, dtype=torch.float64)
