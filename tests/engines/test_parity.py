"""The graph that an engine runs against the simulation, and a certificate that can fail."""

import copy

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from qexp.engines.base import EngineRefused, start
from qexp.engines.deploy import Deployment, _by_layer, certify_deployment, deploy, measure, simulation_for
from qexp.engines.graph import Graph
from qexp.engines.onnxruntime import OnnxRuntime
from qexp.engines.openvino import OpenVino
from qexp.engines.place import Artefact
from qexp.quant.convert import layers, quantizers
from qexp.quant.layers import Add
from qexp.quant.quantizer import Mode

PAIRS = [
    *((net, "w8a8") for net in ("plain", "residual", "twice", "pooled", "perceptron")),
    ("plain", "w4a4"), ("perceptron", "w4a4"), ("residual", "w2a3"), ("pooled", "w2a3"), ("twice", "symmetric"),
]  # fmt: skip


@pytest.mark.parametrize(("net", "recipe"), PAIRS)
def test_an_engine_computes_what_the_simulation_says(made, engine, net, recipe):
    job = made.job(net, recipe)
    done = made.deployed(job, engine)
    figures = done.certificate.metrics()
    sites = [q for q in quantizers(done.simulation) if q.mode is Mode.QUANTIZE and not q.shape]
    assert {site.site for site in sites} <= set(done.artefact.codes)
    assert figures["parity/faithful"]
    # A code whose quotient lies within float32 rounding of a tie may go either way, and drag a few others along.
    assert figures["parity/identical"] >= 0.999
    assert figures["parity/max_step"] <= 1
    with torch.no_grad():
        simulated = done.simulation(job.images).numpy()
    assert done.logits.shape == simulated.shape
    step = max(float(site.scale.max()) for site in sites)
    assert np.abs(done.logits - simulated).max() <= 2 * step + 1e-4
    if figures["parity/identical"] == 1:
        np.testing.assert_allclose(done.logits, simulated, atol=1e-4 * np.abs(simulated).max())


# ONNX Runtime has no int8 convolution behind a padding other than with zeros.
ISLANDS = {("onnxruntime", "pooled"): ["5"]}


@pytest.mark.parametrize(("net", "recipe"), PAIRS)
def test_every_product_runs_on_integers_or_is_named(made, engine, net, recipe):
    job = made.job(net, recipe)
    done = made.deployed(job, engine)
    islands = ISLANDS.get((engine.name, net), [])
    assert done.islands(job.flow) == islands
    macs = job.flow.macs()
    assert done.mac_coverage == 1 - sum(macs.get(layer, 0) for layer in islands) / sum(macs.values())


def test_the_last_batch_is_padded_and_the_padding_not_counted(made, engine):
    job = made.job("perceptron")
    done = made.deployed(job, engine)
    assert done.certificate.samples == 24
    per_sample = sum(int(np.prod(shape[1:])) for shape in code_shapes(done.artefact, job.images[:1].numpy(), engine))
    assert done.certificate.metrics()["parity/codes"] == 24 * per_sample
    whole = start(engine, done.artefact.model, (24, 12), 1).run(job.images.numpy())[0]
    np.testing.assert_array_equal(done.logits, whole)


def code_shapes(artefact: Artefact, batch: np.ndarray, engine) -> list[tuple[int, ...]]:
    session = start(engine, artefact.with_code_outputs(), batch.shape, 1)
    return [codes.shape for codes in session.run(batch)[1:]]


def changed(graph: onnx.ModelProto, name: str, change) -> onnx.ModelProto:
    """A copy with one constant changed."""
    copied = copy.deepcopy(graph)
    (tensor,) = [tensor for tensor in copied.graph.initializer if tensor.name == name]
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor).copy()), name))
    return copied


def with_graph(done: Deployment, graph: onnx.ModelProto) -> dict:
    """The certificate of another graph in the place of the deployed one."""
    other = copy.copy(done)
    other.artefact = Artefact(graph, done.artefact.codes, done.artefact.pools)
    return other


def constant_of(graph: onnx.ModelProto, node: str, position: int) -> str:
    (found,) = [n.input[position] for n in graph.graph.node if n.name == node]
    return found


def flip_weight(codes: np.ndarray) -> np.ndarray:
    codes.reshape(-1)[0] = -codes.reshape(-1)[0] // 2 - 3
    return codes


@pytest.mark.parametrize(
    ("node", "position", "change"),
    [
        ("3.weight", 0, flip_weight),
        ("3.weight", 1, lambda scale: (scale * 1.05).astype(np.float32)),
        ("3.input", 1, lambda scale: (scale * 1.01).astype(np.float32)),
        ("5.bias", 0, lambda bias: bias + 2000),
    ],
)
def test_a_wrong_constant_in_the_graph_shows_in_the_certificate(made, engine, node, position, change):
    job = made.job("plain")
    done = made.deployed(job, engine)
    name = constant_of(done.artefact.model, node, position)
    wrong = with_graph(done, changed(done.artefact.model, name, change))
    batches = [(job.images, torch.zeros(24, dtype=torch.int64))]
    certify_deployment(wrong, batches, 1)
    assert wrong.certificate.metrics()["parity/identical"] < done.certificate.metrics()["parity/identical"] - 0.001
    assert wrong.certificate.metrics()["parity/max_step"] >= 1


