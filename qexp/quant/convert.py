"""From a float model to a quantized one: fold BatchNorm, swap layers, calibrate."""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from qexp.quant.dataflow import Dataflow
from qexp.quant.layers import (
    Add,
    BiasQuantizer,
    Int32,
    QuantAdaptiveAvgPool2d,
    QuantAdd,
    QuantConv2d,
    QuantLinear,
)
from qexp.quant.quantizer import Mode, Quantizer
from qexp.quant.recipe import Recipe

# float layer -> (quantized layer, its activation sites). A new quantized layer is one class and one row here.
QUANTIZED: dict[type, tuple[type, tuple[str, ...]]] = {
    nn.Conv2d: (QuantConv2d, ("input", "output")),
    nn.Linear: (QuantLinear, ("input", "output")),
    Add: (QuantAdd, ("a", "b", "output")),
    nn.AdaptiveAvgPool2d: (QuantAdaptiveAvgPool2d, ("input",)),
}
KINDS = {quantized: kind.__name__ for kind, (quantized, _) in QUANTIZED.items()}
# Layers whose weights are no matrix product: they stay in float and are listed so.
LOOKUPS = (nn.Embedding, nn.EmbeddingBag)


def fold_batchnorm_(model: nn.Module, flow: Dataflow) -> None:
    """Fold every BatchNorm that follows a convolution or linear layer into it.

    W' = W gamma / sqrt(var + eps),  b' = (b - mean) gamma / sqrt(var + eps) + beta   (Jacob et al. 2018, eq. 14)
    """
    for name, norm_name in flow.batchnorms().items():
        layer, norm = model.get_submodule(name), model.get_submodule(norm_name)
        if norm.running_var is None:
            continue
        with torch.no_grad():
            # float64, so that folding rounds once and not five times.
            factor = (norm.running_var.double() + norm.eps).rsqrt()
            if norm.weight is not None:
                factor = factor * norm.weight.double()
            bias = (
                -norm.running_mean.double() if layer.bias is None else layer.bias.double() - norm.running_mean.double()
            )
            bias = bias * factor + (norm.bias.double() if norm.bias is not None else 0.0)
            shape = (-1, *[1] * (layer.weight.dim() - 1))
            # A new parameter, because another layer may share the old one.
            layer.weight = nn.Parameter((layer.weight.double() * factor.view(shape)).to(layer.weight.dtype))
            layer.bias = nn.Parameter(bias.to(layer.weight.dtype))
        parent, _, child = norm_name.rpartition(".")
        setattr(model.get_submodule(parent), child, nn.Identity())


def quantize_(model: nn.Module, recipe: Recipe, outputs: tuple[str, ...] = ()) -> None:
    """Turn layers into their quantized counterparts, in place; `outputs` names those quantized at their output too.

    A layer stays the same object: its parameters, hooks and state_dict keys survive. Errors: ValueError naming a
    layer that multiplies by weights and has no quantized counterpart, and patterns of `exclude` that match nothing.
    """
    refuse_unquantizable(model, recipe)
    targets = [(n, m) for n, m in model.named_modules() if type(m) in QUANTIZED and not recipe.excludes(n)]
    if not any(hasattr(m, "weight") for _, m in targets):
        raise ValueError(f"{type(model).__name__} has no layer to quantize; known are {', '.join(KINDS.values())}")
    for name, module in targets:
        kind, sites = QUANTIZED[type(module)]
        module.__class__ = kind
        for site in sites:
            wanted = site != "output" or name in outputs
            quantizer = Quantizer(recipe.activation, site=f"{name}.{site}") if wanted else nn.Identity()
            setattr(module, f"{site}_quantizer", quantizer)
        if hasattr(module, "weight"):
            module.weight_quantizer = Quantizer(recipe.weight, module.weight.shape, site=f"{name}.weight")
            module.bias_quantizer = BiasQuantizer()


def refuse_unquantizable(model: nn.Module, recipe: Recipe) -> None:
    """Raise ValueError for what `quantize_` could not do; costs no compute."""
    names = [name for name, _ in model.named_modules() if name]
    for pattern in recipe.exclude:
        if not fnmatch.filter(names, pattern):
            raise ValueError(f"exclude={pattern!r}: matches no layer of {type(model).__name__}")
    for name, module in model.named_modules():
        if recipe.excludes(name):
            continue
        if isinstance(module, nn.MultiheadAttention):
            raise ValueError(
                f"layer {name!r} is nn.MultiheadAttention, which computes past its own sub-modules: "
                "write attention with nn.Linear, or exclude the layer"
            )
        matrices = [p for p in module.parameters(recurse=False) if p.dim() >= 2]
        # A module that holds others may own a parameter, such as the positions of a transformer.
        is_layer = type(module).__module__.startswith("torch.nn.") or not any(True for _ in module.children())
        if name and is_layer and matrices and type(module) not in QUANTIZED and not isinstance(module, LOOKUPS):
            raise ValueError(
                f"layer {name!r} is a {type(module).__name__}, which has weights but no quantized counterpart: "
                f"exclude it, or use one of {', '.join(kind.__name__ for kind in QUANTIZED)}"
            )


