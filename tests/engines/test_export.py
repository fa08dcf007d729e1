"""The exported graph: what is in it, that nothing is missing, and that nothing of this machine is."""

import copy
import re
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

from qexp.engines.export import _check, export_float, export_quantized, site_of
from qexp.quant.convert import layers, quantizers
from qexp.quant.dataflow import NotExportable
from qexp.quant.quantizer import Mode

NETS = ["plain", "residual", "twice", "pooled", "perceptron"]


def constants(graph: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.graph.initializer}


def nodes(graph: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    return {node.name: node for node in graph.graph.node}


@pytest.mark.parametrize(
    ("net", "recipe"), [*((net, "w8a8") for net in NETS), ("plain", "w4a4"), ("perceptron", "w4a4")]
)
def test_weights_are_int8_codes_rounded_half_to_even(made, net, recipe):
    levels = 2 ** (made.recipes[recipe].weight.grid.bits - 1) - 1
    job = made.job(net, recipe)
    held, found = constants(job.graph), nodes(job.graph)
    weighted = [(name, layer) for name, layer in layers(job.model) if hasattr(layer, "weight")]
    assert weighted
    for name, layer in weighted:
        codes, scale = (held[i] for i in found[f"{name}.weight"].input[:2])
        weight = layer.weight.detach().numpy()
        blocks = np.abs(weight).reshape(len(weight), -1).max(1)
        expected_scale = (blocks / np.float32(levels)).astype(np.float32)
        np.testing.assert_array_equal(scale, expected_scale)
        per_row = expected_scale.reshape(-1, *[1] * (weight.ndim - 1))
        assert codes.dtype == np.int8
        np.testing.assert_array_equal(codes, np.rint(weight / per_row).clip(-levels, levels).astype(np.int8))


@pytest.mark.parametrize("net", NETS)
def test_biases_are_int32_codes_at_the_scale_of_the_sum(made, net):
    job = made.job(net)
    held, found = constants(job.graph), nodes(job.graph)
    biased = [(name, layer) for name, layer in layers(job.model) if getattr(layer, "bias", None) is not None]
    assert biased
    for name, layer in biased:
        codes, scale = (held[i] for i in found[f"{name}.bias"].input[:2])
        sums = held[found[f"{name}.input"].input[1]] * held[found[f"{name}.weight"].input[1]]
        np.testing.assert_array_equal(scale.reshape(-1), np.broadcast_to(sums, scale.shape).reshape(-1))
        assert codes.dtype == np.int32
        exact = layer.bias.detach().double().numpy() / scale.astype(np.float64)
        assert np.abs(codes - exact).max() <= 0.5 + np.abs(exact).max() * 2**-24


@pytest.mark.parametrize("net", NETS)
def test_every_site_is_in_the_graph_once_for_each_call(made, net):
    job = made.job(net)
    sites = [q for q in quantizers(job.model) if q.mode is Mode.QUANTIZE]
    calls = []
    hooks = [q.register_forward_pre_hook(lambda q, _: calls.append(q.site)) for q in sites if not q.shape]
    with torch.no_grad():
        job.model(job.images[:2])
    for hook in hooks:
        hook.remove()
    emitted = [site_of(node) for node in job.graph.graph.node if node.op_type == "QuantizeLinear"]
    assert sorted(emitted) == sorted(calls)
    assert {q.site for q in sites if q.shape} <= nodes(job.graph).keys()
    assert len(nodes(job.graph)) == len(job.graph.graph.node)


@pytest.mark.parametrize("gone", ["3.input", "3.weight", "3", "9"])
def test_a_site_or_layer_that_the_exporter_loses_is_noticed(made, gone):
    job = made.job("plain")
    sites = [q for q in quantizers(job.model) if q.mode is Mode.QUANTIZE]
    arguments = (
        {q.site for q in sites if not q.shape}, {q.site for q in sites if q.shape},
        {name for name, layer in layers(job.model) if hasattr(layer, "weight")},
    )  # fmt: skip
    _check(job.graph, *arguments)
    broken = copy.deepcopy(job.graph)
    broken.graph.node.remove(nodes(broken)[gone])
    with pytest.raises(NotExportable, match=re.escape(gone)):
        _check(broken, *arguments)


@pytest.mark.parametrize("net", NETS)
def test_the_float_graph_computes_what_torch_computes(made, net):
    job = made.job(net)
    graph = export_float(job.flow)
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    for count in 1, 2, 7:
        images = job.images[:count]
        with torch.no_grad():
            expected = job.net(images).numpy()
        np.testing.assert_allclose(session.run(None, {"input": images.numpy()})[0], expected, atol=1e-5, rtol=1e-4)


def test_the_same_model_gives_the_same_bytes_and_nothing_of_this_machine(made):
    job = made.job("residual")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = export_quantized(job.model, job.flow)
    assert again.SerializeToString() == job.graph.SerializeToString()
    for graph in job.graph, export_float(job.flow):
        onnx.checker.check_model(graph, full_check=True)
        raw = graph.SerializeToString()
        assert b".py" not in raw
        assert b"site-packages" not in raw
        assert str(Path(__file__).parents[2]).encode() not in raw
        assert not graph.metadata_props
        assert not any(node.metadata_props or node.doc_string for node in graph.graph.node)


def test_the_model_is_left_as_it_was(made):
    job = made.job("residual")
    before = {name: tensor.clone() for name, tensor in job.model.state_dict().items()}
    with torch.no_grad():
        logits = job.model(job.images)
    export_quantized(job.model, job.flow)
    assert all(torch.equal(tensor, before[name]) for name, tensor in job.model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(job.model(job.images), logits)
