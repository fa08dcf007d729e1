"""A small encoder on both engines: static and dynamic, every product on integers, equal to the simulation."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from qexp.engines.base import EngineRefused, start, symmetric
from qexp.engines.deploy import activation_schemes, certify_deployment, deploy, simulation_for
from qexp.engines.dynamic import GROUP
from qexp.engines.export import export_quantized
from qexp.engines.onnxruntime import OnnxRuntime
from qexp.engines.openvino import OpenVino, _quantizes_dynamically
from qexp.engines.place import place
from qexp.models import bert_tiny_random
from qexp.quant.convert import calibrating, layers, quantize_, quantizers, targets
from qexp.quant.dataflow import Dataflow
from qexp.quant.granularity import PerChannel, PerGroup, PerTensor, PerToken
from qexp.quant.grid import IntegerGrid
from qexp.quant.layers import Add
from qexp.quant.recipe import Recipe, Scheme

BLOCK = "encoder.layers.0"
WEIGHTS, AFFINE = Scheme(IntegerGrid(8), PerChannel(0)), Scheme(IntegerGrid(8, "affine"))
SYMMETRIC = IntegerGrid(8, "restricted")
RECIPES = {
    "static": Recipe(WEIGHTS, AFFINE),
    "tensor": Recipe(WEIGHTS, replace(AFFINE, dynamic=True)),
    "token": Recipe(WEIGHTS, Scheme(SYMMETRIC, PerToken(), dynamic=True)),
    "group": Recipe(WEIGHTS, Scheme(SYMMETRIC, PerGroup(64), dynamic=True)),
}
RUNS = [
    (OnnxRuntime, "static"), (OpenVino, "static"), (OnnxRuntime, "tensor"), (OnnxRuntime, "token"), (OpenVino, "group"),
]  # fmt: skip
DYNAMIC = [run for run in RUNS if run[1] != "static"]
NAMES = [f"{make.name}-{recipe}" for make, recipe in RUNS]


def quantized(net: nn.Module, inputs: torch.Tensor, recipe: Recipe, flow: Dataflow | None = None) -> SimpleNamespace:
    """As a run does it: additions in front of norms stay in float."""
    flow, model = flow or Dataflow(net, inputs[:2]), copy.deepcopy(net)
    in_float = flow.normalized_additions()
    outputs = flow.open_layers({name for name, _ in targets(model, recipe)}.difference(in_float))
    quantize_(model, recipe, tuple(outputs), in_float=in_float)
    with torch.no_grad(), calibrating(model):
        model(inputs)
    return SimpleNamespace(net=net, inputs=inputs, flow=flow, model=model, graph=export_quantized(model, flow))


def deployed(job: SimpleNamespace, engine) -> SimpleNamespace:
    done = deploy(engine, job.graph, simulation_for(engine, job.model, job.flow), job.flow, 1)
    labels = torch.zeros(len(job.inputs), dtype=torch.int64)
    logits = certify_deployment(done, [(job.inputs, labels)], 1)
    return SimpleNamespace(job=job, engine=engine, done=done, logits=logits, figures=done.certificate.metrics())


@pytest.fixture(scope="module")
def net():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = bert_tiny_random(num_classes=3, width=64, layers=1, vocabulary=50, length=16).eval()
    for parameter in net.parameters():  # far from the start, where tokens hardly differ
        nn.init.normal_(parameter, std=0.15)
    return net


@pytest.fixture(scope="module")
def ids():
    ids = torch.randint(1, 50, (12, 10), generator=torch.Generator().manual_seed(0))
    for row in range(12):
        ids[row, 10 - row % 8 :] = 0
    return ids


@pytest.fixture(scope="module")
def made(net, ids):
    """Each engine's deployment of each recipe, in the engine's own formats; made once."""
    flow, jobs, found = Dataflow(net, ids[:2]), {}, {}

    def made(make, name: str) -> SimpleNamespace:
        engine = make()
        recipe = engine.recipe(RECIPES[name], flow)
        if recipe not in jobs:
            jobs[recipe] = quantized(net, ids, recipe, flow)
        if (make, name) not in found:
            found[make, name] = deployed(jobs[recipe], engine)
        return found[make, name]

    return made


@pytest.mark.parametrize(("make", "recipe"), RUNS, ids=NAMES)
def test_an_engine_computes_what_the_simulation_says(made, make, recipe):
    run = made(make, recipe)
    figures = run.figures
    if recipe == "group":  # which OpenVINO computes inside of its layers
        assert figures["parity/codes"] == 0 and not {"parity/identical", "parity/faithful"} & figures.keys()
    else:
        assert figures["parity/faithful"]
        assert figures["parity/identical"] >= 0.99  # a step may grow from layer to layer
        assert figures["parity/local_identical"] >= 0.999
        assert figures["parity/local_max_step"] <= 1
    assert figures["parity/output_sqnr_db"] > 45
    with torch.no_grad():
        simulated, exact = run.done.simulation(run.job.inputs).numpy(), run.job.net(run.job.inputs).numpy()
    error = np.abs(run.logits - simulated).max()
    assert error < 0.2 * np.abs(simulated - exact).max()  # it is the quantized network that it computes
    assert run.logits.argmax(1).tolist() == simulated.argmax(1).tolist()


@pytest.mark.parametrize(("make", "recipe"), RUNS, ids=NAMES)
def test_every_product_with_weights_runs_on_integers(made, make, recipe):
    run = made(make, recipe)
    if make is OpenVino and recipe == "group" and not dynamic_is_supported(64):
        pytest.skip("this processor has no linear layers with ranges of each call")
    linear = run.job.flow.linear_layers()
    assert len(linear) == 7 and all(run.done.runs_int8(name) for name in linear)
    products = [f"{BLOCK}.attention.scores", f"{BLOCK}.attention.context"]
    assert run.job.flow.products() == products
    assert run.done.islands(run.job.flow) == ([] if recipe == "static" else products)
    macs = run.job.flow.macs()
    in_float = 0 if recipe == "static" else sum(macs[name] for name in products)
    assert run.done.mac_coverage == pytest.approx(1 - in_float / sum(macs.values()))


def dynamic_is_supported(group: int) -> bool:
    options = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": group}
    return _quantizes_dynamically(group, options)


OPERATORS = {"tensor": {"DynamicQuantizeMatMul", "MatMulIntegerToFloat"}, "token": {"MatMulInteger"}}


@pytest.mark.parametrize("recipe", OPERATORS)
def test_the_optimized_graph_of_onnx_runtime_multiplies_integers(made, ids, recipe):
    run = made(OnnxRuntime, recipe)
    graph = start(run.engine, run.done.artefact.model, (1, 10), 1, traced=True)._optimized.graph
    kinds = [node.op_type for node in graph.node]
    linear = set(run.job.flow.linear_layers())
    found = {node.op_type for node in graph.node if node.name.partition("_token")[0] in linear}
    assert found == OPERATORS[recipe] if recipe == "token" else found and found <= OPERATORS[recipe]
    # Floats are multiplied in the two products of activations alone.
    assert sum(kind in ("MatMul", "FusedMatMul", "Gemm") for kind in kinds) == 2
    assert sum(kinds.count(kind) for kind in OPERATORS[recipe]) == len(linear)


def per_token_wanted(x: np.ndarray) -> np.ndarray:
    scale = np.abs(x).max(-1, keepdims=True) / np.float32(127)
    return np.rint(x / scale) * scale


def test_each_token_is_multiplied_by_its_own_scale():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 64) * torch.tensor([1.0, 100.0, 0.01, 3.0, 20.0])[:, None]
    job = quantized(nn.Sequential(nn.Linear(64, 8), nn.Flatten()).eval(), x, RECIPES["token"])
    run = deployed(job, OnnxRuntime())
    weight = job.model[0].weight_quantizer(job.model[0].weight).detach().numpy()
    expected = per_token_wanted(x.numpy()) @ weight.T + job.net[0].bias.detach().numpy()
    np.testing.assert_allclose(run.logits, expected.reshape(2, -1), rtol=1e-4, atol=1e-4)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 32), nn.Linear(32, 8)

    def forward(self, x):
        return self.down(torch.relu(self.up(x))).flatten(1)


CONVENTIONS = [("affine", PerChannel(0)), ("unsigned", PerTensor())]


@pytest.mark.parametrize(("convention", "granularity"), CONVENTIONS, ids=lambda value: str(value))
@pytest.mark.parametrize(("make", "recipe"), DYNAMIC, ids=[f"{make.name}-{name}" for make, name in DYNAMIC])
def test_weights_of_any_zero_point_are_what_they_stand_for(make, recipe, convention, granularity):
    torch.manual_seed(0)
    x, net = torch.randn(6, 5, 64), Tokens().eval()
    with torch.no_grad():
        net.up.weight += 0.07
    activation = RECIPES[recipe].activation
    if recipe == "group":
        activation = replace(activation, granularity=PerGroup(32))
    weight = Scheme(IntegerGrid(8, convention), granularity)
    run = deployed(quantized(net, x, Recipe(weight, activation)), make())
    with torch.no_grad():
        simulated = run.done.simulation(x).numpy()
    np.testing.assert_allclose(run.logits, simulated, atol=0.01 * np.abs(simulated).max())


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("make", "recipe"), RUNS, ids=NAMES)
def test_batches_of_any_size_are_what_the_simulation_says(made, make, recipe, batch):
    run = made(make, recipe)
    ids = run.job.inputs[:batch]
    session = start(run.engine, run.done.artefact.model, tuple(ids.shape), 1)
    (logits,) = session.run(np.ascontiguousarray(ids.numpy()))
    with torch.no_grad():
        simulated = run.done.simulation(ids).numpy()
    np.testing.assert_allclose(logits, simulated, atol=0.02 * np.abs(simulated).max())
    if recipe != "tensor":
        np.testing.assert_allclose(logits, run.logits[:batch], atol=0.02 * np.abs(simulated).max())


@pytest.mark.parametrize(("make", "recipe"), RUNS, ids=NAMES)
def test_padding_changes_no_result(made, make, recipe):
    run = made(make, recipe)
    texts = [run.job.inputs[row : row + 1, : 10 - row % 8] for row in range(6)]
    assert not any(text.eq(0).any() for text in texts)
    with torch.no_grad():
        alone = torch.cat([run.done.simulation(text) for text in texts]).numpy()
    # What stands at padding may widen the range of a tensor, but no token attends to it.
    limit = 0.1 if recipe == "tensor" else 0.02
    np.testing.assert_allclose(run.logits[:6], alone, atol=limit * np.abs(alone).max())


@pytest.mark.parametrize("make", [OnnxRuntime, OpenVino])
def test_codes_stored_signed_are_the_same_values(made, make):
    run = made(make, "static")
    off = {q.site for q in quantizers(run.done.simulation) if q.mode.value == "off"}
    unsigned = place(run.job.graph, off)
    assert not unsigned.signed and run.done.artefact.signed
    assert unsigned.codes.keys() == run.done.artefact.codes.keys()
    ids = run.job.inputs.numpy()
    codes = [start(run.engine, a.with_code_outputs(), ids.shape, 1).run(ids) for a in (unsigned, run.done.artefact)]
    pairs = zip((unsigned, run.done.artefact), codes, strict=True)
    shown = [dict(zip(artefact.code_tensors, found[1:], strict=True)) for artefact, found in pairs]
    for site, tensor in unsigned.codes.items():
        signed = run.done.artefact.codes[site]
        theirs = shown[1][signed].astype(np.int16) + 128 * (signed in run.done.artefact.signed)
        differ = np.abs(shown[0][tensor].astype(np.int16) - theirs)
        assert differ.max() <= 1 and (differ == 0).mean() > 0.99, site
    np.testing.assert_allclose(codes[0][0], codes[1][0], atol=0.02 * np.abs(codes[0][0]).max())


@pytest.mark.parametrize("make", [OnnxRuntime, OpenVino])
def test_the_formats_of_sites_are_those_that_the_engine_multiplies(made, make):
    run = made(make, "static")
    formats = {site: str(scheme.grid) for site, scheme in activation_schemes(run.done.simulation).items()}
    wide = "int8 wide_codes"
    of_attention = {side: formats[f"{BLOCK}.attention.{side}"] for side in ("scores.a", "scores.b", "context.b")}
    assert formats[f"{BLOCK}.attention.scores.b"] == formats[f"{BLOCK}.attention.context.b"] == wide
    # Values of one sign: shares of attention, and what GELU leaves.
    assert formats[f"{BLOCK}.attention.context.a"] == formats[f"{BLOCK}.output.input"] == "uint8 affine"
    assert of_attention["scores.a"] == (wide if make is OpenVino else "uint8 affine")
    signed = {site for site, tensor in run.done.artefact.codes.items() if tensor in run.done.artefact.signed}
    assert {site for site, name in formats.items() if name == wide} == signed


@pytest.mark.parametrize("make", [OnnxRuntime, OpenVino])
def test_tokens_are_int64_and_nothing_else(made, make):
    run = made(make, "static")
    assert run.done.artefact.model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.INT64
    session = start(run.engine, run.done.artefact.model, (2, 10), 1)
    with pytest.raises(Exception, match="nput|type"):  # each library raises its own
        session.run(run.job.inputs[:2].numpy().astype(np.float32))


def test_a_weight_alone_in_int8_leaves_its_input_alone(net, ids):
    """OpenVINO's default would quantize the input of a linear layer with int8 weights."""
    torch.manual_seed(0)
    x = torch.randn(4, 5, 64)
    x[..., 0] = 40  # beside which others would become codes of 0 and 1
    job = quantized(nn.Sequential(nn.Linear(64, 32)).eval(), x, RECIPES["static"])
    graph = place(job.graph, {"0.input"}).model
    weight = next(t for t in graph.graph.initializer if t.name.endswith("onnx_codes"))
    assert numpy_helper.to_array(weight).dtype == np.int8
    (found,) = start(OpenVino(), graph, tuple(x.shape), 1).run(x.numpy())
    layer = job.model[0]
    with torch.no_grad():
        exact = x.double() @ layer.weight_quantizer(layer.weight).double().T
        bias = layer.bias_quantizer(layer.bias, layer.input_quantizer, layer.weight_quantizer)
    np.testing.assert_allclose(found, (exact + bias).numpy(), rtol=1e-5, atol=1e-5)


