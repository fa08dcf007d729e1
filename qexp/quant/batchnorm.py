"""BatchNorm in quantization-aware training: folded anew in every pass, by the statistics of the batch or running ones.

mu_B, sigma_B are mean and standard deviation, sqrt(var + eps), of the float products of Q(x) and W in this batch;
mu, sigma are the running ones, W has no BatchNorm in it (Krishnamoorthi 2018, section 3.2.2, figures 14 and 15).

evaluation     y = Q(x) * Q(W gamma / sigma)   + Q(beta - mu gamma / sigma)
"batch"        y = Q(x) * Q(W gamma / sigma_B) + Q(beta - mu_B gamma / sigma_B)
"corrected"    y = Q(x) * Q(W gamma / sigma) sigma / sigma_B + beta - mu_B gamma / sigma_B

Both train a network normalised by its batches, "corrected" with weights that do not jitter; frozen, both train the
first line. Scales of weights are fixed, so in "batch" a channel of small sigma_B is clipped.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qexp.quant.convert import KINDS
from qexp.quant.dataflow import Dataflow
from qexp.quant.distributed import var_mean_of_batch
from qexp.quant.layers import QuantConv2d, QuantLinear

ARMS = ("batch", "corrected")


def _factor(norm: nn.Module, var: Tensor) -> Tensor:
    """gamma / sqrt(var + eps), (C,), in float64, so that folding rounds once."""
    factor = (var.double() + norm.eps).rsqrt()
    return factor if norm.weight is None else factor * norm.weight.double()


def _weight(layer: nn.Module, factor: Tensor) -> Tensor:
    """W factor, of the shape and type of W."""
    return (layer.weight.double() * _on_axis(factor, 0, layer.weight.dim())).to(layer.weight.dtype)


def _on_axis(values: Tensor, axis: int, dims: int) -> Tensor:
    """(C,) -> (1, ..., C, ..., 1), so that channels lie along this axis."""
    return values.view([-1 if d == axis else 1 for d in range(dims)])


def _bias(norm: nn.Module, centred: Tensor, factor: Tensor) -> Tensor:
    """(b - mean) factor + beta, (C,), of the type of mean; `centred` is b - mean in float64."""
    beta = 0.0 if norm.bias is None else norm.bias.double()
    return (centred * factor + beta).to(norm.running_mean.dtype)


def folded(layer: nn.Module, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias of the layer with the running statistics in them, to the bit those of `fold_batchnorm_`.

    W' = W gamma / sqrt(var + eps),  b' = (b - mean) gamma / sqrt(var + eps) + beta   (Jacob et al. 2018, eq. 14)

    Shapes: that of W, and (C,).

    >>> layer, norm = nn.Linear(2, 3, bias=False), nn.BatchNorm1d(3, eps=0.0)
    >>> torch.equal(folded(layer, norm)[0], layer.weight)  # of a new norm, mean is 0 and variance 1
    True
    """
    factor = _factor(norm, norm.running_var)
    centred = (0.0 if layer.bias is None else layer.bias.double()) - norm.running_mean.double()
    return _weight(layer, factor), _bias(norm, centred, factor)


