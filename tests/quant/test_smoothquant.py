"""SmoothQuant: the function stays, scales are those of the equation, and the search is right about its candidates."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qexp.engines.base import start
from qexp.engines.deploy import deploy, simulation_for
from qexp.engines.export import export_quantized
from qexp.engines.onnxruntime import OnnxRuntime
from qexp.engines.openvino import OpenVino
from qexp.models.encoder import bert_tiny_random
from qexp.quant import smoothquant
from qexp.quant.convert import calibrating, quantize_
from qexp.quant.dataflow import Dataflow
from qexp.quant.granularity import PerChannel, PerTensor, PerToken
from qexp.quant.grid import IntegerGrid
from qexp.quant.layers import Add, QuantScaledLinear
from qexp.quant.quantizer import Mode
from qexp.quant.recipe import Recipe, Scheme
from qexp.quant.smooth_groups import Group, find_groups
from qexp.quant.smoothquant import factors, observing_inputs, smooth_

pytestmark = pytest.mark.usefixtures("one_thread")
WEIGHT = Scheme(IntegerGrid(8), PerChannel(0))
RECIPE = Recipe(WEIGHT, Scheme(IntegerGrid(8, "affine"), PerTensor()))
ALPHAS = [step / 10 for step in range(11)]


class PreNorm(nn.Module):
    """x + W2 GELU(W1 LayerNorm(x)): the residual does not pass the norm."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.norm, self.up, self.gelu, self.down, self.add = (
            nn.LayerNorm(width), nn.Linear(width, 16), nn.GELU(), nn.Linear(16, width), Add(),
        )  # fmt: skip

    def forward(self, x):
        return self.add(x, self.down(self.gelu(self.up(self.norm(x)))))


