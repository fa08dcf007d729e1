"""max(x, x) where an engine would fuse operators to something wrong: equal in value, and nothing is fused past it.

It reads x twice, and what an engine fuses into the operator before it must be that operator's one reader.
"""

from __future__ import annotations

import onnx

from qexp.engines.graph import Graph

REDUCTIONS = (
    "ReduceL1", "ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare",
)  # fmt: skip
MOVES = ("Flatten", "Gather", "Max", "Reshape", "Slice", "Squeeze", "Transpose")  # no arithmetic, no part of such a kernel


def fence_reductions(graph: Graph) -> None:
    """Keep means and maxima of tokens apart from what is before and behind them.

    OpenVINO 2026.4 fuses a scale for each feature or a quantizer into them and computes it for other features, rounds
    codes of a maximum before it is complete, and of a mean of codes returns the first sample only.
    """
    for node in graph.nodes(*REDUCTIONS):
        if _normalizes(graph, node):
            continue
        _fence_input(graph, node)
        result, node.output[0] = node.output[0], f"{node.output[0]}/fenced"
        behind = onnx.helper.make_node("Max", [node.output[0]] * 2, [result], name=f"{node.name}/behind")
        graph.graph.node.insert(list(graph.graph.node).index(node) + 1, behind)


def fence_perceptrons(graph: Graph) -> None:
    """Keep consecutive linear layers on vectors (N, C) apart, but for a layer with a bias and a quantizer behind it.

    OpenVINO 2026.4 makes one kernel of such a sequence for N <= 8. Without a bias, or with a scale, a BatchNorm or an
    activation function in front of the next quantizer, it reads memory that nothing has written.
    """
    for quantize in graph.nodes("QuantizeLinear"):
        writer = graph.writer(quantize.input[0])
        if writer is None or graph.ranks.get(quantize.input[0]) != 2 or writer.op_type in MOVES:
            continue
        if not (writer.op_type == "Gemm" and len(writer.input) == 3):
            _fence_input(graph, quantize)


def fence_concatenations(graph: Graph) -> None:
    """Keep quantizers behind a concatenation, such as that of a class token with those of an image.

    OpenVINO 2026.4 moves them to its inputs and their scales, then one for each token, behind it, and refuses the layer
    that follows.
    """
    for quantize in graph.nodes("QuantizeLinear"):
        writer = graph.writer(quantize.input[0])
        if writer is not None and writer.op_type == "Concat" and graph.ranks.get(quantize.input[0]) == 3:
            _fence_input(graph, quantize)


def _fence_input(graph: Graph, node: onnx.NodeProto) -> None:
    node.input[0] = graph.insert(node, "Max", [node.input[0]] * 2, name=f"{node.name}/before")


def _normalizes(graph: Graph, node: onnx.NodeProto) -> bool:
    """Whether a node is the mean or sum of the features of each token, as norms have it, which engines know."""
    axes = graph.constants.get(node.input[1]) if len(node.input) > 1 else None
    keeps = all(attribute.i for attribute in node.attribute if attribute.name == "keepdims")
    return node.op_type in ("ReduceMean", "ReduceSum") and keeps and axes is not None and axes.tolist() == [-1]