class _Norm:
    """What a layer with its own BatchNorm `norm` does; `arm` is one of ARMS, `frozen` a buffer of one bool."""

    seen: list[tuple[Tensor, Tensor]] | None = None  # while statistics are estimated anew: those of each batch

    def forward(self, x: Tensor) -> Tensor:
        x = self.input_quantizer(x)
        by_batch = self.seen is not None or (self.training and not self.frozen)
        y = self._by_batch(x) if by_batch else self._quantized(x, *folded(self, self.norm))
        return self.output_quantizer(y)

    def _quantized(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        bias = self.bias_quantizer(bias, self.input_quantizer, self.weight_quantizer)
        return self._product(x, self.weight_quantizer(weight), bias)

    def _by_batch(self, x: Tensor) -> Tensor:
        mean, var, count = self._statistics(x)
        factor = _factor(self.norm, var)
        bias = _bias(self.norm, -mean.double(), factor)  # the layer's own bias would cancel
        y = self._quantized(x, _weight(self, factor), bias) if self.arm == "batch" else self._corrected(x, var, bias)
        self._track(mean.detach(), var.detach() * (count / (count - 1)))
        return y

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor, int]:
        """Mean and variance (C,) of the products without a bias, and how many values a channel has."""
        products = self._product(x, self.weight, None).to(self.weight.dtype)
        var, mean, count = var_mean_of_batch(products)
        if count == 1:
            raise ValueError(f"{self.weight_quantizer.site}: one value a channel has no variance, use a larger batch")
        return mean, var, count

    def _corrected(self, x: Tensor, var: Tensor, bias: Tensor) -> Tensor:
        running, eps = self.norm.running_var, self.norm.eps
        weight = self.weight_quantizer(_weight(self, _factor(self.norm, running)))
        correction = ((running.double() + eps) / (var.double() + eps)).sqrt().to(bias.dtype)
        return self._product(x, weight, None) * _on_axis(correction, 1, x.dim()) + _on_axis(bias, 1, x.dim())

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor) -> None:
        """Move the running statistics as nn.BatchNorm does, or note those of this batch."""
        mean = mean if self.bias is None else mean + self.bias
        if self.seen is not None:
            self.seen.append((mean, var))
            return
        self.norm.num_batches_tracked += 1
        momentum = 1 / int(self.norm.num_batches_tracked) if self.norm.momentum is None else self.norm.momentum
        self.norm.running_mean.lerp_(mean, momentum)
        self.norm.running_var.lerp_(var, momentum)


class QuantConvNorm2d(_Norm, QuantConv2d):
    """y = Q(x) * Q(W gamma / sigma) + ..., the BatchNorm `norm` folded in every pass; see the top of this file."""

    _product = QuantConv2d._conv_forward


class QuantLinearNorm(_Norm, QuantLinear):
    """y = Q(x) Q(W gamma / sigma)^T + ..., the BatchNorm `norm` folded in every pass; see the top of this file."""

    _product = staticmethod(F.linear)


UNFOLDED: dict[type, type] = {QuantConv2d: QuantConvNorm2d, QuantLinear: QuantLinearNorm}
REFOLDED = {unfolded: layer for layer, unfolded in UNFOLDED.items()}
KINDS.update({unfolded: KINDS[layer] for layer, unfolded in UNFOLDED.items()})


