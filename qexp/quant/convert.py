"""From a float model to a quantized one: fold BatchNorm, swap layers, calibrate."""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from qexp.quant.dataflow import Dataflow
from qexp.quant.granularity import PerTensor
from qexp.quant.layers import (
    Add,
    BiasQuantizer,
    Int32,
    MatMul,
    QuantAdaptiveAvgPool2d,
    QuantAdd,
    QuantConv2d,
    QuantLinear,
    QuantMatMul,
    QuantScaledLinear,
    ScaledLinear,
)
from qexp.quant.observers import Observer, State
from qexp.quant.quantizer import Mode, Quantizer
from qexp.quant.recipe import Recipe, Scheme

Shapes = dict[str, tuple[int, ...]]  # site -> shape of what arrives there, the batch being 1

# float layer -> (quantized layer, its activation sites). A new quantized layer is one class and one row here.
QUANTIZED: dict[type, tuple[type, tuple[str, ...]]] = {
    nn.Conv2d: (QuantConv2d, ("input", "output")),
    nn.Linear: (QuantLinear, ("input", "output")),
    ScaledLinear: (QuantScaledLinear, ("input", "output")),
    Add: (QuantAdd, ("a", "b", "output")),
    MatMul: (QuantMatMul, ("a", "b")),
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


def quantize_(
    model: nn.Module,
    recipe: Recipe,
    outputs: tuple[str, ...] = (),
    logits: str | None = None,
    shapes: Shapes | None = None,
    in_float: Collection[str] = (),
) -> None:
    """Turn layers into their quantized counterparts, in place; `outputs` names those quantized at their output too.

    `in_float` names layers that stay as they are, being none that an engine runs on integers. `logits` names the layer
    whose output is quantized by `recipe.logits`. `shapes` (from `sites.site_shapes`) is needed where activations have
    more than one stored scale. A layer stays the same object: its parameters, hooks and state_dict keys survive.
    Errors: ValueError naming a layer that multiplies by weights and has no quantized counterpart, blocks that do not
    fit, and patterns of `exclude` that match nothing.
    """
    refuse_unquantizable(model, recipe, shapes, in_float)
    for name, module in [(name, module) for name, module in targets(model, recipe) if name not in in_float]:
        kind, sites = QUANTIZED[type(module)]
        module.__class__ = kind
        for site in sites:
            setattr(module, f"{site}_quantizer", nn.Identity())
            if site != "output" or name in outputs:
                scheme = recipe.activation_of(f"{name}.{site}", kind is QuantMatMul)
                _add_quantizer(module, f"{name}.{site}", scheme, shapes)
        if hasattr(module, "weight"):
            module.weight_quantizer = Quantizer(
                recipe.weight_of(name), module.weight.shape, f"{name}.weight", is_weight=True
            )
            module.bias_quantizer = BiasQuantizer()
    if logits is not None:
        layer = model.get_submodule(logits)
        _add_quantizer(layer, f"{logits}.output", recipe.logits_scheme, {f"{logits}.output": (1, len(layer.weight))})
    for _, layer in layers(model):
        layer.train(layer.training)  # in a network that is evaluated, a random rounding draws once


def _add_quantizer(module: nn.Module, site: str, scheme: Scheme, shapes: Shapes | None) -> None:
    """A quantizer for one activation; where one scale serves all, its shape is nobody's business."""
    needed = scheme.calibration.needs_rows or scheme.granularity != PerTensor()
    shape = (shapes or {}).get(site, ()) if needed else ()
    setattr(module, f"{site.rpartition('.')[2]}_quantizer", Quantizer(scheme, shape, site))


def targets(model: nn.Module, recipe: Recipe) -> Iterator[tuple[str, nn.Module]]:
    """The layers that `quantize_` turns into quantized ones, with their names."""
    named = model.named_modules()
    return ((name, module) for name, module in named if type(module) in QUANTIZED and not recipe.excludes(name))


def refuse_unquantizable(
    model: nn.Module, recipe: Recipe, shapes: Shapes | None = None, in_float: Collection[str] = ()
) -> None:
    """Raise ValueError for what `quantize_` could not do, naming the layer; costs no compute."""
    names = [name for name, _ in model.named_modules() if name]
    for key, patterns in ("exclude", recipe.exclude), ("layers", [pattern for pattern, _ in recipe.layers]):
        for pattern in patterns:
            if not fnmatch.filter(names, pattern):
                raise ValueError(f"{key}={pattern!r}: matches no layer of {type(model).__name__}")
    for name, module in model.named_modules():
        if recipe.excludes(name):
            continue
        if isinstance(module, nn.MultiheadAttention):
            raise ValueError(
                f"layer {name!r} is nn.MultiheadAttention, which computes past its own sub-modules: "
                "write attention with nn.Linear and MatMul, as qexp.models.encoder does, or exclude the layer"
            )
        matrices = [p for p in module.parameters(recurse=False) if p.dim() >= 2]
        # A module that holds others may own a parameter, such as the positions of a transformer. Where additions
        # became modules, such a module is an nn.Module and no more.
        known = type(module).__module__.startswith("torch.nn.") and type(module) is not nn.Module
        is_layer = known or not any(True for _ in module.children())
        if name and is_layer and matrices and type(module) not in QUANTIZED and not isinstance(module, LOOKUPS):
            raise ValueError(
                f"layer {name!r} is a {type(module).__name__}, which has weights but no quantized counterpart: "
                f"exclude it, or use one of {', '.join(kind.__name__ for kind in QUANTIZED)}"
            )
    found = [(name, module) for name, module in targets(model, recipe) if name not in in_float]
    if not any(hasattr(module, "weight") for _, module in found):
        if recipe.exclude:
            raise ValueError(f"exclude={list(recipe.exclude)}: leaves no layer of {type(model).__name__} to quantize")
        known = ", ".join(kind.__name__ for kind in QUANTIZED)
        raise ValueError(f"{type(model).__name__} has no layer to quantize; known are {known}")
    for name, module in found:
        if hasattr(module, "weight"):
            _require_blocks(f"{name}.weight", recipe.weight_of(name), module.weight.shape)
        for site in QUANTIZED[type(module)][1]:
            # Of linear layers only logits are quantized at the output, by one scale.
            if f"{name}.{site}" in (shapes or {}) and (site != "output" or not isinstance(module, nn.Linear)):
                scheme = recipe.activation_of(f"{name}.{site}", isinstance(module, MatMul))
                _require_blocks(f"{name}.{site}", scheme, shapes[f"{name}.{site}"])


def _require_blocks(site: str, scheme: Scheme, shape: tuple[int, ...]) -> None:
    try:
        scheme.granularity.param_shape(tuple(shape))
    except ValueError as error:
        raise ValueError(f"{site}: {error}") from None


def unquantized(
    model: nn.Module, recipe: Recipe, folded: bool = True, uncalled: Collection[str] = ()
) -> list[tuple[str, str, str]]:
    """Every layer with parameters that stays in float, as (name, kind, reason); `folded`: BatchNorm where it can be."""
    rows = []
    for name, module in model.named_modules():
        if type(module) in KINDS or not any(True for _ in module.parameters(recurse=False)):
            continue
        if recipe.excludes(name):
            reason = "excluded by quantizer.exclude"
        elif name in uncalled:
            reason = "is never called"
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            cannot = "no convolution or linear layer feeds it alone, so it cannot be folded"
            reason = cannot if folded else "left beside its layer by fold_batchnorm=false"
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
            if quantizer in weights:
                quantizer.mode = Mode.OFF
                quantizer.calibrate(weights[quantizer].detach())
            else:
                quantizer.start_observing()
        yield model
        for quantizer in modes:
            if quantizer not in weights:
                quantizer.calibrate()
        fit_biases_(model)
    except BaseException:
        for quantizer, mode in modes.items():
            quantizer.mode = mode
            quantizer.load_state_dict(before[quantizer])
            quantizer.observer = None
        raise
    set_mode_(model, Mode.QUANTIZE)


def observing(model: nn.Module) -> dict[str, Observer]:
    """Inside `calibrating`: the observers that wait for data, by their sites and by what is asked of them."""
    waiting = (quantizer for quantizer in quantizers(model) if quantizer.mode is Mode.OBSERVE)
    return {f"{quantizer.site}: {quantizer.observer.key}": quantizer.observer for quantizer in waiting}


def recall_(model: nn.Module, seen: dict[str, State]) -> None:
    """Inside `calibrating`: sites that an earlier pass over the same data has `seen` need not look again."""
    observers = observing(model)
    found = {observer: seen[key] for key, observer in observers.items() if key in seen}
    for quantizer in quantizers(model):
        if quantizer.observer in found:
            quantizer.observer.load(found[quantizer.observer])
            quantizer.mode = Mode.OFF


@torch.no_grad()
def fit_biases_(model: nn.Module) -> None:
    """Widen the weight range of nearly dead channels until their bias fits the int32 grid of S_x S_w."""
    for _, layer in layers(model):
        if getattr(layer, "bias", None) is None or not layer.bias_quantizer.has_grid(layer):
            continue
        quantizer = layer.weight_quantizer
        # S_x S_w stays a normal number, also without a bias.
        unit = layer.input_quantizer.product_scale * quantizer.grid.step
        needed = (layer.bias.detach().abs() / Int32.quant_max).clamp(min=2.0**-126) / unit
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
                site.prepare_export(layer.weight.detach() if site.is_weight else None)
        quantized = getattr(layer, "bias", None) is not None and layer.input_quantizer.mode is Mode.QUANTIZE
        if quantized and not layer.input_quantizer.dynamic:
            layer.bias_quantizer.prepare_export(layer.bias.detach(), layer.input_quantizer, layer.weight_quantizer)
    for quantizer in quantizers(model):
        if quantizer.mode is Mode.QUANTIZE:
            quantizer.mode = Mode.EXPORT