def test_what_openvino_says_of_ranges_of_each_call_is_what_it_does(made, monkeypatch):
    run = made(OpenVino, "group")
    assert run.done.artefact.model.metadata_props[0].key == GROUP
    said = run.done.runs_int8("head")
    assert said == dynamic_is_supported(64)
    with torch.no_grad():
        weights_alone = copy.deepcopy(run.done.simulation)
        for q in quantizers(weights_alone):
            if not q.is_weight:
                q.mode = type(q.mode).OFF
        other = weights_alone(run.job.inputs).numpy()
        simulated = run.done.simulation(run.job.inputs).numpy()
    errors = [np.abs(run.logits - x).max() for x in (simulated, other)]
    assert (errors[0] < errors[1]) == said
    monkeypatch.setattr("qexp.engines.openvino._quantizes_dynamically", lambda *_: False)
    unsupported = deploy(run.engine, run.job.graph, run.done.simulation, run.job.flow, 1)
    assert unsupported.mac_coverage == 0


def test_an_engine_refuses_ranges_of_each_call_that_it_does_not_compute(made):
    flow = made(OnnxRuntime, "static").job.flow
    assert OpenVino().recipe(RECIPES["tensor"], flow).activation == RECIPES["group"].activation
    refusals = {
        (OnnxRuntime, "group"): "onnxruntime refuses the graph: it computes ranges of each call for tensors and tokens",
        (OpenVino, "token"): "openvino refuses the graph: it computes ranges of each call for groups .per_group., not",
    }
    for (make, name), sentence in refusals.items():
        with pytest.raises(EngineRefused, match=sentence):
            make().recipe(RECIPES[name], flow)
    narrow = Dataflow(nn.Sequential(nn.Linear(24, 8)), torch.zeros(2, 24))
    with pytest.raises(EngineRefused, match="no group of 128, 64, 32 features divides all linear layers"):
        OpenVino().recipe(RECIPES["tensor"], narrow)
    image = Dataflow(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 2)), torch.zeros(2, 1, 4, 4))
    with pytest.raises(EngineRefused, match="for linear layers, and 0 is none$"):
        OpenVino().recipe(RECIPES["tensor"], image)


