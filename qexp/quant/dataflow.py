"""What feeds what in a model, read from its exported ATen graph; names are those of `model.named_modules()`."""

from __future__ import annotations

import io
import itertools
import logging
import math
import warnings
from contextlib import redirect_stderr

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from qexp.quant.layers import Add, MatMul, ScaledLinear

aten = torch.ops.aten
CONVOLUTIONS = (aten.conv2d.default, aten.conv2d.padding)
OTHER_CONVOLUTIONS = {
    aten.conv1d.default: "conv1d",
    aten.conv1d.padding: "conv1d",
    aten.conv3d.default: "conv3d",
    aten.conv3d.padding: "conv3d",
}
TRANSPOSED = {
    aten.conv_transpose1d.default: "conv_transpose1d", aten.conv_transpose2d.input: "conv_transpose2d",
    aten.conv_transpose3d.input: "conv_transpose3d",
}  # fmt: skip
LAYERS = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, MatMul,
)  # fmt: skip
BATCHNORMS = (aten.batch_norm.default,)
ADDITIONS = (aten.add.Tensor, aten.add_.Tensor)
PRODUCTS = {
    **dict.fromkeys(CONVOLUTIONS, "conv2d"), aten.linear.default: "linear", aten.matmul.default: "matmul",
    aten.bmm.default: "bmm", aten.scaled_dot_product_attention.default: "scaled_dot_product_attention",
    **OTHER_CONVOLUTIONS, **TRANSPOSED,
}  # fmt: skip
# Operators that an engine fuses into the layer before them, drops at inference, or runs on codes.
TRANSPARENT = (
    *BATCHNORMS, aten.relu.default, aten.relu_.default, aten.hardtanh.default, aten.hardtanh_.default,
    aten.clamp.default, aten.dropout.default, aten.max_pool2d.default,
)  # fmt: skip

NORMALISATIONS = (aten.layer_norm.default, aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)
# Values of one sign, or nearly: half of a symmetric grid would stand for nothing.
ONE_SIDED = (
    aten.softmax.int, aten._softmax.default, aten._safe_softmax.default, aten.relu.default, aten.relu_.default,
    aten.gelu.default, aten.silu.default, aten.sigmoid.default, aten.hardtanh.default,
)  # fmt: skip
# Operators that move values and change none.
MOVES = (
    aten.view.default, aten.reshape.default, aten.transpose.int, aten.permute.default, aten.dropout.default,
    aten.flatten.using_ints, aten.unflatten.int, aten.contiguous.default, aten.expand.default, aten.clone.default,
)  # fmt: skip


class NotExportable(ValueError):
    """The model has no static graph, so no engine can run it; the message is one sentence."""


