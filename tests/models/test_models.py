"""Model families: sizes, shapes, and a structure that quantization can address."""

import inspect
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from qexp.models import mobilenet, mobilenet_v2, resnet8, resnet18
from qexp.quant.layers import Add

SMALL = [resnet8, mobilenet]
IMAGENET = [resnet18, mobilenet_v2]
FAMILIES = SMALL + IMAGENET
CONF = Path(__file__).parents[2] / "conf"


def image(model: nn.Module, size: int) -> torch.Tensor:
    channels = next(m for m in model.modules() if isinstance(m, nn.Conv2d)).in_channels
    return torch.randn(2, channels, size, size)


class Tracer(torch.fx.Tracer):
    """Keeps `Add` whole, as its quantization needs."""

    def is_leaf_module(self, module, name):
        return isinstance(module, Add) or super().is_leaf_module(module, name)


def traced(family):
    model = family().eval()
    return torch.fx.GraphModule(model, Tracer().trace(model))


@pytest.mark.parametrize(("family", "count"), [(resnet18, 11_689_512), (mobilenet_v2, 3_504_872)])
def test_the_imagenet_models_have_the_published_sizes(family, count):
    assert sum(p.numel() for p in family().parameters()) == count


@pytest.mark.parametrize("family", SMALL)
def test_the_small_models_are_small(family):
    assert 70_000 <= sum(p.numel() for p in family().parameters()) <= 80_000


@pytest.mark.parametrize("family", FAMILIES)
def test_channels_classes_and_batch_follow_the_arguments(family):
    model = family(in_channels=2, num_classes=7).eval()
    assert model(torch.randn(3, 2, 33, 40)).shape == (3, 7)


@pytest.mark.parametrize("family", SMALL)
def test_a_double_width_about_quadruples_the_weights(family):
    narrow, wide = (sum(p.numel() for p in family(width=w).parameters()) for w in (8, 16))
    assert 3.2 < wide / narrow < 4


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trace_computes_what_the_model_computes(family):
    model = family().eval()
    x = image(model, 32)
    with torch.no_grad():
        torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), model(x))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_operation_is_a_named_module_used_once(family):
    nodes = [n for n in traced(family).graph.nodes if n.op not in ("placeholder", "output")]
    assert {n.op for n in nodes} == {"call_module"}
    targets = [n.target for n in nodes]
    assert len(targets) == len(set(targets))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_trace_visits_every_leaf(family):
    leaves = {name for name, module in family().named_modules() if not list(module.children())}
    assert leaves == {n.target for n in traced(family).graph.nodes if n.op == "call_module"}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_convolution_is_followed_by_its_own_batch_norm(family):
    graph = traced(family)
    for node in graph.graph.nodes:
        if node.op == "call_module" and isinstance(graph.get_submodule(node.target), nn.Conv2d):
            (user,) = node.users
            assert isinstance(graph.get_submodule(user.target), nn.BatchNorm2d)


@pytest.mark.parametrize(("family", "additions"), [(resnet8, 3), (resnet18, 8), (mobilenet_v2, 10)])
def test_residuals_add_the_branch_to_the_skip(family, additions):
    graph = traced(family)
    found = 0
    for node in graph.graph.nodes:
        if node.op == "call_module" and isinstance(graph.get_submodule(node.target), Add):
            branch, _skip = node.args
            block = node.target.rsplit(".", 1)[0]
            assert branch.target in (f"{block}.bn2", f"{block}.project.bn")
            found += 1
    assert found == additions


def test_sites_have_readable_names():
    names = dict(resnet8().named_modules())
    assert {"stem.conv", "stage2.0.conv1", "stage2.0.add", "stage2.0.shortcut.conv", "head.fc"} <= set(names)
    names = dict(mobilenet().named_modules())
    assert {"blocks.1.depthwise.conv", "blocks.1.pointwise.relu", "head.fc"} <= set(names)


@pytest.mark.parametrize("family", FAMILIES)
def test_convolutions_start_he_normal_in_the_outputs_that_a_channel_feeds(family):
    torch.manual_seed(0)
    for module in family().modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 1000:
            fan_out = module.out_channels / module.groups * module.weight[0, 0].numel()
            assert module.weight.std().item() * (fan_out / 2) ** 0.5 == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("family", SMALL)
def test_every_parameter_learns(family):
    model = family()
    nn.functional.cross_entropy(model(image(model, 8)), torch.tensor([1, 2])).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("option", ["in_channels", "num_classes"])
@pytest.mark.parametrize("value", [0, -1, 2.0, True, None])
def test_a_bad_size_is_named(family, option, value):
    with pytest.raises(ValueError, match=f"^model.{option}={value}: must be a whole number"):
        family(**{option: value})


def test_a_mobilenet_has_the_activation_that_is_asked_for_everywhere():
    kinds = {name: {type(m) for m in mobilenet(activation=name).modules()} for name in ("relu", "relu6")}
    assert nn.ReLU in kinds["relu"] and nn.ReLU6 not in kinds["relu"]
    assert nn.ReLU6 in kinds["relu6"] and nn.ReLU not in kinds["relu6"]
    with pytest.raises(ValueError, match="^model.activation='gelu': allowed are relu, relu6$"):
        mobilenet(activation="gelu")


def test_a_bad_width_is_named():
    for family in SMALL:
        with pytest.raises(ValueError, match="^model.width=0: "):
            family(width=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_configuration_spells_every_option_with_its_default(family):
    name = family.__name__
    written = OmegaConf.to_container(OmegaConf.load(CONF / "model" / f"{name}.yaml"))
    assert written.pop("_target_") == f"qexp.models.{name}"
    defaults = {name: p.default for name, p in inspect.signature(family).parameters.items()}
    # These two follow the data at run time.
    assert defaults.pop("in_channels") and defaults.pop("num_classes")
    assert written == defaults
