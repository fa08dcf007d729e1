"""Conversion of models: swapping, calibrating, and what each of them leaves alone."""

import copy
import io
import math

import pytest
import torch
from torch import nn

from qexp.quant import convert, rounding
from qexp.quant import recipe as recipes
from qexp.quant.calibration import MinMax, MovingAverage, Percentile
from qexp.quant.convert import (
    calibrating,
    layers,
    observing,
    prepare_export_,
    quantize_,
    quantizers,
    recall_,
    refuse_unquantizable,
    set_mode_,
    unquantized,
)
from qexp.quant.entropy import Entropy
from qexp.quant.granularity import PerChannel
from qexp.quant.grid import IntegerGrid
from qexp.quant.layers import QuantConv2d, QuantLinear
from qexp.quant.quantizer import Mode
from qexp.quant.recipe import Recipe, Scheme
from qexp.quant.search import MSE
from qexp.quant.sites import site_shapes

RECIPE = Recipe(Scheme(IntegerGrid(8), PerChannel(0)))


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()


def images(n=8):
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def calibrated(model=None, recipe=RECIPE):
    model = model or small()
    quantize_(model, recipe)
    with calibrating(model), torch.no_grad():
        model(images())
    return model


def test_quantizing_keeps_objects_parameters_and_their_names():
    model = small()
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    keys = set(model.state_dict())
    quantize_(model, RECIPE)
    assert all(model.get_submodule(name) is module for name, module in modules.items())
    assert dict(model.named_parameters()).keys() == parameters.keys()
    assert all(model.get_parameter(name) is parameter for name, parameter in parameters.items())
    assert keys <= set(model.state_dict())
    assert [type(m) for _, m in layers(model)][::2] == [QuantConv2d, QuantLinear]


def test_a_quantized_model_computes_in_float_until_it_is_calibrated():
    model = small()
    expected = model(images())
    quantize_(model, RECIPE)
    assert torch.equal(model(images()), expected)
    with calibrating(model) as same:
        assert same is model
        assert torch.equal(model(images()), expected)
    assert not torch.equal(model(images()), expected)
    assert torch.allclose(model(images()), expected, atol=0.05)


REFUSED = {
    "MultiheadAttention": nn.MultiheadAttention(4, 2),
    "ConvTranspose2d": nn.ConvTranspose2d(1, 1, 1),
    "Conv1d": nn.Conv1d(1, 1, 1),
    "Conv3d": nn.Conv3d(1, 1, 1),
    "LSTM": nn.LSTM(2, 2),
    "Bilinear": nn.Bilinear(2, 2, 2),
}


@pytest.mark.parametrize(("kind", "layer"), REFUSED.items(), ids=REFUSED)
def test_layers_without_a_quantized_counterpart_are_refused_by_name(kind, layer):
    model = nn.ModuleDict({"known": nn.Linear(2, 2), "body": nn.ModuleDict({"strange": copy.deepcopy(layer)})})
    with pytest.raises(ValueError, match=f"'body.strange' is .*{kind}"):
        quantize_(model, RECIPE)
    assert type(model["known"]) is nn.Linear
    for pattern in "body", "body.strange", "*.strange":
        refuse_unquantizable(model, Recipe(exclude=(pattern,)))


def test_lookups_stay_in_float_and_are_listed_with_normalisations():
    model = nn.ModuleDict({"table": nn.Embedding(3, 2), "fc": nn.Linear(2, 2), "norm": nn.LayerNorm(2)})
    quantize_(model, RECIPE)
    assert [(name, kind) for name, kind, _ in unquantized(model, RECIPE)] == [
        ("table", "Embedding"),
        ("norm", "LayerNorm"),
    ]


def test_a_model_without_layers_to_quantize_is_refused():
    with pytest.raises(ValueError, match="no layer to quantize"):
        quantize_(nn.Sequential(nn.ReLU()), RECIPE)
    with pytest.raises(ValueError, match="no layer (of Sequential )?to quantize"):
        quantize_(small(), Recipe(exclude=("0", "4")))


@pytest.mark.parametrize(
    ("patterns", "left"),
    [
        (("stage1",), ["stage1.conv1", "stage1.conv2"]),
        (("stage1.*",), ["stage1.conv1", "stage1.conv2"]),
        (("*.conv1", "fc"), ["stage1.conv1", "stage2.conv1", "fc"]),
        (("stage?.conv2",), ["stage1.conv2", "stage2.conv2"]),
        ((), []),
    ],
)
def test_excluded_layers_stay_in_float_and_say_why(patterns, left):
    def stage():
        return nn.ModuleDict({"conv1": nn.Conv2d(1, 1, 1), "conv2": nn.Conv2d(1, 1, 1)})

    model = nn.ModuleDict({"stage1": stage(), "stage2": stage(), "fc": nn.Linear(2, 2)})
    recipe = Recipe(exclude=patterns)
    quantize_(model, recipe)
    assert [name for name, m in model.named_modules() if type(m) in (nn.Conv2d, nn.Linear)] == left
    rows = unquantized(model, recipe)
    assert [name for name, _, _ in rows] == left
    assert all("exclude" in reason for _, _, reason in rows)


