"""OpenVINO on the CPU."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import onnx
import openvino as ov
from torch import nn

from qexp.engines.base import EngineRefused, beside_weights, symmetric
from qexp.engines.dynamic import GROUP
from qexp.engines.fence import fence_concatenations, fence_perceptrons, fence_reductions
from qexp.engines.graph import Graph
from qexp.quant.dataflow import Dataflow
from qexp.quant.granularity import PerGroup
from qexp.quant.grid import IntegerGrid
from qexp.quant.recipe import Recipe, Scheme

PRODUCTS = ("Convolution", "FullyConnected", "MatMul")
PRECISIONS = ("f32", "bf16", "f16")
CODES = ".weight_quantizer.onnx_codes"  # how the graph calls the codes of a layer's weight
GROUPS = (128, 64, 32)  # features that share a range of each call; more are no faster, fewer are slower


class OpenVino:
    """OpenVINO adds the residual inside the convolution before it, on its float accumulator.

    It ignores a quantizer on that branch, so the recipe leaves it out and the simulation follows. `precision` is the
    type of what is not int8: its default on many CPUs is bfloat16, which would be no honest float32.
    Errors: ValueError for a precision that OpenVINO does not know.
    """

    name = "openvino"

    def __init__(self, precision: str = "f32") -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"precision={precision!r}: allowed are {', '.join(PRECISIONS)}")
        self.precision = precision

    def version(self) -> str:
        return ov.get_version().split("-")[0]

    def recipe(self, recipe: Recipe, flow: Dataflow) -> Recipe:
        form = recipe.activation.dynamic_form
        if form == "per_token":
            raise EngineRefused(self, "it computes ranges of each call for groups (per_group), not for tokens")
        if form == "per_tensor":
            return self._in_groups(recipe, flow)
        if form == "per_group":
            self._require_groups(recipe, flow)
        products = flow.products()
        if form is not None or not products:
            return recipe
        sites = [(f"{name}.{side}", True) for name in products for side in "ab"]
        sites += [(f"{name}.input", False) for name in flow.linear_layers()]
        # Zero point 0 is fastest; of values of one sign it would waste half of the codes.
        both = [(site, of_product) for site, of_product in sites if site not in flow.one_sided()]
        formats = tuple((site, symmetric(recipe.activation_of(site, of_product))) for site, of_product in both)
        return replace(recipe, sites=formats + recipe.sites)

    def _require_groups(self, recipe: Recipe, flow: Dataflow) -> None:
        """Refuse groups that do not divide a layer, where it would not quantize at all. Errors: EngineRefused."""
        size = recipe.activation.granularity.size
        for name in flow.linear_layers():
            features = flow.modules[name].in_features
            if not recipe.excludes(name) and features % size:
                raise EngineRefused(self, f"groups of {size} do not divide the {features} features of {name}")

    def _in_groups(self, recipe: Recipe, flow: Dataflow) -> Recipe:
        """Ranges of each call as OpenVINO computes them: symmetric, for groups of features of a token."""
        quantized = {name: module for name, module in flow.modules.items() if not recipe.excludes(name)}
        if convolution := next((name for name, module in quantized.items() if isinstance(module, nn.Conv2d)), None):
            raise EngineRefused(self, f"it computes ranges of each call for linear layers, and {convolution} is none")
        features = [quantized[name].in_features for name in flow.linear_layers() if name in quantized]
        size = next((size for size in GROUPS if not any(n % size for n in features)), None)
        if size is None:
            raise EngineRefused(self, f"no group of {', '.join(map(str, GROUPS))} features divides all linear layers")
        activation = replace(recipe.activation, grid=IntegerGrid(8, "restricted"), granularity=PerGroup(size))
        return replace(recipe, activation=activation)

    def float_sites(self, flow: Dataflow, schemes: dict[str, Scheme]) -> set[str]:
        branches = {f"{add}.{sides[0]}" for add, sides in flow.convolution_branches().items() if sides}
        return beside_weights(flow, schemes) | branches & schemes.keys()

    def signed_sites(self, flow: Dataflow, schemes: dict[str, Scheme]) -> set[str]:
        linear = {f"{name}.input" for name in flow.linear_layers()} if flow.products() else set()
        return (linear | {f"{name}.{side}" for name in flow.products() for side in "ab"}) & schemes.keys()

    def rewrite(self, graph: Graph) -> None:
        fence_reductions(graph)
        fence_perceptrons(graph)
        fence_concatenations(graph)

    def session(
        self, model: onnx.ModelProto, shape: tuple[int, ...], threads: int, traced: bool = False
    ) -> OpenVinoSession:
        return OpenVinoSession(model, shape, threads, self.precision)


class OpenVinoSession:
    """One compiled model with one inference request."""

    def __init__(self, model: onnx.ModelProto, shape: tuple[int, ...], threads: int, precision: str) -> None:
        core = ov.Core()
        self._group = next((int(prop.value) for prop in model.metadata_props if prop.key == GROUP), 0)
        graph = core.read_model(model.SerializeToString())
        graph.reshape(list(shape))
        self._options = {
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            # Its default would quantize the inputs of linear layers with int8 weights, asked or not.
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": self._group,
        }
        if shape[0] == 1 and _multiplies_codes(model):
            # The kernel that it generates for attention in int8 is wrong for a batch of one (OpenVINO 2026.4).
            self._options["SNIPPETS_MODE"] = "DISABLE"
        self._compiled = core.compile_model(graph, "CPU", self._options)
        # OpenVINO calls a node that returns an output of the graph by the name of that output.
        outputs = {output.name for output in model.graph.output}
        self._renamed = {name: node.name for node in model.graph.node for name in node.output if name in outputs}
        # A product of activations may bear the name of what is behind it.
        readers = {name: node.name for node in model.graph.node for name in node.input}
        products = [node for node in model.graph.node if node.op_type == "MatMul"]
        self._behind = {node.name: readers[node.output[0]] for node in products if node.output[0] in readers}
        self._request = self._compiled.create_infer_request()

    def run(self, batch: np.ndarray) -> list[np.ndarray]:
        # Tensors set by hand: infer([batch]) would spend 0.1 ms in Python, 5 % of a MobileNet.
        self._request.set_input_tensor(ov.Tensor(batch, shared_memory=True))
        self._request.infer()
        return [tensor.data.copy() for tensor in self._request.output_tensors]

    def layers(self) -> dict[str, str]:
        found: dict[str, str] = {}
        dynamic = self._group and _quantizes_dynamically(self._group, self._options)
        for node in self._compiled.get_runtime_model().get_ordered_ops():
            info = {key: str(node.rt_info[key].value) for key in node.rt_info}
            kind = f"{info['layerType']} int8" if _integer(node, info) else info["layerType"]
            if info["layerType"] in PRODUCTS and (layer := _layer_of_weights(node)):
                if dynamic and info["runtimePrecision"] == "i8":  # that of the weights
                    kind = f"{info['layerType']} dynamic int8"
                found[layer] = kind  # its own name may have been lost to what was fused into it
            for original in info.get("originalLayersNames", "").split(","):
                name = re.sub(r"/WithoutBiases.*$", "", original)
                name = self._renamed.get(name, name)
                if name not in found or info["layerType"] in PRODUCTS:
                    found[name] = kind
        return {name: found[behind] for name, behind in self._behind.items() if behind in found} | found


def _multiplies_codes(model: onnx.ModelProto) -> bool:
    """Whether a product of two activations reads codes, and no weights."""
    makers = {output: node for node in model.graph.node for output in node.output}
    stored = {tensor.name for tensor in model.graph.initializer}

    def is_quantized_activation(name: str) -> bool:
        node = makers.get(name)
        return node is not None and node.op_type == "DequantizeLinear" and node.input[0] not in stored

    products = [node for node in model.graph.node if node.op_type == "MatMul"]
    return any(all(map(is_quantized_activation, node.input)) for node in products)


def _quantizes_dynamically(size: int, options: dict[str, object]) -> bool:
    """Whether linear layers compute ranges of each call on this processor, which no property of the graph tells.

    Of features 1 and 0.3 / 127 in one group the second has code 0: a sum of products with weights 1 shows it.
    """
    x = np.zeros((1, 32, size), np.float32)
    x[..., 0], x[..., 1] = 1, 0.3 / 127
    entry = ov.opset13.parameter(list(x.shape), np.float32)
    codes = ov.opset13.convert(ov.opset13.constant(np.ones((64, size), np.int8)), np.float32)
    weights = ov.opset13.multiply(codes, ov.opset13.constant(np.full((64, 1), 1, np.float32)))
    product = ov.opset13.matmul(entry, weights, False, True)
    compiled = ov.Core().compile_model(ov.Model([product], [entry], "probe"), "CPU", options)
    return bool(np.abs(compiled([x])[0] - 1).max() < 0.1 / 127)


def _integer(node: ov.Node, info: dict[str, str]) -> bool:
    """Whether a node of the optimized graph computes on integers."""
    kernel = info.get("primitiveType", "").lower().endswith("_i8")
    if info["layerType"] in PRODUCTS:
        # The precision of these is their weights', which a float kernel may decompress.
        return kernel
    # A small multi-layer perceptron becomes one generated kernel, which takes the int8 weights as they are.
    sources = [entry.get_source_output().get_node() for entry in node.inputs()]
    perceptron = info["layerType"] == "Subgraph" and any(_is_int8_constant(source) for source in sources)
    return kernel or perceptron or info.get("runtimePrecision") in ("u8", "i8")


def _layer_of_weights(node: ov.Node) -> str | None:
    """The layer whose stored codes a product reads, past what moves them."""
    for entry in node.inputs()[1:2]:
        source = entry.get_source_output().get_node()
        while source.get_input_size() and str(source.rt_info["layerType"].value) != "Const":
            source = source.input(0).get_source_output().get_node()
        name = str(source.rt_info["originalLayersNames"].value)
        if name.endswith(CODES):
            return name.removesuffix(CODES)
    return None


def _is_int8_constant(node: ov.Node) -> bool:
    return str(node.rt_info["layerType"].value) == "Const" and node.get_output_element_type(0) == ov.Type.i8
