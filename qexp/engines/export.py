"""From a torch model to an ONNX file whose nodes bear the names of layers and sites.

`stem.conv` is the Conv node of that layer, `stem.conv.input` the QuantizeLinear of its input, `stem.conv.weight`
the DequantizeLinear of its int8 initializer; of a layer that runs twice, the second is `stem.conv#2`. Coverage,
parity and checks find everything by these names.
"""

from __future__ import annotations

import ast
import copy
import gc
import logging
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import onnx
import onnxscript.optimizer
import torch
import torch.onnx.ops  # registers the operator below
from onnx import numpy_helper
from torch import nn
from torch.export import ExportedProgram

from qexp.quant.convert import layers, prepare_export_, quantizers
from qexp.quant.dataflow import Dataflow, NotExportable, trace
from qexp.quant.onnx_form import DYNAMIC, OPSET
from qexp.quant.quantizer import Mode

Graph = onnx.ModelProto
INPUT, OUTPUT = "input", "output"
aten = torch.ops.aten
# Operators that have an ONNX form of their own; of a graph with any other, the exporter makes simpler ones first.
DIRECT = {
    torch.ops.onnx_symbolic._symbolic.default, aten.conv2d.default, aten.linear.default, aten.add.Tensor,
    aten.relu.default, aten.hardtanh.default, aten.mean.dim, aten.flatten.using_ints, aten.max_pool2d.default,
    aten.sym_size.int, aten.matmul.default, aten.mul.Tensor, aten.gelu.default, aten.layer_norm.default,
    aten.softmax.int, aten.embedding.default, aten.transpose.int, aten.view.default, aten.unflatten.int,
    aten.unsqueeze.default, aten.slice.Tensor, aten.expand_as.default, aten.zeros_like.default, aten.eq.Scalar,
    aten.ne.Scalar, aten.sum.dim_IntList, aten.clamp.default, aten.div.Tensor,
    torch.ops.prims.convert_element_type.default,
}  # fmt: skip
SITE_OPERATORS = ("QuantizeLinear", "Clip", "DequantizeLinear", DYNAMIC)


def numbered(name: str, call: int) -> str:
    """The name of the first, second, ... node of a layer or site: fc, fc#2, ...

    >>> numbered("fc", 1), numbered("fc", 2)
    ('fc', 'fc#2')
    """
    return name if call == 1 else f"{name}#{call}"


def site_of(node: onnx.NodeProto) -> str:
    """The site that a QuantizeLinear, its Clip or its DequantizeLinear belongs to, whichever call it is.

    >>> site_of(onnx.NodeProto(name="fc.input/clip#2"))
    'fc.input'
    """
    return re.sub(r"(/clip|/dequantize)?(#\d+)?$", "", node.name)


def _pool_globally(model: onnx.ModelProto) -> None:
    """Write a mean over height and width as GlobalAveragePool, for which engines have int8 kernels."""
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    ranks = {info.name: len(info.type.tensor_type.shape.dim) for info in (*model.graph.value_info, *model.graph.input)}
    for node in model.graph.node:
        if node.op_type == "ReduceMean" and node.input[-1] in constants and ranks.get(node.input[0]) == 4:
            keeps = all(a.i for a in node.attribute if a.name == "keepdims")
            if keeps and {int(axis) % 4 for axis in constants[node.input[1]]} == {2, 3}:
                replacement = onnx.helper.make_node("GlobalAveragePool", node.input[:1], node.output, node.name)
                replacement.name = replacement.name.replace("ReduceMean", "GlobalAveragePool")
                node.CopyFrom(replacement)


def _store_transposed(model: onnx.ModelProto) -> None:
    """Store int8 weights of a MatMul (in, out), as it reads them: between the two no engine looks past a Transpose."""
    nodes = {output: node for node in model.graph.node for output in node.output}
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for transpose in [node for node in model.graph.node if node.op_type == "Transpose"]:
        dequantize = nodes.get(transpose.input[0])
        codes = tensors.get(dequantize.input[0]) if dequantize is not None and dequantize.input else None
        if dequantize is None or dequantize.op_type != "DequantizeLinear" or codes is None or len(codes.dims) != 2:
            continue
        codes.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(numpy_helper.to_array(codes).T), codes.name))
        for attribute in dequantize.attribute:
            if attribute.name == "axis":
                attribute.i = 1
        dequantize.output[0] = transpose.output[0]
        model.graph.node.remove(transpose)


def export_float(flow: Dataflow) -> onnx.ModelProto:
    """The float model as ONNX, BatchNorm included (each engine folds it in its own way). Errors: NotExportable."""
    return _named(_export(flow.program))