class PreNorm(nn.Module):
    """y = x + W2 relu(W1 norm(x)), twice; the last sum goes into a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(32) for _ in range(2))
        self.up = nn.ModuleList(nn.Linear(32, 64) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(64, 32) for _ in range(2))
        self.sums = nn.ModuleList(Add() for _ in range(2))
        self.embed, self.head = nn.Linear(32, 32), nn.Linear(32, 5)

    def forward(self, x):
        x = self.embed(x)
        for norm, up, down, add in zip(self.norms, self.up, self.down, self.sums, strict=True):
            x = add(down(torch.relu(up(norm(x)))), x)
        return self.head(x.mean(1))


@pytest.fixture(scope="module")
def residual():
    torch.manual_seed(0)
    x = torch.randn(8, 6, 32)
    return quantized(PreNorm().eval(), x, RECIPES["static"])


@pytest.mark.parametrize("make", [OnnxRuntime, OpenVino])
def test_a_sum_in_front_of_a_norm_stays_in_float_and_another_does_not(residual, make):
    assert residual.flow.normalized_additions() == ["sums.0"]
    run = deployed(residual, make())
    sites = {site for site, _ in ((q.site, q) for q in quantizers(run.done.simulation)) if site.startswith("sums")}
    assert sites and all(site.startswith("sums.1") for site in sites)
    assert type(dict(residual.model.named_modules())["sums.0"]) is Add
    assert "sums.0" not in run.done.islands(residual.flow)
    assert run.done.mac_coverage == 1
    assert run.figures["parity/local_identical"] >= 0.999 and run.figures["parity/local_max_step"] <= 1


def test_networks_of_convolutions_have_no_such_sum_and_keep_their_formats():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.add, self.head = nn.Conv2d(2, 2, 3, padding=1), Add(), nn.Linear(2, 3)

        def forward(self, x):
            return self.head(torch.relu(self.add(self.conv(x), x)).mean((2, 3)))

    flow = Dataflow(Net().eval(), torch.randn(2, 2, 4, 4))
    assert flow.normalized_additions() == [] and flow.products() == []
    schemes = {"conv.input": AFFINE, "add.b": symmetric(AFFINE), "head.input": AFFINE}
    for engine in OnnxRuntime(), OpenVino():
        assert engine.recipe(RECIPES["static"], flow) == RECIPES["static"]
        assert engine.signed_sites(flow, schemes) == set()
        assert engine.float_sites(flow, schemes) == set()


def test_sums_and_products_with_ranges_of_each_call_stay_in_float(residual):
    model = copy.deepcopy(residual.net)
    quantize_(model, RECIPES["tensor"], in_float=residual.flow.normalized_additions())
    with torch.no_grad(), calibrating(model):
        model(residual.inputs)
    job = SimpleNamespace(**vars(residual) | {"model": model, "graph": export_quantized(model, residual.flow)})
    run = deployed(job, OnnxRuntime())
    active = activation_schemes(run.done.simulation)
    assert active.keys() == {f"{name}.input" for name in residual.flow.linear_layers()}
    assert run.done.mac_coverage == 1 and run.done.islands(residual.flow) == ["sums.1"]
    assert run.figures["parity/local_identical"] >= 0.999
    assert {name for name, _ in layers(model)} > {"sums.1"}