def norm_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All layers that hold their BatchNorm, with their names."""
    return ((name, layer) for name, layer in model.named_modules() if type(layer) in REFOLDED)


def unfold_batchnorm_(model: nn.Module, net: nn.Module, flow: Dataflow, arm: str) -> None:
    """Give every quantized layer of a folded model its BatchNorm back, to be trained by `arm`, "batch" or "corrected".

    y = Q(x) * Q(W gamma / sigma) + Q(beta - mu gamma / sigma)   (Krishnamoorthi 2018, section 3.2.2)

    `net` is the float network that was folded into `model`, `flow` its Dataflow. Evaluation stays the same to the
    bit, scales stay those of the folded weights, and parameters are new: an optimizer is made afterwards. Layers
    that stay in float stay folded. What reads a layer's weight (a calibration, an export) comes after
    `refold_batchnorm_`. Errors: ValueError for another arm, and naming a layer whose weights are not net's, folded.

    >>> from qexp.quant.convert import calibrating, fold_batchnorm_, quantize_
    >>> from qexp.quant.recipe import Recipe
    >>> net, x = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).eval(), torch.rand(4, 1, 5, 5)
    >>> model, flow = copy.deepcopy(net), Dataflow(net, x)
    >>> fold_batchnorm_(model, flow); quantize_(model, Recipe())
    >>> with calibrating(model), torch.no_grad(): _ = model(x)
    >>> expected, _ = model(x), unfold_batchnorm_(model, net, flow, "corrected")
    >>> type(model[0]).__name__, torch.equal(model(x), expected)
    ('QuantConvNorm2d', True)
    """
    if arm not in ARMS:
        raise ValueError(f"arm={arm!r}: must be one of {', '.join(ARMS)}")
    found = []
    for name, norm_name in flow.batchnorms().items():
        layer, source, norm = model.get_submodule(name), net.get_submodule(name), net.get_submodule(norm_name)
        if type(layer) in UNFOLDED and norm.running_var is not None:
            _require_folded(name, layer, source, norm)
            found.append((layer, source, norm))
    for layer, source, norm in found:
        _unfold_(layer, source, norm, arm)


@torch.no_grad()
def _require_folded(name: str, layer: nn.Module, source: nn.Module, norm: nn.Module) -> None:
    """Raise ValueError where unfolding would lose a change of the layer; devices may differ in a last bit."""
    pairs = zip(folded(source, norm), (layer.weight, layer.bias), strict=True)
    if not all(b is not None and a.shape == b.shape and torch.allclose(a.to(b), b, rtol=1e-6) for a, b in pairs):
        raise ValueError(f"layer {name!r}: its weights are not those of net with {type(norm).__name__} folded in")


def _unfold_(layer: nn.Module, source: nn.Module, norm: nn.Module, arm: str) -> None:
    device = layer.weight.device
    for name in "weight", "bias":
        value = getattr(source, name)
        setattr(layer, name, None if value is None else nn.Parameter(value.detach().to(device, copy=True)))
    layer.norm = copy.deepcopy(norm).to(device).requires_grad_(True).train(layer.training)
    layer.arm = arm
    layer.register_buffer("frozen", torch.tensor(False, device=device))
    layer.__class__ = UNFOLDED[type(layer)]


def freeze_batchnorm_(model: nn.Module) -> None:
    """From now on train with the running statistics as they are, whatever `train()` is called (section 3.2.2).

    y = Q(x) * Q(W gamma / sigma) + Q(beta - mu gamma / sigma), which copies and state_dicts keep.

    >>> freeze_batchnorm_(nn.Linear(1, 1))  # nothing to freeze
    """
    for _, layer in norm_layers(model):
        layer.frozen.fill_(True)


@torch.no_grad()
def refold_batchnorm_(model: nn.Module) -> None:
    """Turn every layer with a BatchNorm into an exact QuantConv2d or QuantLinear; evaluation stays the same to the bit.

    W' = W gamma / sqrt(var + eps),  b' = (b - mean) gamma / sqrt(var + eps) + beta   (Jacob et al. 2018, eq. 14)

    >>> refold_batchnorm_(nn.Linear(1, 1))  # nothing to fold
    """
    for _, layer in list(norm_layers(model)):
        weight, bias = folded(layer, layer.norm)
        layer.__class__ = REFOLDED[type(layer)]
        layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)
        del layer.norm, layer.frozen, layer.arm


@torch.no_grad()
def reestimate_batchnorm_(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Replace running statistics by means over `batches` of images, as momentum=None of nn.BatchNorm does.

    mu = mean_i mu_i,  sigma^2 = mean_i var_i M_i / (M_i - 1) + eps,  M_i the values a channel has in batch i

    Sites do what their modes say, layers normalise by the batch as their arm does, frozen or not, and all else
    (dropout, random rounding) is as in evaluation. Errors: ValueError without batches, and naming a layer that sees
    one value a channel; after any error the model is as it was.

    >>> reestimate_batchnorm_(nn.Linear(1, 1), [torch.zeros(2, 1)])  # nothing to estimate
    """
    training = {module: module.training for module in model.modules()}
    found = [layer for _, layer in norm_layers(model)]
    for layer in found:
        layer.seen = []
    try:
        model.eval()
        for images in batches:
            model(images)
        if found and not any(layer.seen for layer in found):
            raise ValueError("batches: none has reached a layer with a BatchNorm")
        for norm, seen in ((layer.norm, layer.seen) for layer in found if layer.seen):
            mean, var = (torch.stack(values).double().mean(0) for values in zip(*seen, strict=True))
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(var)
            norm.num_batches_tracked.fill_(len(seen))
    finally:
        for layer in found:
            del layer.seen
        for module, was in training.items():
            module.training = was