def test_a_wrong_simulation_shows_in_the_certificate(made, engine):
    job = made.job("plain")
    simulation = simulation_for(engine, job.model, job.flow)
    (layer,) = [layer for name, layer in layers(simulation) if name == "3"]
    layer.input_quantizer.scale.mul_(1.01)
    wrong = deploy(engine, job.graph, simulation, job.flow, 1)
    certify_deployment(wrong, [(job.images, torch.zeros(24, dtype=torch.int64))], 1)
    assert wrong.certificate.metrics()["parity/identical"] < 0.99


class Unfaithful(OnnxRuntime):
    """Rounds otherwise as soon as it is asked for more than one output."""

    def session(self, model, shape, threads, traced=False):
        inner = super().session(model, shape, threads, traced)
        if len(model.graph.output) == 1:
            return inner
        run = inner.run
        inner.run = lambda batch: [output + (output.dtype == np.float32) * 1e-3 for output in run(batch)]
        return inner


def test_a_graph_that_shows_its_codes_but_computes_something_else_is_not_faithful(made):
    done = made.deployed(made.job("perceptron"), Unfaithful())
    figures = done.certificate.metrics()
    assert figures["parity/faithful"] is False
    expected = 10 * np.log10(np.square(done.logits.astype(np.float64)).mean() / 1e-6)
    assert figures["parity/faithful_sqnr_db"] == pytest.approx(expected, abs=0.01)
    alike = made.deployed(made.job("perceptron"), OnnxRuntime()).certificate.metrics()
    assert alike["parity/faithful"] is True and alike["parity/faithful_sqnr_db"] == np.inf


@pytest.mark.parametrize("layer", ["0", "5"])
def test_a_layer_without_its_quantizers_is_an_island(made, engine, layer):
    job = made.job("plain")
    model = copy.deepcopy(job.graph)
    gone = {f"{layer}.input", f"{layer}.input/clip", f"{layer}.input/dequantize", f"{layer}.weight"}
    for node in [node for node in model.graph.node if node.name in gone]:
        model.graph.node.remove(node)
        source = node.input[0]
        if node.name.endswith(".weight"):
            (codes,) = [t for t in model.graph.initializer if t.name == source]
            source = f"{layer}.float_weight"
            floats = numpy_helper.to_array(codes).astype(np.float32)
            model.graph.initializer.append(numpy_helper.from_array(floats, source))
        for reader in model.graph.node:
            reader.input[:] = [source if name == node.output[0] else name for name in reader.input]
    done = deploy(engine, model, simulation_for(engine, job.model, job.flow), job.flow, 1)
    assert layer in done.islands(job.flow)
    assert done.mac_coverage <= 1 - job.flow.macs()[layer] / sum(job.flow.macs().values())


def test_operators_are_found_by_the_names_of_layers():
    names = {"conv1", "conv10", "head", "block.pool", "0"}
    nodes = {
        "conv1": "Conv int8", "conv1#2": "Conv", "conv10": "Conv int8", "block.pool/GlobalAveragePool": "Pool int8",
        "0/Flatten": "Reshape", "0": "Gemm int8", "other": "Relu",
    }  # fmt: skip
    assert _by_layer(nodes, names) == {
        "conv1": ["Conv int8", "Conv"], "conv10": ["Conv int8"], "block.pool": ["Pool int8"], "0": ["Gemm int8"],
    }  # fmt: skip


def test_a_graph_that_an_engine_does_not_know_is_refused_in_one_line(engine):
    node = onnx.helper.make_node("Unheard", ["x"], ["y"], domain="nowhere")
    infos = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 2]) for name in "xy"]
    graph = onnx.helper.make_graph([node], "g", infos[:1], infos[1:])
    domains = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("nowhere", 1)]
    model = onnx.helper.make_model(graph, opset_imports=domains, ir_version=10)
    with pytest.raises(EngineRefused, match=f"^{engine.name} refuses the graph: .*Unheard") as refusal:
        start(engine, model, (1, 2), 1)
    assert "\n" not in str(refusal.value)
    assert refusal.value.engine is engine


def test_all_sides_are_measured_and_torchs_threads_are_given_back(made, engine):
    job = made.job("perceptron")
    done = made.deployed(job, engine)
    torch.set_num_threads(2)
    graphs = {"fp32": done.artefact.model, engine.name: done.artefact.model}
    timings = measure([engine], graphs, job.net, job.images[:3], 0.01, 1)
    assert torch.get_num_threads() == 2
    assert timings.names == (
        f"{engine.name}/fp32", f"{engine.name}/fp32 again", f"{engine.name}/int8", "torch/fp32",
    )  # fmt: skip
    assert len(timings.rounds) >= 20
    assert (timings.rounds > 0).all()