@pytest.mark.parametrize("pattern", ["stage9", "1.*", "Linear", "", "44"])
def test_a_pattern_without_a_match_is_refused(pattern):
    with pytest.raises(ValueError, match=f"exclude='{pattern.replace('*', '.')}"):
        quantize_(small(), Recipe(exclude=("0", pattern)))


@pytest.mark.parametrize(("field", "tensors"), [("activation", "activations"), ("weight", "weights")])
def test_a_granularity_that_no_int8_engine_computes_with_is_simulated_and_not_exported(field, tensors):
    recipe = Recipe(**{field: Scheme(granularity=PerChannel(1))})
    assert recipe.simulation_only.startswith(f"{tensors} are per_channel(axis=1), whose scales")
    assert RECIPE.simulation_only is None
    model = small()
    quantize_(model, recipe, shapes=site_shapes(model, images()))
    with calibrating(model), torch.no_grad():
        model(images())
    assert torch.allclose(model(images()), small()(images()), atol=0.05)
    with pytest.raises(ValueError, match=f"^0.{'input' if field == 'activation' else 'weight'}: .*no int8 form"):
        prepare_export_(model)


class Stop(Exception):
    """Raised inside calibration blocks."""


def snapshot(model):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return state, [q.mode for q in quantizers(model)], [q.observer for q in quantizers(model)]


def assert_is(model, expected):
    state, *rest = snapshot(model)
    assert rest == list(expected[1:])
    changed = [name for name, tensor in state.items() if not torch.equal(tensor, expected[0][name])]
    assert not changed


def uncalibrated():
    model = small()
    quantize_(model, RECIPE)
    return model


@pytest.mark.parametrize("model", [uncalibrated, calibrated])
def test_an_error_inside_the_block_restores_everything(model):
    model = model()
    expected = snapshot(model)
    with pytest.raises(Stop), calibrating(model):
        model(images() * 3)
        model[0].weight_quantizer.mode = Mode.QUANTIZE
        raise Stop
    assert_is(model, expected)