class PostNorm(nn.Module):
    """h = LayerNorm(x), y = LayerNorm(h + W2 GELU(W1 h)), and a layer behind: the residual passes the first norm."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.norm, self.up, self.gelu, self.down, self.add = (
            nn.LayerNorm(width), nn.Linear(width, 16), nn.GELU(), nn.Linear(16, width), Add(),
        )  # fmt: skip
        self.drop, self.norm2, self.head = nn.Dropout(0.1), nn.LayerNorm(width), nn.Linear(width, 3, bias=False)

    def forward(self, x):
        h = self.drop(self.norm(x))
        return self.head(self.norm2(self.add(self.down(self.gelu(self.up(h))), h)))


@torch.no_grad()
def alive(net: nn.Module, outlier: float = 20.0) -> nn.Module:
    """With norms as training leaves them, one channel being far larger than the others."""
    generator = torch.Generator().manual_seed(1)
    for module in net.modules():
        if isinstance(module, nn.LayerNorm):
            module.weight.uniform_(0.3, 2.0, generator=generator)
            module.bias.normal_(generator=generator)
            module.weight[3] *= outlier
    return net.eval()


def tokens(count: int = 4, width: int = 8) -> torch.Tensor:
    return torch.randn(count, 6, width, generator=torch.Generator().manual_seed(2))


def ids() -> torch.Tensor:
    drawn = torch.randint(1, 64, (4, 12), generator=torch.Generator().manual_seed(3))
    drawn[1, 7:] = 0
    return drawn


def smoothed(net, x, alphas=(0.5,), recipe=RECIPE, explicit=False):
    model = copy.deepcopy(net)
    groups, _ = find_groups(net, Dataflow(net, x[:2]), explicit)
    with torch.no_grad(), observing_inputs(model, groups, 1024) as seen:
        model(x)
    return model, smooth_(model, groups, seen, recipe, alphas)


NETS = {
    "pre-norm": (PreNorm, tokens, 1),
    "post-norm": (PostNorm, tokens, 2),
    "bert": (lambda: bert_tiny_random(3, vocabulary=64), ids, 4),
}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@torch.no_grad()
def test_the_network_computes_the_same_and_its_activations_do_not(name, alpha):
    torch.manual_seed(0)
    make, draw, count = NETS[name]
    net, x = alive(make()), draw()
    model, rows = smoothed(net, x, [alpha])
    expected = net(x)
    assert len(rows) == count
    assert (model(x) - expected).abs().max() <= 1e-5 * expected.abs().max()
    for row in rows:
        assert not torch.equal(model.get_submodule(row.norm).weight, net.get_submodule(row.norm).weight)
        assert row.how == f"folded into {row.norm}"
        for layer in row.layers:
            assert not torch.equal(model.get_submodule(layer).weight, net.get_submodule(layer).weight)


@pytest.mark.parametrize("name", NETS)
@torch.no_grad()
def test_powers_of_two_change_no_bit(name, monkeypatch):
    torch.manual_seed(0)
    make, draw, _ = NETS[name]
    net, x = alive(make()), draw()
    exact = factors
    monkeypatch.setattr(smoothquant, "factors", lambda *given: exact(*given).log2().round().exp2())
    model, rows = smoothed(net, x)
    assert max(row.largest for row in rows) >= 2
    assert torch.equal(model(x), net(x))


def test_scales_are_those_of_equation_4_by_hand():
    # max|X| = 16, 1, 4 and max|W| = 1, 4, 4: s = sqrt(16 / 1), sqrt(1 / 4), sqrt(4 / 4).
    net = nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 2, bias=False)).eval()
    net[1].weight.data = torch.tensor([[0.5, -4.0, 2.0], [-1.0, 3.0, 4.0]])
    group = Group("0", ("1",))
    seen = {"1": smoothquant.Seen(3)}
    seen["1"].update(torch.tensor([[[16.0, 0.5, -4.0], [-2.0, -1.0, 3.0]]]))
    (row,) = smooth_(net, [group], seen, RECIPE)
    assert (row.alpha, row.largest, row.outliers, row.sqnr_db) == (0.5, 4.0, (4.0, 1.0), {})
    assert torch.equal(net[0].weight.detach(), torch.tensor([0.25, 2.0, 1.0]))
    assert torch.equal(net[1].weight.detach(), torch.tensor([[2.0, -2.0, 2.0], [-4.0, 1.5, 4.0]]))


def test_scales_of_any_alpha_are_those_of_the_formula():
    x, w = [3.0, 0.2, 7.0], [0.5, 2.0, 0.1]
    for alpha in ALPHAS:
        expected = [a**alpha / b ** (1 - alpha) for a, b in zip(x, w, strict=True)]
        assert factors(torch.tensor(x), torch.tensor(w), alpha).tolist() == pytest.approx(expected, rel=1e-6)


@torch.no_grad()
def test_alpha_1_makes_activations_equal_and_alpha_0_weights():
    torch.manual_seed(0)
    net, x = alive(PreNorm()), tokens()
    ones = torch.ones(8)
    easy, _ = smoothed(net, x, [1.0])
    assert torch.allclose(easy.norm(x).abs().amax((0, 1)), ones, rtol=1e-5)
    hard, _ = smoothed(net, x, [0.0])
    assert torch.allclose(hard.up.weight.abs().amax(0), ones, rtol=1e-5)


def test_channels_that_are_dead_on_either_side_stay_and_nearly_dead_ones_stay_finite():
    s = factors(torch.tensor([0.0, 8.0, 1e-30, 8.0]), torch.tensor([1.0, 0.0, 1.0, 1e-30]), 0.5)
    assert s[:2].tolist() == [1.0, 1.0]
    assert s[2:].tolist() == pytest.approx([1e-5**0.5, 8**0.5 / 1e-5**0.5])


def brute_force(net: nn.Module, x: torch.Tensor, alpha: float, recipe: Recipe) -> float:
    """Error of the outputs of all layers that read the norm, from the modules that a run would have."""
    model, (row,) = smoothed(net, x, [alpha])
    with torch.no_grad():
        floats = [net.get_submodule(name)(net.norm(x)) for name in row.layers]
        h = model.norm(x)
        parts = nn.ModuleDict({name: model.get_submodule(name) for name in row.layers})
        quantize_(parts, recipe, shapes={f"{name}.input": (1, *h.shape[1:]) for name in row.layers})
        with calibrating(parts):
            for layer in parts.values():
                layer(h)
        assert all(layer.input_quantizer.mode is Mode.QUANTIZE for layer in parts.values())
        pairs = zip(parts.values(), floats, strict=True)
        return sum(float((layer(h) - y).double().square().sum()) for layer, y in pairs)


class TwoReaders(nn.Module):
    """A norm with two linear layers, as queries and keys are."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.a, self.b = nn.Linear(8, 5, bias=False), nn.Linear(8, 7, bias=False)

    def forward(self, x):
        h = self.norm(x)
        return self.a(h).sum(-1) + self.b(h).sum(-1)


