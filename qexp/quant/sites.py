"""What arrives at the quantization sites of a network: shapes, and which sites read one tensor."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qexp.quant.convert import QUANTIZED, Shapes, quantizers
from qexp.quant.quantizer import Mode, Quantizer


@torch.no_grad()
def site_shapes(model: nn.Module, images: Tensor) -> Shapes:
    """Shape of what arrives at each activation site, for one sample; `model` is in evaluation mode and runs once."""
    shapes: Shapes = {}

    def record(name: str, sites: tuple[str, ...]):
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            arriving = dict(zip(sites, inputs, strict=False)) | {"output": output}
            shapes.update({f"{name}.{site}": (1, *x.shape[1:]) for site, x in arriving.items()})

        return hook

    hooks = [
        module.register_forward_hook(record(name, QUANTIZED[type(module)][1]))
        for name, module in model.named_modules()
        if type(module) in QUANTIZED
    ]
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return shapes


@torch.no_grad()
def same_tensor(model: nn.Module, images: Tensor) -> list[list[Quantizer]]:
    """Activation sites that read one and the same tensor, in groups; sites alone are groups of one."""
    arrived: list[tuple[Tensor, list[Quantizer]]] = []  # tensors are kept, or another could take the place of one

    def note(quantizer: Quantizer, inputs: tuple[Tensor, ...]) -> None:
        for tensor, group in arrived:
            if tensor is inputs[0]:
                group.append(quantizer)
                return
        arrived.append((inputs[0], [quantizer]))

    sites = [quantizer for quantizer in quantizers(model) if not quantizer.is_weight]
    modes = [quantizer.mode for quantizer in sites]
    hooks = [quantizer.register_forward_pre_hook(note) for quantizer in sites]
    training = {module: module.training for module in model.modules()}
    try:
        for quantizer in sites:
            quantizer.mode = Mode.OFF
        model.eval()(images)
    finally:
        for hook in hooks:
            hook.remove()
        for quantizer, mode in zip(sites, modes, strict=True):
            quantizer.mode = mode
        for module, was in training.items():
            module.training = was
    return [group for _, group in arrived]