def trace(model: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    """The ATen graph of one forward pass, for batches of any size. Errors: NotExportable."""
    disabled = logging.root.manager.disable
    logging.disable()  # a refusal is one sentence, and not a page of what torch met on the way
    try:
        with torch.no_grad(), warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            batch = {0: torch.export.Dim("batch")} if len(example) > 1 else None
            return torch.export.export(model, (example,), dynamic_shapes=(batch,), strict=False)
    except Exception as error:  # torch.export raises whatever the model's own code does under tracing
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        if "Constraints violated (batch)" in reason:
            reason = "its code fixes the number of samples, as len(x) and int(x.shape[0]) do: write x.shape[0]"
        raise NotExportable(f"{type(model).__name__} cannot be exported: {reason.strip()}") from error
    finally:
        logging.disable(disabled)


class Dataflow:
    """The graph of one forward pass in evaluation mode. Errors: NotExportable.

    >>> flow = Dataflow(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).eval(), torch.zeros(2, 1, 4, 4))
    >>> flow.batchnorms(), flow.macs()
    ({'0': '1'}, {'0': 72})
    """

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        self.example = example
        self.modules = dict(model.named_modules())
        self.program = trace(model, example)
        self.nodes = [node for node in self.program.graph.nodes if node.op == "call_function"]
        names = [self.layer(node) for node in self.nodes]
        self.calls = {name: [n for n, owner in zip(self.nodes, names, strict=True) if owner == name] for name in names}

    def holds(self, model: nn.Module) -> bool:
        """Whether the graph has this model's own tensors, so that whatever values they get are those of the graph."""
        named = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
        return all(
            name in named and (named[name].data_ptr(), named[name].shape) == (tensor.data_ptr(), tensor.shape)
            for name, tensor in self.program.state_dict.items()
        )

    @staticmethod
    def layer(node: fx.Node) -> str:
        """Name of the innermost module that made this node; "" is the model itself."""
        stack = list(node.meta.get("nn_module_stack", {}).values())
        return stack[-1][0].split("@")[0] if stack else ""

    def batchnorms(self) -> dict[str, str]:
        """Convolution or linear layer -> the BatchNorm that alone reads it; each runs once."""
        pairs = {}
        for node in self.nodes:
            if node.target in BATCHNORMS:
                source = node.args[0]
                if source.target in (*CONVOLUTIONS, aten.linear.default) and len(source.users) == 1:
                    layer, norm = self.layer(source), self.layer(node)
                    # BatchNorm's channels are dimension 1, a linear layer's the last.
                    same = source.target in CONVOLUTIONS or node.meta["val"].dim() == 2
                    known = type(self.modules.get(layer)) in (nn.Conv2d, nn.Linear)
                    if same and known and len(self.calls[layer]) == len(self.calls[norm]) == 1:
                        pairs[layer] = norm
        return pairs

    def convolution_branches(self) -> dict[str, list[str]]:
        """Add -> which of its inputs "a", "b" come straight from a convolution that nothing else reads."""
        return {
            self.layer(node): [side for side, source in zip("ab", node.args, strict=False) if self._is_branch(source)]
            for node in self.nodes
            if node.target in ADDITIONS and isinstance(self.modules.get(self.layer(node)), Add)
        }

    @staticmethod
    def _is_branch(source: fx.Node) -> bool:
        while isinstance(source, fx.Node) and source.target in BATCHNORMS and len(source.users) == 1:
            source = source.args[0]
        return isinstance(source, fx.Node) and source.target in CONVOLUTIONS and len(source.users) == 1

    def open_layers(self, quantized: set[str]) -> list[str]:
        """Convolutions and additions of which some reader, past fusable operators, is no layer that quantizes it."""
        return [
            self.layer(node)
            for node in self.nodes
            if node.target in (*CONVOLUTIONS, *ADDITIONS)
            and self.layer(node) in quantized
            and not all(self.layer(reader) in quantized for reader in self._readers(node))
        ]

    def uncalled(self) -> list[str]:
        """Modules of which nothing is called, such as a pooler that nobody reads: they see no data."""
        paths = (name.split(".") for name in self.calls)
        called = {".".join(path[:end]) for path in paths for end in range(1, len(path) + 1)}
        return [name for name in self.modules if name and name not in called]

    def linear_layers(self) -> list[str]:
        """Linear layers, in the order of their calls."""
        return [name for name in self.calls if isinstance(self.modules.get(name), nn.Linear)]

    def products(self) -> list[str]:
        """Modules that multiply two activations, in the order of their calls."""
        return [name for name in self.calls if isinstance(self.modules.get(name), MatMul)]

    def normalized_additions(self) -> list[str]:
        """Additions that only normalisations read, or further such additions: no engine adds integers there."""
        found: dict[fx.Node, bool] = {}

        def normalized(node: fx.Node) -> bool:
            if node.target in ADDITIONS and node not in found:
                readers = self._readers(node)
                into_norm = any(reader.target in NORMALISATIONS for reader in readers)
                found[node] = into_norm or (bool(readers) and all(normalized(reader) for reader in readers))
            return found.get(node, False)

        for node in reversed(self.nodes):  # readers first, so that long residual streams are no deep recursion
            normalized(node)
        return [name for name in self.calls if any(found.get(n) for n in self.calls[name]) and self._is_add(name)]

    def _is_add(self, name: str) -> bool:
        return isinstance(self.modules.get(name), Add)

    def one_sided(self) -> set[str]:
        """Sites "layer.input", "product.a" and "product.b" at which values of one sign arrive, as from a softmax."""
        found = set()
        for node in self.nodes:
            if node.target in PRODUCTS:
                name = self.layer(node)
                sites = ("a", "b") if isinstance(self.modules.get(name), MatMul) else ("input",)
                found |= {f"{name}.{s}" for s, source in zip(sites, node.args, strict=False) if self._one_sided(source)}
        return found

    def _one_sided(self, source: fx.Node) -> bool:
        while isinstance(source, fx.Node) and (source.target in MOVES or self._keeps_signs(source)):
            source = source.args[0]
        return isinstance(source, fx.Node) and source.target in ONE_SIDED

    def _keeps_signs(self, node: fx.Node) -> bool:
        """Whether a node multiplies by a parameter or buffer of which no element is below 0."""
        if node.target is not aten.mul.Tensor or not isinstance(node.args[1], fx.Node):
            return False
        signature, name = self.program.graph_signature, node.args[1].name
        stored = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}.get(name)
        return stored is not None and bool((self.program.state_dict[stored] >= 0).all())

    def logits_layer(self) -> str | None:
        """The layer whose output, with nothing in between, is the output of the model."""
        (output,) = (node for node in self.program.graph.nodes if node.op == "output")
        source = output.args[0][0]
        name = self.layer(source) if isinstance(source, fx.Node) else ""
        return name if type(self.modules.get(name)) in (nn.Conv2d, nn.Linear, ScaledLinear) else None

    def _readers(self, node: fx.Node) -> list[fx.Node]:
        found: list[fx.Node] = []
        for user in node.users:
            found += self._readers(user) if user.target in TRANSPARENT else [user]
        return found

    def functional_additions(self) -> list[str]:
        """Additions of two computed tensors outside `Add` modules, each as "module: source line"."""
        inputs = self.program.graph_signature.user_inputs
        return [
            f"{self.layer(node) or 'the model itself'} ({_source(node)})"
            for node in self.nodes
            if node.target in ADDITIONS
            and not isinstance(self.modules.get(self.layer(node)), Add)
            and all(isinstance(a, fx.Node) and (a.op == "call_function" or a.name in inputs) for a in node.args[:2])
        ]

    def functional_products(self) -> list[str]:
        """Matrix products and convolutions written as functions, each as "module.function"."""
        return [name for name in self.macs() if name not in self.modules]

    def macs(self) -> dict[str, int]:
        """Multiply-accumulates of one sample in each convolution and linear layer, and in each product of tensors."""
        counts: dict[str, int] = {}
        for node in self.nodes:
            if node.target in PRODUCTS:
                name = self.layer(node)
                if not isinstance(self.modules.get(name), LAYERS):
                    name = f"{name}.{PRODUCTS[node.target]}".lstrip(".")
                counts[name] = counts.get(name, 0) + _macs(node)
        return counts


