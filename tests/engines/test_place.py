"""What is rewritten for an engine computes the same codes, to the bit, without any optimization of the engine."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from qexp.engines.export import site_of
from qexp.engines.place import place

PAIRS = [
    *((net, "w8a8") for net in ("plain", "residual", "twice", "pooled", "perceptron")),
    ("plain", "w4a4"), ("perceptron", "w4a4"), ("residual", "w2a3"), ("pooled", "w2a3"), ("twice", "symmetric"),
]  # fmt: skip


def run_literally(graph: onnx.ModelProto, images: torch.Tensor) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"input": images.numpy()})


@pytest.mark.parametrize(("net", "recipe"), PAIRS)
def test_a_placed_graph_equals_the_exported_one_to_the_bit(made, net, recipe):
    job = made.job(net, recipe)
    placed = place(job.graph, set())
    (exported,) = run_literally(job.graph, job.images)
    literal, *codes = run_literally(placed.with_code_outputs(), job.images)
    np.testing.assert_array_equal(literal, exported)
    np.testing.assert_array_equal(run_literally(placed.model, job.images)[0], exported)
    assert all(tensor.dtype == np.uint8 for tensor in codes)
    assert len(codes) == len(placed.code_tensors)
    onnx.checker.check_model(placed.model, full_check=True)


@pytest.mark.parametrize("seed", range(8))
def test_bounds_and_pools_on_codes_are_exact_for_any_limits_and_scales(made, seed):
    generator = np.random.default_rng(seed)
    lo, hi = np.sort(generator.normal(0, 1, 2))
    functions = [nn.ReLU(), nn.ReLU6(), nn.Hardtanh(lo, hi), nn.Hardtanh(0.2, 0.3), nn.Hardtanh(-3.0, -2.9)]

    def net() -> nn.Module:
        first, second = generator.choice(len(functions), 2)
        return nn.Sequential(
            nn.Conv2d(3, 6, 3), functions[first], nn.MaxPool2d(2), nn.Conv2d(6, 6, 3), functions[second],
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5),
        )  # fmt: skip

    recipe = list(made.recipes.values())[seed % len(made.recipes)]
    job = made.quantized(*made.settled(net, (3, 12, 12), seed), recipe)
    placed = place(job.graph, set())
    np.testing.assert_array_equal(run_literally(placed.model, job.images)[0], run_literally(job.graph, job.images)[0])
    assert not [node for node in placed.model.graph.node if node.op_type == "Relu"]
    (pool,) = [node for node in placed.model.graph.node if node.op_type == "MaxPool"]
    (source,) = [node for node in placed.model.graph.node if pool.input[0] in node.output]
    assert source.op_type == "DequantizeLinear"


def test_the_codes_of_a_site_after_a_pool_are_those_after_it(made):
    job = made.job("pooled")
    placed = place(job.graph, set())
    shapes = {tensor: codes.shape for tensor, codes in zip(
        placed.code_tensors, run_literally(placed.with_code_outputs(), job.images)[1:], strict=True
    )}  # fmt: skip
    assert shapes[placed.codes["3.input"]] == (24, 8, 5, 5)
    assert shapes[placed.codes["5.input"]] == (24, 8, 2, 2)


def test_twins_share_their_codes_and_sites_in_float_leave_the_graph(made):
    job = made.job("twice")
    placed = place(job.graph, set())
    assert placed.codes["left.input"] == placed.codes["right.input"]
    gone = place(job.graph, {"left.input"})
    assert "left.input" not in gone.codes
    assert "left.input" not in {site_of(node) for node in gone.model.graph.node}
    twice = place(job.graph, {"conv.input"})
    assert not [site for site in twice.codes if site.startswith("conv.input")]


def test_an_exported_graph_is_not_changed_and_constants_are_all_used(made):
    job = made.job("residual")
    before = job.graph.SerializeToString()
    placed = place(job.graph, {"add2.a"})
    assert job.graph.SerializeToString() == before
    used = {name for node in placed.model.graph.node for name in node.input}
    assert {tensor.name for tensor in placed.model.graph.initializer} <= used


def test_eight_bit_codes_need_no_clip_and_four_bit_codes_have_theirs(made):
    wide = [node for node in place(made.job("perceptron").graph, set()).model.graph.node if node.op_type == "Clip"]
    narrow = place(made.job("perceptron", "w4a4").graph, set()).model
    limits = {tensor.name: int(numpy_helper.to_array(tensor)) for tensor in narrow.graph.initializer
              if tensor.data_type == onnx.TensorProto.UINT8 and not tensor.dims}  # fmt: skip
    bounds = [[limits[name] for name in node.input[1:]] for node in narrow.graph.node if node.op_type == "Clip"]
    assert all(0 <= low <= high and high - low <= 15 for low, high in bounds)
    assert len(bounds) == 3
    # What is left after a ReLU is its bound, which the codes of a range from 0 keep by themselves.
    assert len(wide) <= 1