def test_an_error_inside_the_block_keeps_the_bias_of_a_dead_channel():
    model = small()
    with torch.no_grad():
        model[4].weight[1], model[4].bias[1] = 1e-12, 0.1
    calibrated(model)
    expected = model(images())
    with pytest.raises(Stop), calibrating(model):
        raise Stop
    assert torch.equal(model(images()), expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_activations_are_refused_at_the_site_that_sees_them(bad):
    model, x = small(), images()
    quantize_(model, RECIPE)
    expected = snapshot(model)
    x[3, 0, 2, 2] = bad
    with pytest.raises(ValueError, match=r"^0\.input: .*NaN or infinite"), calibrating(model):
        model(x)
    assert_is(model, expected)


def test_bad_weights_are_refused_by_name():
    model = small()
    with torch.no_grad():
        model[4].weight[0, 0] = math.nan
    quantize_(model, RECIPE)
    with pytest.raises(ValueError, match=r"^4\.weight: .*NaN or infinite"), calibrating(model):
        model(images())
    assert not any(q.calibrated for q in quantizers(model))


def test_a_site_that_saw_no_data_is_named():
    model = small()
    quantize_(model, RECIPE)
    expected = snapshot(model)
    with pytest.raises(ValueError, match=r"^4\.input: no calibration data"), calibrating(model):
        model[:4](images())
    assert_is(model, expected)


def test_calibrating_again_forgets_the_first_data():
    model = calibrated()
    first = snapshot(model)
    with calibrating(model), torch.no_grad():
        model(images() * 5)
    assert model[0].input_quantizer.scale > 4 * first[0]["0.input_quantizer.scale"]
    with calibrating(model), torch.no_grad():
        model(images())
    assert_is(model, first)


def seen_by(recipe):
    """What a pass shows to the observers of this recipe, by key."""
    model = small()
    quantize_(model, recipe, shapes=site_shapes(model, images()))
    with calibrating(model), torch.no_grad():
        model(images())
        return {key: observer.state() for key, observer in observing(model).items()}


def affine(calibration, **options):
    return Recipe(RECIPE.weight, Scheme(IntegerGrid(8, "affine"), calibration=calibration, **options))


@pytest.mark.parametrize("calibration", [MinMax(), Percentile(99.0), MSE(20), Entropy(), MovingAverage(0.01)], ids=str)
def test_what_was_seen_before_need_not_be_seen_again(calibration):
    """The pass of one calibration serves another to the bit, and no data pass."""
    seen = seen_by(RECIPE)
    expected = calibrated(recipe=affine(calibration))
    model = small()
    quantize_(model, affine(calibration))
    with calibrating(model):
        recall_(model, seen)
        assert not observing(model)
    assert_is(model, snapshot(expected))


@pytest.mark.parametrize("other", [affine(MovingAverage(0.3)), affine(MinMax(), granularity=PerChannel(1))])
def test_what_was_seen_in_another_way_is_seen_again(other):
    model = small()
    quantize_(model, other, shapes=site_shapes(model, images()))
    with pytest.raises(ValueError, match="no calibration data"), calibrating(model):
        recall_(model, seen_by(RECIPE))
        assert len(observing(model)) == 3
    assert not observing(model)


def test_sites_that_were_not_seen_look_alone():
    seen = {key: state for key, state in seen_by(RECIPE).items() if not key.startswith("4.input")}
    model, expected = small(), calibrated()
    quantize_(model, RECIPE)
    with calibrating(model), torch.no_grad():
        recall_(model, seen)
        assert [key.partition(":")[0] for key in observing(model)] == ["4.input"]
        model(images())
    assert_is(model, snapshot(expected))


def test_batches_give_the_ranges_of_their_whole():
    recipe = Recipe(RECIPE.weight, Scheme(IntegerGrid(8, "affine"), calibration=MSE(20)))
    whole, parts = calibrated(recipe=recipe), small()
    quantize_(parts, recipe)
    with calibrating(parts), torch.no_grad():
        for batch in images().flip(0).split(3):
            parts(batch)
    # Another batch size may round the last bit of an activation differently.
    for one, other in zip(quantizers(whole), quantizers(parts), strict=True):
        assert torch.allclose(one.scale, other.scale, rtol=1e-5)
        assert torch.equal(one.zero_point, other.zero_point)


def test_a_copy_computes_the_same_and_lives_alone():
    model = calibrated()
    twin = copy.deepcopy(model)
    assert torch.equal(twin(images()), model(images()))
    set_mode_(twin, Mode.OFF)
    assert all(q.mode is Mode.QUANTIZE for q in quantizers(model))
    assert not {id(q) for q in quantizers(model)} & {id(q) for q in quantizers(twin)}


def test_a_saved_state_restores_the_quantized_model():
    model, file = calibrated(), io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    twin = small()
    with torch.no_grad():
        twin[0].weight.zero_()
    quantize_(twin, RECIPE)
    twin.load_state_dict(torch.load(file, weights_only=True))
    set_mode_(twin, Mode.QUANTIZE)
    assert torch.equal(twin(images()), model(images()))


def test_a_pickled_model_computes_the_same():
    model, file = calibrated(), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(images()), model(images()))


def test_a_printed_model_shows_every_choice():
    text = repr(calibrated(recipe=Recipe(RECIPE.weight, Scheme(IntegerGrid(4, "affine"), calibration=MSE(5)))))
    assert text.count("Quantizer(int8 restricted, per_channel, minmax, quantize)") == 2
    assert text.count("Quantizer(uint4 affine, per_tensor, mse(5), quantize)") == 3


def test_weights_rounded_at_random_stay_the_same_in_a_network_that_is_evaluated():
    net = torch.nn.Sequential(torch.nn.Linear(64, 64)).eval()
    scheme = recipes.Scheme(recipes.IntegerGrid(4), rounding=rounding.Stochastic(0))
    convert.quantize_(net, recipes.Recipe(weight=scheme))
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    with convert.calibrating(net):
        net(x)
    assert not any(module.training for module in net.modules())
    assert torch.equal(net(x), net(x))


def test_single_layers_have_weights_of_their_own_format():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 2))
    own = (("0", Scheme(IntegerGrid(4))), ("1", Scheme(IntegerGrid(3))), ("1.0", Scheme(IntegerGrid(2))))
    quantize_(model, Recipe(layers=own))
    assert [layer.weight_quantizer.scheme.grid.bits for _, layer in layers(model)] == [4, 2, 8]
    with pytest.raises(ValueError, match="layers='nope': matches no layer of Sequential"):
        quantize_(nn.Sequential(nn.Linear(4, 4)), Recipe(layers=(("nope", Scheme()),)))