@pytest.mark.parametrize("granularity", [PerTensor(), PerToken()], ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_the_search_takes_the_best_of_its_candidates(granularity, bits):
    torch.manual_seed(0)
    net, x = alive(TwoReaders()), tokens(16)
    recipe = Recipe(Scheme(IntegerGrid(bits), PerChannel(0)), Scheme(IntegerGrid(bits, "affine"), granularity))
    _, (row,) = smoothed(net, x, ALPHAS, recipe)
    errors = {alpha: brute_force(net, x, alpha, recipe) for alpha in ALPHAS}
    assert row.alpha == min(errors, key=errors.get)
    with torch.no_grad():
        signal = sum(float(layer(net.norm(x)).double().square().sum()) for layer in (net.a, net.b))
    expected = {alpha: 10 * math.log10(signal / error) for alpha, error in errors.items()}
    assert row.sqnr_db == pytest.approx(expected, abs=1e-3)


@torch.no_grad()
def test_an_outlier_channel_that_moves_lowers_the_error_of_one_scale_for_all():
    torch.manual_seed(0)
    net, x = alive(PostNorm(), outlier=60.0), tokens(16)

    def error(model: nn.Module) -> float:
        model, expected = copy.deepcopy(model), net(x)
        quantize_(model, RECIPE)
        with calibrating(model):
            model(x)
        return float((model(x) - expected).square().mean())

    model, rows = smoothed(net, x)
    assert all(before > 20 and after < 0.5 * before for before, after in (row.outliers for row in rows))
    assert error(model) < 0.5 * error(net)


class Readers(nn.Module):
    """A norm whose output is read by a linear layer, and by what a test says."""

    def __init__(self, also, norm=None):
        super().__init__()
        self.norm = nn.LayerNorm(8) if norm is None else norm
        self.fc, self.norm2, self.add, self.also = nn.Linear(8, 8), nn.LayerNorm(8), Add(), also

    def forward(self, x):
        h = self.norm(x)
        return self.also(self, h, self.fc(h))


PROBLEMS = {
    "another norm": (lambda net, h, y: y + net.norm2(h), "also read by layer_norm in norm2"),
    "pooling": (lambda net, h, y: y.mean(1) + h.mean(1), "also read by mean"),
    "a function": (lambda net, h, y: h + y, "also read by add"),
    "output": (lambda net, h, y: (h, y), "also read by whoever calls the model"),
    "twice": (lambda net, h, y: net.fc(y) + y, "also read by fc, which is used more than once"),
    "norm twice": (lambda net, h, y: net.norm(y), "its norm is used more than once"),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_norm_with_another_reader_is_left_alone_with_the_reason(name):
    also, reason = PROBLEMS[name]
    net = Readers(also).eval()
    groups, others = find_groups(net, Dataflow(net, tokens(2)))
    assert "norm" not in [group.norm for group in groups]
    assert reason in [row.reason for row in others if row.norm == "norm"]


def test_norms_without_a_gamma_for_each_channel_are_left_alone():
    for norm in nn.LayerNorm(8, elementwise_affine=False), nn.LayerNorm((6, 8)):
        net = Readers(lambda net, h, y: y, norm).eval()
        groups, others = find_groups(net, Dataflow(net, tokens(2)))
        assert not groups
        assert others[0].reason == "its norm has no gamma for each channel, into which a scale could be folded"


def test_layers_that_no_norm_feeds_are_told_with_what_feeds_them():
    net = alive(bert_tiny_random(3, vocabulary=64, layers=1))
    groups, others = find_groups(net, Dataflow(net, ids()[:2]))
    block = "encoder.layers.0"
    heads = tuple(f"{block}.attention.{name}" for name in ("query", "key", "value"))
    assert groups == [
        Group("encoder.embeddings.norm", heads, (f"{block}.attention_add.b",)),
        Group(f"{block}.attention_norm", (f"{block}.intermediate",), (f"{block}.output_add.b",)),
    ]
    assert {row.layers[0]: row.reason for row in others} == {
        f"{block}.attention.output": f"fed by matmul in {block}.attention.context, and not by a LayerNorm",
        f"{block}.output": "fed by gelu, which a scale cannot pass",
        "head": "fed by div, and not by a LayerNorm",
    }


def test_a_residual_that_is_added_to_itself_has_a_factor_on_either_side():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.fc, self.add = nn.LayerNorm(8), nn.Linear(8, 1), Add()

        def forward(self, x):
            h = self.norm(x)
            return self.add(h, h) + self.fc(h)

    net, x = alive(Twice()), tokens()
    model, _ = smoothed(net, x)
    assert torch.equal(model.add.a_factor, model.add.b_factor)
    with torch.no_grad():
        assert torch.allclose(model(x), net(x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_factor_comes_behind_the_quantizer_and_into_the_state():
    torch.manual_seed(0)
    net, x = alive(PostNorm()), tokens()
    assert not [name for name in net.state_dict() if "factor" in name]
    model, _ = smoothed(net, x)
    assert [name for name in model.state_dict() if "factor" in name] == ["add.b_factor"]
    quantize_(model, RECIPE)
    with calibrating(model):
        model(x)
    a, h = torch.randn(2, 6, 8), model.norm(x[:2])
    add = model.add
    assert torch.equal(add(a, h), add.a_quantizer(a) + add.b_quantizer(h) * add.b_factor)


def test_excluded_layers_have_no_say_and_stay_exact():
    torch.manual_seed(0)
    net, x = alive(TwoReaders()), tokens()
    net.a.weight.data *= 100
    _, (alone,) = smoothed(net, x, [0.0], Recipe(exclude=("a",)))
    assert alone.largest == pytest.approx(float(1 / net.b.weight.detach().abs().amax(0).min()), rel=1e-6)
    model, (none,) = smoothed(net, x, [0.5], Recipe(exclude=("a", "b")))
    assert none.reason == "all of its layers are excluded" and none.alpha is None
    assert torch.equal(model.norm.weight, net.norm.weight)


def test_shared_parameters_are_parted():
    net = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)).eval()
    net[3].weight = net[1].weight
    alive(net)
    with torch.no_grad():
        assert torch.allclose(smoothed(net, tokens())[0](tokens()), net(tokens()), atol=1e-5)


def test_what_is_not_finite_is_refused_by_its_norm():
    net, x = alive(PreNorm()), tokens()
    x[0, 0, 0] = math.nan
    with pytest.raises(ValueError, match=r"^up.input: holds NaN or infinite values$"):
        smoothed(net, x)


def bert(layers: int = 1) -> nn.Module:
    torch.manual_seed(0)
    return alive(bert_tiny_random(3, vocabulary=64, layers=layers))


def hows(net: nn.Module, x: torch.Tensor) -> dict[str, str]:
    groups, _ = find_groups(net, Dataflow(net, x[:2]), explicit=True)
    return {name: group.how for group in groups for name in group.layers}


def test_every_linear_layer_of_an_encoder_is_in_a_group_where_that_is_asked_for():
    net, block = bert(), "encoder.layers.0"
    assert find_groups(net, Dataflow(net, ids()[:2]), explicit=True)[1] == []
    assert hows(net, ids()) == {
        **{f"{block}.attention.{n}": "folded into encoder.embeddings.norm" for n in ("query", "key", "value")},
        f"{block}.intermediate": f"folded into {block}.attention_norm",
        f"{block}.attention.output": "multiplied in front",
        f"{block}.output": "multiplied in front",
        "head": "multiplied in front",
    }


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@torch.no_grad()
def test_the_network_computes_the_same_with_all_linear_layers_smoothed(name, alpha):
    torch.manual_seed(0)
    make, draw, _ = NETS[name]
    net, x = alive(make()), draw()
    model, rows = smoothed(net, x, [alpha], explicit=True)
    expected = net(x)
    assert (model(x) - expected).abs().max() <= 1e-5 * expected.abs().max()
    changed = {n for n, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    assert {layer for row in rows for layer in row.layers} == changed
    for n in changed:
        assert not torch.equal(model.get_submodule(n).weight, net.get_submodule(n).weight)


@pytest.mark.parametrize("name", NETS)
@torch.no_grad()
def test_powers_of_two_change_no_bit_of_any_linear_layer(name, monkeypatch):
    torch.manual_seed(0)
    make, draw, _ = NETS[name]
    net, x = alive(make()), draw()
    exact = factors
    monkeypatch.setattr(smoothquant, "factors", lambda *given: exact(*given).log2().round().exp2())
    model, _ = smoothed(net, x, explicit=True)
    assert torch.equal(model(x), net(x))


def test_a_factor_in_front_is_that_of_equation_4_by_hand():
    # max|X| = 16, 1 and max|W| = 1, 4: s = sqrt(16 / 1), sqrt(1 / 4).
    net = nn.Sequential(nn.Linear(2, 2))
    net[0].weight.data, net[0].bias.data = torch.tensor([[0.5, -4.0], [-1.0, 3.0]]), torch.tensor([8.0, 1.0])
    seen = {"0": smoothquant.Seen(2)}
    seen["0"].update(torch.tensor([[[16.0, 0.5], [-2.0, -1.0]]]))
    (row,) = smooth_(net, [Group("", ("0",))], seen, RECIPE)
    assert (row.how, row.largest) == ("multiplied in front", 4.0)
    assert torch.equal(net[0].weight.detach(), torch.tensor([[2.0, -2.0], [-4.0, 1.5]]))
    assert torch.equal(net[0].bias.detach(), torch.tensor([8.0, 1.0]))
    assert torch.equal(net[0].factor, torch.tensor([0.25, 2.0]))


def test_a_layer_behind_a_norm_that_cannot_take_it_or_that_runs_twice_multiplies_itself():
    net = alive(Readers(lambda net, h, y: net.fc(y) + h))
    model, rows = smoothed(net, tokens(), explicit=True)
    assert [(row.layers, row.how) for row in rows] == [(("fc",), "multiplied in front")]
    with torch.no_grad():
        assert torch.allclose(model(tokens()), net(tokens()), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_what_is_quantized_is_what_was_multiplied():
    torch.manual_seed(0)
    net, x = alive(PreNorm()), tokens()
    model, _ = smoothed(net, x, [1.0], explicit=True)
    h = model.gelu(model.up(model.norm(x)))
    quantize_(model, RECIPE)
    with calibrating(model):
        model(x)
    down = model.down
    assert type(down) is QuantScaledLinear and down.input_quantizer.hi == pytest.approx(1, rel=1e-5)
    q, w = down.input_quantizer(h * down.factor), down.weight_quantizer(down.weight)
    bias = down.bias_quantizer(down.bias, down.input_quantizer, down.weight_quantizer)
    assert torch.equal(down(h), F.linear(q, w, bias))


def test_values_behind_gelu_stay_of_one_sign_behind_a_positive_factor_alone():
    net, x = alive(PreNorm()), tokens()
    model, _ = smoothed(net, x, explicit=True)
    assert Dataflow(model, x).one_sided() == Dataflow(net, x).one_sided() == {"down.input"}
    model.down.factor[0] = -1.0
    assert Dataflow(model, x).one_sided() == set()


def lone_layer(x: torch.Tensor, alpha: float, recipe: Recipe, sample: int) -> tuple[nn.Module, float, float]:
    """A layer smoothed by alpha and calibrated on all tokens; its error and its SQNR on those that are kept."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 5, bias=False))
    model, groups = copy.deepcopy(net), [Group("", ("0",))]
    with torch.no_grad(), observing_inputs(model, groups, sample) as seen:
        model(x)
    rows = seen["0"].rows()
    smooth_(model, groups, seen, recipe, [alpha])
    quantize_(model, recipe)
    with calibrating(model), torch.no_grad():
        model(x)
    with torch.no_grad():
        error, signal = (float(y.double().square().sum()) for y in (model(rows) - net(rows), net(rows)))
    return net, error, 10 * math.log10(signal / error)


@pytest.mark.parametrize("sample", [20, 1024])
def test_the_search_knows_the_range_of_all_tokens_and_takes_what_brute_force_takes(sample):
    x = tokens(50) * torch.linspace(0.1, 3, 8) ** 3
    x[0, 0] *= 10  # which is none of 20 tokens
    x = F.gelu(x)
    by_force = {alpha: lone_layer(x, alpha, RECIPE, sample)[1:] for alpha in ALPHAS}
    net, groups = lone_layer(x, 0.5, RECIPE, sample)[0], [Group("", ("0",))]
    with torch.no_grad(), observing_inputs(net, groups, sample) as seen:
        net(x)
    (row,) = smooth_(net, groups, seen, RECIPE, ALPHAS)
    assert row.alpha == min(by_force, key=lambda alpha: by_force[alpha][0])
    assert row.sqnr_db == pytest.approx({alpha: sqnr for alpha, (_, sqnr) in by_force.items()}, abs=1e-3)


@pytest.mark.parametrize("engine", [OnnxRuntime(), OpenVino()], ids=lambda engine: engine.name)
def test_engines_multiply_before_they_quantize_and_run_all_layers_in_int8(engine):
    net, x = bert(), ids()
    flow = Dataflow(net, x[:2])
    recipe = engine.recipe(Recipe(activation=Scheme(IntegerGrid(8, "affine"))), flow)
    model, _ = smoothed(net, x, [0.8], recipe, explicit=True)
    quantize_(model, recipe, in_float=flow.normalized_additions())
    with calibrating(model), torch.no_grad():
        model(x)
    graph = export_quantized(model, flow)
    writers = {tensor: node for node in graph.graph.node for tensor in node.output}
    for name in "encoder.layers.0.attention.output", "encoder.layers.0.output", "head":
        quantize = next(node for node in graph.graph.node if node.name == f"{name}.input")
        assert quantize.op_type == "QuantizeLinear"
        multiply = writers[quantize.input[0]]
        assert (multiply.op_type, multiply.name) == ("Mul", f"{name}/Mul")
    simulation = simulation_for(engine, model, flow)
    deployment = deploy(engine, graph, simulation, flow, 1)
    assert deployment.mac_coverage == 1.0 and deployment.islands(flow) == []
    (logits,) = start(engine, deployment.artefact.model, tuple(x.shape), 1).run(x.numpy())
    with torch.no_grad():
        assert torch.allclose(torch.from_numpy(logits), simulation(x), rtol=1e-2, atol=1e-2)