def _macs(node: fx.Node) -> int:
    """Output elements of one sample, times the inputs that each of them sums over."""
    first, second = (list(arg.meta["val"].shape) for arg in node.args[:2])
    if node.target is aten.scaled_dot_product_attention.default:
        tokens, keys, inner = first[-2], second[-2], first[-1] + node.args[2].meta["val"].shape[-1]
        return math.prod(int(n) for n in (*first[1:-2], tokens, keys, inner))
    if node.target in TRANSPOSED:  # each input element goes into every position of the kernel
        return math.prod(int(n) for n in (*first[1:], *second[1:]))
    outputs = math.prod(int(n) for n in node.meta["val"].shape[1:])
    by_weight = node.target in (*CONVOLUTIONS, *OTHER_CONVOLUTIONS, aten.linear.default)
    return outputs * math.prod(int(n) for n in (second[1:] if by_weight else first[-1:]))


def _source(node: fx.Node) -> str:
    """The line that computes a node, or its operator where the line is a part of a statement or of a list."""
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if line.strip()]
    whole = bool(lines) and lines[-1].count("(") == lines[-1].count(")") and "," not in lines[-1]
    return lines[-1] if whole else str(node.target).split(".")[1]


class _AdditionTracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, Add) or super().is_leaf_module(module, name)


def additions_to_modules(model: nn.Module, flow: Dataflow) -> tuple[nn.Module, str | None]:
    """The model with functional additions of tensors turned into `Add` modules, and a warning where that failed.

    One fx pass; a model without such additions, or that fx cannot trace, is returned as it is.
    """
    found = flow.functional_additions()
    if not found:
        return model, None
    try:
        traced = fx.GraphModule(model, _AdditionTracer().trace(model), type(model).__name__)
    except Exception as error:  # fx raises whatever the model's own code does under tracing
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        return model, f"additions that stay in float, because fx cannot trace the model ({why}): {'; '.join(found)}"
    ShapeProp(traced).propagate(flow.example)
    for number, node in enumerate([n for n in traced.graph.nodes if _adds_tensors(n)]):
        name = next(n for n in (f"add_{k}" for k in itertools.count(number)) if not hasattr(traced, n))
        traced.add_submodule(name, Add())
        with traced.graph.inserting_after(node):
            module = traced.graph.call_module(name, tuple(node.args[:2]))
        node.replace_all_uses_with(module)
        traced.graph.erase_node(node)
    for node in traced.graph.nodes:
        node.meta.clear()  # an export would trust it for the names of modules, and it knows only the outermost
    traced.recompile()
    with torch.no_grad():
        if not torch.equal(traced(flow.example), model(flow.example)):
            return (
                model,
                f"additions that stay in float, because they change a tensor that is read again: {'; '.join(found)}",
            )
    left = Dataflow(traced, flow.example).functional_additions()
    return traced, f"additions that stay in float, because of their arguments: {'; '.join(left)}" if left else None


def _adds_tensors(node: fx.Node) -> bool:
    import operator

    functions = (operator.add, operator.iadd, torch.add)
    is_add = (node.op == "call_function" and node.target in functions) or (
        node.op == "call_method" and node.target in ("add", "add_")
    )
    return (
        is_add
        and not node.kwargs
        and all(isinstance(a, fx.Node) and "tensor_meta" in a.meta and a.op != "get_attr" for a in node.args[:2])
    )
