"""SmoothQuant: channels in which activations are large become small, and the weights that read them large.

Outliers of transformers live in few channels, the same for all tokens, and spoil the one scale of an activation
tensor; weights have room. The network computes the same, so this comes before quantization (Xiao et al. 2023,
arXiv 2211.10438):

Y = (X diag(s)^-1) (diag(s) W) = X' W',   s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)        (eq. 3 and 4)

s goes into the columns of all linear layers that read X, and 1/s into the LayerNorm that writes it. Where a residual
connection reads X, too, as in every encoder with the norm behind the sum, its `Add` multiplies by s. Further than the
paper goes what is done on demand: any other linear layer, as behind GELU or attention, multiplies X by 1/s itself.
(Attention mixes tokens and no channels, so that the layer of values could take the 1/s of its output layer; but values
that are quantized themselves lose more by it than the layer gains.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qexp.quant.calibration import MinMax
from qexp.quant.layers import multiply_in_front_
from qexp.quant.observers import RowSample
from qexp.quant.quantizer import Mode, Quantizer
from qexp.quant.recipe import Recipe, Scheme
from qexp.quant.smooth_groups import Group, Smoothed

# Maxima below are taken for this, so that a nearly dead channel makes no factor that float32 cannot undo.
LEAST = 1e-5


class Seen(nn.Module):
    """What a calibration pass saw of X: extremes of each channel (2, C) and, where wanted, some tokens.

    >>> seen = Seen(2); seen.update(torch.tensor([[1.0, -4.0], [2.0, 3.0]])); seen.extremes, seen.largest
    (tensor([[ 1., -4.],
            [ 2.,  3.]]), tensor([2., 4.]))
    """

    def __init__(self, channels: int, rows: int = 0) -> None:
        super().__init__()
        self.register_buffer("extremes", torch.tensor([[math.inf], [-math.inf]]).repeat(1, channels))
        self.sample = RowSample(channels, rows) if rows else None

    @property
    def largest(self) -> Tensor:
        """max|X_j| of each channel (C,)."""
        return self.extremes.abs().amax(0)

    def update(self, x: Tensor) -> None:
        """Take in tokens (..., C). Errors: ValueError for NaN or infinity."""
        x = x.detach().float().reshape(-1, self.extremes.shape[1])
        lowest, highest = x.amin(0), x.amax(0)
        if not bool((lowest.isfinite() & highest.isfinite()).all()):
            raise ValueError("holds NaN or infinite values")
        self.extremes.copy_(torch.stack([self.extremes[0].minimum(lowest), self.extremes[1].maximum(highest)]))
        if self.sample is not None:
            self.sample.update(x)

    def rows(self) -> Tensor:
        """The tokens (R, C) that were kept."""
        return self.sample.rows()


@contextmanager
def observing_inputs(model: nn.Module, groups: Sequence[Group], rows: int = 0) -> Iterator[dict[str, Seen]]:
    """What arrives at these groups inside the block, by the first layer of each; `rows` tokens of each are kept.

    Errors: ValueError naming an input with NaN or infinite values.
    """
    layers = {group.layers[0]: model.get_submodule(group.layers[0]) for group in groups}
    seen = {name: Seen(layer.in_features, rows) for name, layer in layers.items()}

    def look(name: str):
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            try:
                seen[name].update(inputs[0])
            except ValueError as error:
                raise ValueError(f"{name}.input: {error}") from None

        return hook

    hooks = [layer.register_forward_pre_hook(look(name)) for name, layer in layers.items()]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def factors(activations: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """s of each channel, in float64: s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)  (Xiao et al. 2023, eq. 4).

    Shapes: maxima of activations and weights (C,), s (C,). alpha = 1 leaves all channels of activations equally large,
    alpha = 0 those of weights. A channel that is zero in either has s = 1: nothing is there to be moved.

    >>> factors(torch.tensor([16.0, 1.0, 0.0]), torch.tensor([1.0, 4.0, 1.0]), 0.5).tolist()
    [4.0, 0.5, 1.0]
    """
    activations, weights = activations.double(), weights.double()
    s = activations.clamp(min=LEAST) ** alpha / weights.clamp(min=LEAST) ** (1 - alpha)
    return s.clamp(min=LEAST).where((activations > 0) & (weights > 0), 1.0)


@torch.no_grad()
def noise(
    rows: Tensor, weights: Sequence[Tensor], s: Tensor, schemes: Sequence[tuple[Scheme, Scheme]],
    extremes: Tensor | None = None,
) -> float:  # fmt: skip
    """Squared error of all layers of a group: sum over W of ||X W^T - Q(X / s) Q(W s)^T||^2.

    `schemes` are those of the input and the weight of each layer. A static range of activations is that of these
    tokens; where it is min-max, of the `extremes` of each channel, too, which other tokens have. Shapes: rows (R, C),
    each W (out, C), s (C,), extremes (2, C).

    >>> noise(torch.eye(2), [torch.eye(2)], torch.ones(2), [(Scheme(), Scheme())])
    0.0
    """
    s, total = s.float(), 0.0
    beyond = None if extremes is None else extremes / s
    quantized = {scheme: _quantized_input(rows / s, scheme, beyond) for scheme in {scheme for scheme, _ in schemes}}
    for weight, (of_input, of_weight) in zip(weights, schemes, strict=True):
        product = F.linear(quantized[of_input], _quantized_weight(weight * s, of_weight))
        total += float((F.linear(rows, weight) - product).double().square().sum())
    return total


def _quantized_input(rows: Tensor, scheme: Scheme, beyond: Tensor | None) -> Tensor:
    x = rows.unsqueeze(0)  # (N, T, C), as in the network
    quantizer = Quantizer(scheme, tuple(x.shape), "smoothed").eval()
    if not quantizer.dynamic:
        quantizer.start_observing()
        quantizer(x)
        # Any other calibration asks how often a value is seen, which of extremes is not known.
        if beyond is not None and scheme.calibration == MinMax():
            quantizer(beyond.unsqueeze(0))
        quantizer.calibrate()
    quantizer.mode = Mode.QUANTIZE
    return quantizer(x).squeeze(0)


def _quantized_weight(weight: Tensor, scheme: Scheme) -> Tensor:
    quantizer = Quantizer(scheme, tuple(weight.shape), "smoothed", is_weight=True).eval()
    quantizer.calibrate(weight)
    quantizer.mode = Mode.QUANTIZE
    return quantizer(weight)


@torch.no_grad()
def smooth_(
    model: nn.Module, groups: Sequence[Group], seen: dict[str, Seen], recipe: Recipe, alphas: Sequence[float] = (0.5,)
) -> list[Smoothed]:
    """Smooth the groups of a network in place; it computes the same. Of several alphas each group takes its best.

    The best has the least `noise` on the tokens that were seen, and the smallest of equals is taken. Layers that the
    recipe excludes have a say neither in max|W_j| nor in the noise; where it excludes all, the group stays as it is.

    >>> from qexp.quant.dataflow import Dataflow
    >>> from qexp.quant.smooth_groups import find_groups
    >>> net, x = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2)).eval(), torch.randn(8, 4)
    >>> before, (groups, _) = net(x), find_groups(net, Dataflow(net, x))
    >>> with observing_inputs(net, groups) as seen, torch.no_grad(): _ = net(x)
    >>> (row,) = smooth_(net, groups, seen, Recipe(), [1.0])
    >>> torch.allclose(net(x), before, atol=1e-6), bool((net[0](x).abs().amax(0) - 1).abs().max() < 1e-6)
    (True, True)
    """
    rows = []
    for group in groups:
        counted = [name for name in group.layers if not recipe.excludes(name)]
        if not counted:
            rows.append(Smoothed(group.norm, group.layers, reason="all of its layers are excluded"))
            continue
        known, weights = seen[group.layers[0]], [model.get_submodule(name).weight for name in counted]
        of_weights, largest = torch.stack([w.abs().amax(0) for w in weights]).amax(0), known.largest
        candidates = {alpha: factors(largest, of_weights, alpha) for alpha in alphas}
        sqnr_db = _compared(known, weights, candidates, recipe, counted) if len(candidates) > 1 else {}
        alpha = max(sqnr_db, key=sqnr_db.get) if sqnr_db else alphas[0]
        s = candidates[alpha]
        _fold_(model, group, s)
        outliers = _outlier_ratio(largest.double()), _outlier_ratio(largest.double() / s)
        rows.append(Smoothed(group.norm, group.layers, group.how, alpha, float(s.max()), outliers, sqnr_db))
    return rows


def _compared(
    seen: Seen, weights: list[Tensor], candidates: dict[float, Tensor], recipe: Recipe, names: list[str]
) -> dict[float, float]:
    """SQNR of the outputs of a group in decibels, by alpha."""
    rows = seen.rows()
    schemes = [(recipe.activation_of(f"{name}.input"), recipe.weight_of(name)) for name in names]
    signal = sum(float(F.linear(rows, weight).double().square().sum()) for weight in weights)
    errors = {alpha: noise(rows, weights, s, schemes, seen.extremes) for alpha, s in candidates.items()}
    return {alpha: 10 * math.log10(signal / error) if error and signal else math.inf for alpha, error in errors.items()}


def _outlier_ratio(largest: Tensor) -> float:
    """max|X_j| of the largest channel over that of the median one; infinite where half of all are dead."""
    median = float(largest.median())
    return float(largest.max()) / median if median else math.inf


def _fold_(model: nn.Module, group: Group, s: Tensor) -> None:
    """Put s into the readers and 1/s before them. Parameters are new, because another module may share the old ones."""
    for layer in map(model.get_submodule, group.layers):
        layer.weight = nn.Parameter((layer.weight.double() * s).to(layer.weight.dtype))
        if not group.norm:
            multiply_in_front_(layer, (1 / s).to(layer.weight.dtype))
    if group.norm:
        norm = model.get_submodule(group.norm)
        for name in "weight", "bias":
            if (values := getattr(norm, name)) is not None:
                setattr(norm, name, nn.Parameter((values.double() / s).to(values.dtype)))
    for side in group.sides:
        name, _, which = side.rpartition(".")
        add = model.get_submodule(name)
        before = getattr(add, f"{which}_factor")
        setattr(add, f"{which}_factor", s.to(norm.weight.dtype) if before is None else (s * before).to(before.dtype))