def unquantized(model: nn.Module, recipe: Recipe) -> list[tuple[str, str, str]]:
    """Every layer with parameters that stays in float, as (name, kind, reason)."""
    rows = []
    for name, module in model.named_modules():
        if type(module) in KINDS or not any(True for _ in module.parameters(recurse=False)):
            continue
        if recipe.excludes(name):
            reason = "excluded by quantizer.exclude"
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            reason = "no convolution or linear layer feeds it alone, so it cannot be folded"
        elif isinstance(module, LOOKUPS):
            reason = "a lookup, no matrix product"
        elif any(True for _ in module.children()):
            names = ", ".join(parameter for parameter, _ in module.named_parameters(recurse=False))
            reason = f"parameters outside of its layers: {names}"
        else:
            reason = "works element by element"
        rows.append((name or "(the model itself)", type(module).__name__, reason))
    return rows


def quantizers(model: nn.Module) -> Iterator[Quantizer]:
    """All quantization sites in the order of the modules."""
    return (module for module in model.modules() if isinstance(module, Quantizer))


def layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All quantized layers with their names."""
    return ((name, module) for name, module in model.named_modules() if type(module) in KINDS)


def set_mode_(model: nn.Module, mode: Mode) -> None:
    """Put every calibrated or still uncalibrated site into one mode."""
    for quantizer in quantizers(model):
        quantizer.mode = mode


@contextmanager
def calibrating(model: nn.Module) -> Iterator[nn.Module]:
    """Observe activations inside the block; ranges are fixed and quantization is on when it ends.

    An error inside the block restores all modes and forgets what was observed. Errors: ValueError naming a site
    that saw no data, NaN or infinity.
    """
    modes = {quantizer: quantizer.mode for quantizer in quantizers(model)}
    weights = {layer.weight_quantizer: layer.weight for _, layer in layers(model) if hasattr(layer, "weight_quantizer")}
    before = {quantizer: copy.deepcopy(quantizer.state_dict()) for quantizer in modes}
    try:
        for quantizer in modes:
            quantizer.mode = Mode.OFF if quantizer in weights else Mode.OBSERVE
        for quantizer, weight in weights.items():
            quantizer.calibrate(weight.detach())
        yield model
        for quantizer in modes:
            if quantizer not in weights:
                quantizer.calibrate()
        _fit_biases_(model)
    except BaseException:
        for quantizer, mode in modes.items():
            quantizer.mode = mode
            quantizer.load_state_dict(before[quantizer])
            quantizer.observer.reset()
        raise
    set_mode_(model, Mode.QUANTIZE)


def _fit_biases_(model: nn.Module) -> None:
    """Widen the weight range of nearly dead channels until their bias fits the int32 grid of S_x S_w."""
    for _, layer in layers(model):
        if getattr(layer, "bias", None) is None or not isinstance(layer.input_quantizer, Quantizer):
            continue
        quantizer = layer.weight_quantizer
        # S_x S_w stays a normal number, also without a bias.
        needed = (layer.bias.detach().abs() / Int32.quant_max).clamp(min=2.0**-126) / layer.input_quantizer.scale
        needed = needed.amax() if quantizer.scale.numel() == 1 else needed.view(quantizer.scale.shape)
        # A channel of zeros has the scale that its bias needs.
        scale = quantizer.scale.where(quantizer.lo.ne(0) | quantizer.hi.ne(0), quantizer.scale.new_zeros(()))
        # Codes are q = round(w / S) + Z whatever S is, so only S grows; a dead channel's codes stay at Z.
        quantizer.scale.copy_(scale.maximum((needed * (1 + 1e-6)).clamp(2.0**-126)))


def prepare_export_(model: nn.Module) -> None:
    """Put a calibrated model into the form that torch's ONNX exporter reads; sites that are off stay out of it."""
    for _, layer in layers(model):
        for site in layer.children():
            if isinstance(site, Quantizer) and site.mode is Mode.QUANTIZE:
                site.prepare_export(layer.weight.detach() if site.shape else None)
        if getattr(layer, "bias", None) is not None and layer.input_quantizer.mode is Mode.QUANTIZE:
            layer.bias_quantizer.prepare_export(layer.bias.detach(), layer.input_quantizer, layer.weight_quantizer)
    for quantizer in quantizers(model):
        if quantizer.mode is Mode.QUANTIZE:
            quantizer.mode = Mode.EXPORT