def export_quantized(model: nn.Module, flow: Dataflow) -> onnx.ModelProto:
    """The calibrated model as ONNX QDQ: int8 weights, int32 biases, one QuantizeLinear for each active site.

    Each site stands in it for itself; `place` makes of it what one engine gets.

    Errors: NotExportable when a scale or an operator has no ONNX form, and when the graph lacks a site.
    """
    prepared = copy.deepcopy(model).eval()
    sites = {q.site for q in quantizers(prepared) if q.mode is Mode.QUANTIZE}
    weights = {q.site for q in quantizers(prepared) if q.mode is Mode.QUANTIZE and q.is_weight}
    try:
        prepare_export_(prepared)
    except ValueError as error:
        raise NotExportable(str(error)) from None
    with _undisturbed():
        program = trace(prepared, flow.example)
    graph = _named(_export(program))
    _check(graph, sites - weights, weights, {name for name, layer in layers(prepared) if hasattr(layer, "weight")})
    return graph


def _decomposed_at_need(program: ExportedProgram) -> ExportedProgram:
    """Let the exporter, which would trace the graph once more for it, decompose operators only where it must."""
    decompose = program.run_decompositions
    for node in list(program.graph.nodes):
        if node.target is aten._assert_tensor_metadata.default:
            program.graph.erase_node(node)
        elif node.target is aten.to.dtype and len(node.args) == 2 and not node.kwargs:
            node.target = torch.ops.prims.convert_element_type.default  # the same, and has an ONNX form

    def run_decompositions(table: dict) -> ExportedProgram:
        operators = {node.target for node in program.graph.nodes if node.op == "call_function"}
        return program if operators <= DIRECT else decompose(table)

    program.run_decompositions = run_decompositions
    return program


def _export(program: ExportedProgram) -> onnx.ModelProto:
    with _undisturbed():
        try:
            exported = torch.onnx.export(
                _decomposed_at_need(program), (), dynamo=True, opset_version=OPSET, verbose=False,
                input_names=[INPUT], output_names=[OUTPUT], optimize=False,
            )  # fmt: skip
        except torch.onnx.OnnxExporterError as error:
            cause = str(error.__cause__ or error)
            operator = re.search(r"target=torch\.ops\.([\w.]+)", cause)
            why = f"no form of {operator[1]}" if operator else cause.strip().splitlines()[0]
            raise NotExportable(f"the model cannot be written as ONNX: {why}") from error
        # Constants only: merging nodes would lose which sites they stood for.
        onnxscript.optimizer.fold_constants(exported.model)
        onnxscript.optimizer.remove_unused_nodes(exported.model)
        return exported.model_proto


@contextmanager
def _undisturbed() -> Iterator[None]:
    """No warnings and log lines of the exporter, and no garbage collection: it makes objects by the million."""
    logger = logging.getLogger("torch.onnx")
    level, collects = logger.level, gc.isenabled()
    logger.setLevel(logging.ERROR)
    gc.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
        if collects:
            gc.enable()


def _named(model: onnx.ModelProto) -> onnx.ModelProto:
    """Name nodes after the modules that made them, and drop what the exporter noted of this machine's files."""
    seen: Counter[str] = Counter()
    makers: dict[str, tuple[str, str]] = {}  # tensor -> operator and name of the node that writes it
    for node in model.graph.node:
        name = _name(node, seen)
        if node.op_type == "Add" and any(makers.get(tensor) == ("MatMul", name) for tensor in node.input):
            name = f"{name}/bias"
        makers.update(dict.fromkeys(node.output, (node.op_type, name)))
        seen[name] += 1
        node.name = numbered(name, seen[name])
        del node.metadata_props[:]
        node.doc_string = ""
    _pool_globally(model)
    _store_transposed(model)
    del model.graph.metadata_props[:]
    del model.metadata_props[:]
    for info in (*model.graph.value_info, *model.graph.input, *model.graph.output, *model.graph.initializer):
        del info.metadata_props[:]
    return model


def _name(node: onnx.NodeProto, seen: Counter[str]) -> str:
    """The module that made a node; a layer or site itself keeps this plain name, what follows it is told apart."""
    scopes = next((p.value for p in node.metadata_props if p.key == "pkg.torch.onnx.name_scopes"), "[]")
    modules = [scope for scope in ast.literal_eval(scopes)[:-1] if scope]
    name = modules[-1].split("@")[0] if modules else node.name
    if node.op_type in SITE_OPERATORS:
        name = name.removesuffix("_quantizer")
    if node.op_type == "Clip":
        return f"{name}/clip"
    if node.op_type == "DequantizeLinear" and seen[name]:
        return f"{name}/dequantize"
    return name if node.op_type in (*SITE_OPERATORS, "Conv", "Gemm", "MatMul", "Add") else f"{name}/{node.op_type}"


def _check(model: onnx.ModelProto, activations: set[str], weights: set[str], computing: set[str]) -> None:
    """Raise RuntimeError unless the graph holds each site and layer: an exporter may drop them without a word."""
    nodes = {node.name: node for node in model.graph.node}
    initializers = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    wrong = [s for s in activations if s not in nodes or nodes[s].op_type not in ("QuantizeLinear", DYNAMIC)]
    wrong += [s for s in weights if s not in nodes or initializers.get(nodes[s].input[0]) != onnx.TensorProto.INT8]
    wrong += [s for s in computing if s not in nodes]
    if wrong:
        raise NotExportable(f"the exported graph lacks {', '.join(sorted(wrong))}: a layer that is never called?")