def test_a_linear_layer_on_tokens_computes_what_the_simulation_says(made, engine):
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 5)

        def forward(self, x):
            return self.down(torch.relu(self.up(x))).mean(1)

    done = made.deployed(made.quantized(*made.settled(Tokens, (6, 8))), engine)
    assert done.certificate.metrics()["parity/identical"] >= 0.999
    assert done.certificate.metrics()["parity/max_step"] <= 1
    assert done.certificate.samples == 24


POOLS = {
    "mean": lambda x: x.mean(1), "sum": lambda x: x.sum(1), "largest": lambda x: x.amax(1),
    "smallest": lambda x: x.amin(1), "kept": lambda x: x.mean(1, keepdim=True).squeeze(1),
    "rms": lambda x: (x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()).mean(1),
}  # fmt: skip


class Pooled(nn.Module):
    """A residual sum of tokens (N, 6, 8), pooled; `scaled` by a factor for each feature, as smoothing leaves it."""

    def __init__(self, pool, scaled: bool) -> None:
        super().__init__()
        self.up, self.add, self.head, self.pool = nn.Linear(8, 8), Add(), nn.Linear(8, 5), pool
        self.register_buffer("factor", torch.rand(8) * 4 + 0.2 if scaled else None)

    def forward(self, x):
        x = self.pool(self.add(self.up(x), x))
        return self.head(x if self.factor is None else x * self.factor)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("pool", POOLS)
def test_tokens_pooled_before_a_quantizer_are_what_the_simulation_says(made, engine, pool, scaled):
    job = made.quantized(*made.settled(lambda: Pooled(POOLS[pool], scaled), (6, 8)))
    done = made.deployed(job, engine)
    figures = done.certificate.metrics()
    assert figures["parity/faithful"]
    assert figures["parity/identical"] >= 0.999
    assert figures["parity/max_step"] <= 1
    assert figures["parity/output_sqnr_db"] > 50
    assert done.runs_int8("head")


def test_the_largest_of_an_image_is_what_the_simulation_says(made, engine):
    class Largest(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

        def forward(self, x):
            return self.head(self.conv(x).amax((2, 3)))

    figures = made.deployed(made.quantized(*made.settled(Largest, (3, 8, 8))), engine).certificate.metrics()
    assert figures["parity/identical"] >= 0.999
    assert figures["parity/output_sqnr_db"] > 50


def test_the_mean_of_features_in_a_norm_is_left_to_the_engine(made):
    job = made.quantized(*made.settled(lambda: Pooled(POOLS["rms"], True), (6, 8)))
    graph = Graph(made.deployed(job, OpenVino()).artefact.model)
    means = graph.nodes("ReduceMean")
    readers = [[reader.op_type for reader in graph.readers(mean.output[0])] for mean in means]
    assert len(means) == 2 and readers.count(["Max"]) == 1


def test_a_class_token_beside_those_of_an_image_is_no_reason_to_refuse(made, engine):
    class WithToken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch, self.mix, self.head = nn.Conv2d(3, 16, 2, 2), nn.Linear(16, 16), nn.Linear(16, 5)
            self.token = nn.Parameter(torch.randn(1, 1, 16))

        def forward(self, x):
            tokens = self.patch(x).flatten(2).transpose(1, 2)
            tokens = torch.cat([self.token.expand(x.shape[0], -1, -1), tokens], 1)
            return self.head(torch.relu(self.mix(tokens))[:, 0])

    done = made.deployed(made.quantized(*made.settled(WithToken, (3, 8, 8))), engine)
    assert done.runs_int8("mix") and done.runs_int8("head")
    assert done.certificate.metrics()["parity/identical"] >= 0.999
    assert done.certificate.metrics()["parity/output_sqnr_db"] > 50


class Perceptron(nn.Module):
    """Three linear layers on vectors with something between the first two."""

    def __init__(self, between: str, bias: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16, bias=bias) for _ in range(3))
        self.between, self.norm = between, nn.BatchNorm1d(16)
        self.register_buffer("factor", torch.rand(16) * 4 + 0.2)

    def forward(self, x):
        x = self.layers[0](x)
        if self.between == "scale":
            x = torch.relu(x) * self.factor
        elif self.between == "norm":
            x = self.norm(torch.relu(x))
        elif self.between == "gelu":
            x = torch.nn.functional.gelu(x)
        return self.layers[2](torch.relu(self.layers[1](x)))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("between", ["nothing", "scale", "norm", "gelu"])
def test_a_few_vectors_are_computed_as_many_are(made, engine, between, bias):
    job = made.quantized(*made.settled(lambda: Perceptron(between, bias), (16,)))
    done = made.deployed(job, engine)
    for count in (1, 8, 24):
        (found,) = start(engine, done.artefact.model, (count, 16), 1).run(job.images[:count].numpy())
        with torch.no_grad():
            simulated = done.simulation(job.images[:count]).numpy()
        error = np.square(found - simulated).sum() / np.square(simulated).sum()
        assert error < 1e-3, count  # a code that lies near a tie may go either way
