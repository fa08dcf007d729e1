"""Ranges of each call, in operators that engines have: codes, scales, and products on integers.

ONNX Runtime gets one range for the whole tensor or one for each token; OpenVINO computes those of groups by itself, so
that their sites go from the graph and their size goes into its metadata.
"""

from __future__ import annotations

import numpy as np
import onnx

from qexp.engines.graph import Graph
from qexp.quant.dataflow import NotExportable
from qexp.quant.onnx_form import DYNAMIC

GROUP = "qexp.dynamic_group"  # in the metadata of a graph: features that share a range of each call
TINY = 2.0**-126  # the least scale, a normal number


def write_dynamic(graph: Graph) -> None:
    """Replace every site with ranges of each call.

    Errors: NotExportable for a form that no engine computes, and at what is no linear layer.
    """
    groups: set[int] = set()
    for marker in graph.nodes(DYNAMIC):
        how = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in marker.attribute}
        sites = [site for site, tensor in graph.codes.items() if tensor == marker.output[0]]
        if how["form"] == b"none":
            raise NotExportable(f"{marker.name} has ranges of each call in a form that no engine computes")
        readers = graph.readers(marker.output[0])
        if not all(_has_codes(graph, reader) for reader in readers):
            raise NotExportable(
                f"{marker.name} has ranges of each call, which engines compute for linear layers with int8 weights"
            )
        if how["form"] == b"per_group":
            groups.add(how["size"])
            for site in sites:
                del graph.codes[site]
            graph.remove(marker, marker.input[0])
            continue
        codes, scale, *zero_point = _codes(graph, marker, how["form"] == b"per_token")
        graph.codes.update(dict.fromkeys(sites, codes))
        for layer in readers:
            _multiply_integers(graph, layer, marker, codes, scale, zero_point)
        graph.remove(marker)
    for node in graph.nodes("DequantizeLinear"):
        if not graph.readers(node.output[0]):
            graph.remove(node)
    if len(groups) > 1:
        raise NotExportable(f"groups of several sizes ({', '.join(map(str, groups))}) have ranges of each call")
    if groups:
        onnx.helper.set_model_props(graph.model, {GROUP: str(groups.pop())})
    opsets = [opset for opset in graph.model.opset_import if opset.domain in ("", "ai.onnx")]
    del graph.model.opset_import[:]
    graph.model.opset_import.extend(opsets)


def _has_codes(graph: Graph, layer: onnx.NodeProto) -> bool:
    """Whether this is a linear layer whose weights are codes."""
    if layer.op_type not in ("MatMul", "Gemm"):
        return False
    weight = graph.writer(layer.input[1])
    return weight is not None and weight.op_type == "DequantizeLinear" and weight.input[0] in graph.constants


def _codes(graph: Graph, marker: onnx.NodeProto, per_token: bool) -> list[str]:
    """Codes, scale and, where it is not 0, zero point."""
    x, name = marker.input[0], marker.name
    if not per_token:
        outputs = [f"{name}/{part}" for part in ("codes", "scale", "zero_point")]
        graph.insert(marker, "DynamicQuantizeLinear", [x], outputs, name)
        return outputs
    # S = max|x| / 127 of each row, q = round(x / S); a row of zeros has codes of 0 with any scale.
    size = graph.insert(marker, "Abs", [x])
    largest = graph.insert(marker, "ReduceMax", [size, graph.constant(f"{name}/axis", np.array([-1], np.int64))])
    largest = graph.insert(marker, "Max", [largest, graph.constant(f"{name}/least", np.float32(127 * TINY))])
    levels = graph.constant(f"{name}/levels", np.float32(127))
    scale = graph.insert(marker, "Div", [largest, levels], name=f"{name}/scale")
    codes = graph.insert(marker, "Round", [graph.insert(marker, "Div", [x, scale], name=f"{name}/quotient")])
    codes = graph.insert(marker, "Cast", [codes], name=name, to=onnx.TensorProto.INT8)
    graph.signed.add(codes)
    return [codes, scale]


def _multiply_integers(
    graph: Graph, layer: onnx.NodeProto, marker: onnx.NodeProto, codes: str, scale: str, zero_point: list[str]
) -> None:
    """x W + b = S_x S_w (q_x - Z_x) q_w + b, the product on integers; ONNX Runtime makes one operator of it."""
    weight = graph.writer(layer.input[1])
    stored, zeros = (graph.constants[weight.input[i]] for i in (0, 2))
    if layer.op_type == "Gemm":
        stored = np.ascontiguousarray(stored.T)
    w = graph.constant(f"{layer.name}/codes", stored)
    w_zero = graph.constant(f"{layer.name}/zero_point", zeros if zeros.any() else np.int8(0))
    # MatMulInteger takes zero points by position, and one of x is needed before one of W.
    x_zero = zero_point or [graph.constant(f"{marker.name}/zero_point", np.int8(0))]
    product = graph.insert(layer, "MatMulInteger", [codes, w, *x_zero, w_zero], name=layer.name)
    product = graph.insert(layer, "Cast", [product], name=f"{layer.name}/float", to=onnx.TensorProto.FLOAT)
    if zero_point:
        factor = graph.insert(layer, "Mul", [scale, weight.input[1]], name=f"{layer.name}/scale")
    else:
        # Of a product of both scales ONNX Runtime would make an operator that reads the scale of the first token
        # for all of them.
        factor = scale
        product = graph.insert(layer, "Mul", [product, weight.input[1]], name=f"{layer.name}/scaled_by_weight")
    has_bias = len(layer.input) > 2
    outputs = None if has_bias else list(layer.output)
    scaled = graph.insert(layer, "Mul", [product, factor], outputs, f"{layer.name}/scaled")
    if has_bias:
        graph.insert(layer, "Add", [scaled, layer.input[2]], list(layer.output), f"{layer.name}/bias")
    graph.remove(layer)
