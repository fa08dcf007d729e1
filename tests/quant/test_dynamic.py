"""Ranges of each call: the codes of ONNX's operator and of torch.ao, blocks along the right axes, schemes of sites."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx.reference import ReferenceEvaluator
from torch import nn

from qexp.quant.calibration import MinMax, Percentile
from qexp.quant.codebooks import NormalFloat
from qexp.quant.convert import calibrating, quantize_
from qexp.quant.granularity import PerChannel, PerGroup, PerTensor, PerToken
from qexp.quant.grid import IntegerGrid
from qexp.quant.layers import MatMul
from qexp.quant.quantizer import Mode, Quantizer
from qexp.quant.recipe import Recipe, Scheme
from qexp.quant.rounding import Floor
from qexp.quant.search import CrossEntropy

AFFINE, SYMMETRIC = IntegerGrid(8, "affine"), IntegerGrid(8, "restricted")
ONE = Scheme(AFFINE, dynamic=True)
TOKENS = Scheme(SYMMETRIC, PerToken(), dynamic=True)
WEIGHTS = Scheme(SYMMETRIC, PerChannel(0))


def quantizer(scheme: Scheme) -> Quantizer:
    made = Quantizer(scheme, site="fc.input")
    made.mode = Mode.QUANTIZE
    return made


def quantized(net: nn.Module, example: torch.Tensor, recipe: Recipe) -> nn.Module:
    quantize_(net.eval(), recipe)
    with calibrating(net), torch.no_grad():
        net(example)
    return net


def operator() -> onnx.ModelProto:
    outputs = {"codes": onnx.TensorProto.UINT8, "scale": onnx.TensorProto.FLOAT, "zero": onnx.TensorProto.UINT8}
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("DynamicQuantizeLinear", ["x"], list(outputs))],
        "dynamic",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, None)],
        [onnx.helper.make_tensor_value_info(name, kind, None) for name, kind in outputs.items()],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)


SESSION = onnxruntime.InferenceSession(operator().SerializeToString(), providers=["CPUExecutionProvider"])
REFERENCE = ReferenceEvaluator(operator())


def formula(x: np.ndarray) -> tuple[np.ndarray, np.float32, np.float32]:
    """S = (max - min) / 255, Z = -round(min / S), q = round(x / S) + Z, 0 being in the range (ONNX)."""
    lo, hi = np.minimum(x.min(), np.float32(0)), np.maximum(x.max(), np.float32(0))
    scale = np.float32(hi - lo) / np.float32(255) if hi > lo else np.float32(1)
    zero = np.clip(np.rint(-lo / scale), 0, 255)
    return np.clip(np.rint(x / scale) + zero, 0, 255), scale, zero


numbers = st.floats(-1e4, 1e4, width=32).filter(lambda x: x == 0 or abs(x) > 1e-6)


@settings(max_examples=100, deadline=None)
@given(hnp.arrays(np.float32, hnp.array_shapes(min_dims=1, max_dims=3, max_side=6), elements=numbers))
def test_one_range_for_a_tensor_gives_the_codes_of_dynamic_quantize_linear(x):
    site = quantizer(ONE)
    codes, scale, zero = formula(x)
    np.testing.assert_array_equal(site.codes(torch.from_numpy(x)).numpy(), codes)
    # The engine multiplies by 1 / S or divides by S, which may part at a tie.
    theirs, their_scale, their_zero = SESSION.run(None, {"x": x})
    assert their_scale == pytest.approx(scale, rel=1e-6)
    assert np.abs(theirs.astype(int) - codes).max() <= 1 and abs(int(their_zero) - zero) <= 1
    np.testing.assert_allclose(site(torch.from_numpy(x)).numpy(), (codes - zero) * scale, rtol=1e-6, atol=0)


SPECIAL = {
    "zeros": np.zeros((3, 4)), "ones": np.ones((2, 2)), "positive": np.linspace(0.5, 3, 7),
    "negative": -np.linspace(0.5, 3, 7), "alone": np.array([[-2.5]]), "ties": np.arange(256) - 0.5,
    "tiny": np.array([1e-40, 0, -1e-40]),
}  # fmt: skip


@pytest.mark.parametrize("case", SPECIAL)
def test_zeros_and_ranges_of_one_sign_are_those_of_the_engine(case):
    x = SPECIAL[case].astype(np.float32)
    codes, (theirs, scale, _) = quantizer(ONE).codes(torch.from_numpy(x)).numpy(), SESSION.run(None, {"x": x})
    if case != "tiny":  # where scales are subnormal numbers, all of it is worth 1e-40
        np.testing.assert_array_equal(codes, theirs)
    assert np.abs(quantizer(ONE)(torch.from_numpy(x)).numpy() - x).max() <= scale / 2 + 1e-38
    if case not in ("zeros", "tiny"):
        np.testing.assert_array_equal(codes, REFERENCE.run(None, {"x": x})[0])


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_a_linear_layer_is_that_of_torch_ao_within_a_step():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(48, 24)), torch.randn(10, 48) + 0.3
    theirs = torch.ao.quantization.quantize_dynamic(net, {nn.Linear}, torch.qint8)
    # Its inputs have 7 bits, so that sums of products fit 16 bits on any processor.
    recipe = Recipe(Scheme(IntegerGrid(8, "full_range")), Scheme(IntegerGrid(7, "affine"), dynamic=True))
    ours = quantized(net, x, recipe)
    weight = ours[0].weight_quantizer
    assert float(weight.scale) == pytest.approx(theirs[0].weight().q_scale(), rel=1e-6)
    step = float(ours[0].input_quantizer.qparams_for(x).scale) * float(weight.scale) * 128
    difference = (ours(x) - theirs(x)).abs()
    assert difference.max() <= step
    assert difference.mean() < 0.02 * step


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 4))
def test_a_token_is_quantized_alike_in_any_batch_and_a_tensor_is_not(seed, samples, tokens):
    x = torch.randn(samples, tokens, 8, generator=torch.Generator().manual_seed(seed))
    alone = [x[i : i + 1] for i in range(samples)]
    for scheme in TOKENS, Scheme(SYMMETRIC, PerGroup(4), dynamic=True), Scheme(AFFINE, PerToken(), dynamic=True):
        assert scheme.granularity.follows_batch
        assert torch.equal(quantizer(scheme)(x), torch.cat([quantizer(scheme)(one) for one in alone]))
    louder = torch.cat([x, 10 * x.abs().amax() * torch.ones(1, tokens, 8)])
    assert not PerTensor().follows_batch
    assert not torch.equal(quantizer(ONE)(louder)[:samples], quantizer(ONE)(x))


def by_row(x: np.ndarray) -> np.ndarray:
    """Symmetric 8 bits with a scale for each vector along the last axis."""
    scale = np.abs(x).max(-1, keepdims=True) / np.float32(127)
    scale[scale == 0] = 1
    return np.rint(x / scale) * scale


@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (1, 2, 1, 4), (4, 5, 3), (1, 1, 1, 1), (6, 2), (0, 2, 5, 4)])
@torch.no_grad()
def test_tokens_of_a_product_are_rows_of_the_first_and_columns_of_the_second(shape):
    torch.manual_seed(1)
    *batch, rows, inner = shape
    a, b = torch.randn(*batch, rows, inner), torch.randn(*batch, inner, rows + 1)
    a[..., :1, :] *= 100  # a token that would drown all others
    b[..., -1:] *= 100
    layer = nn.Sequential(MatMul(), nn.Linear(rows + 1, 2))
    quantize_(layer, Recipe(WEIGHTS, TOKENS))
    product = layer[0]
    for site in product.a_quantizer, product.b_quantizer:
        site.mode = Mode.QUANTIZE
    if 0 in shape:
        with pytest.raises(ValueError, match="^0.a: no value to take statistics from$"):
            product(a, b)
        return
    expected = by_row(a.numpy()) @ by_row(b.numpy().swapaxes(-1, -2)).swapaxes(-1, -2)
    np.testing.assert_allclose(product(a, b).numpy(), expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    wrong = by_row(a.numpy()) @ by_row(b.numpy())
    assert min(shape) == 1 or np.abs(wrong - expected).max() > 1e-3


@torch.no_grad()
def test_scales_of_groups_and_channels_belong_to_layers_with_weights():
    a, b = torch.randn(2, 3, 8), torch.randn(2, 8, 4)
    for granularity in PerGroup(4), PerChannel(1):
        recipe = Recipe(WEIGHTS, Scheme(SYMMETRIC, granularity, dynamic=True))
        assert recipe.activation_of("product.a", of_product=True) == Scheme(SYMMETRIC, PerToken(), dynamic=True)
        assert recipe.activation_of("fc.input").granularity == granularity
    layer = nn.Sequential(MatMul(), nn.Linear(4, 4))
    quantize_(layer, Recipe(WEIGHTS, Scheme(SYMMETRIC, PerGroup(4))))
    for site in layer[0].children():
        site.mode = Mode.QUANTIZE
    token = Scheme(SYMMETRIC, PerToken(), dynamic=True)
    torch.testing.assert_close(layer[0](a, b), quantizer(token)(a) @ quantizer(token)(b.mT).mT)
    stored = Recipe(WEIGHTS, Scheme(SYMMETRIC, PerChannel(1)))
    assert stored.activation_of("product.a", of_product=True) == Scheme(SYMMETRIC)


def test_of_schemes_for_a_site_the_last_that_fits_counts():
    wide, narrow, odd = Scheme(IntegerGrid(6)), Scheme(IntegerGrid(4)), Scheme(IntegerGrid(2))
    sites = (("*.scores.b", wide), ("layers.0", narrow), ("layers.0.scores.b", odd))
    recipe = Recipe(activation=ONE, sites=sites)
    expected = {
        "layers.1.scores.b": wide, "layers.0.scores.a": narrow, "layers.0.scores.b": odd, "layers.1.scores.a": ONE,
        "layers.0.query.input": narrow, "head.input": ONE,
    }  # fmt: skip
    assert {site: recipe.activation_of(site) for site in expected} == expected
    net = nn.ModuleDict({"fc": nn.Linear(4, 4), "product": MatMul()})
    quantize_(net, Recipe(activation=ONE, sites=(("product.b", narrow), ("fc", wide))))
    found = [site.scheme for site in (net.product.a_quantizer, net.product.b_quantizer, net.fc.input_quantizer)]
    assert found == [ONE, narrow, wide]
    # The weight of a layer is no activation.
    assert net.fc.weight_quantizer.scheme == Scheme()


FORMS = {
    ONE: "per_tensor",
    TOKENS: "per_token",
    Scheme(SYMMETRIC, PerToken()): "per_token",  # within a sample, asked or not
    Scheme(SYMMETRIC, PerGroup(32), dynamic=True): "per_group",
    Scheme(AFFINE): None,
    Scheme(IntegerGrid(4, "affine"), dynamic=True): None,
    Scheme(SYMMETRIC, dynamic=True): None,
    Scheme(AFFINE, PerToken(), dynamic=True): None,
    Scheme(SYMMETRIC, PerGroup(32, pad=True), dynamic=True): "per_group",
    Scheme(AFFINE, calibration=Percentile(), dynamic=True): None,
    Scheme(NormalFloat(4), PerToken(), dynamic=True): None,
    Scheme(AFFINE, rounding=Floor(), dynamic=True): None,
}


@pytest.mark.parametrize("scheme", FORMS, ids=str)
def test_what_an_engine_computes_in_each_call_and_what_is_simulated_in_one_sentence(scheme):
    assert scheme.dynamic_form == FORMS[scheme]
    why = scheme.not_in_int8(is_weight=False)
    assert (why is None) == (FORMS[scheme] is not None or not scheme.of_call)
    if why:
        assert "\n" not in why and Recipe(activation=scheme).simulation_only == f"activations are {why}"
    if why and isinstance(scheme.grid, IntegerGrid) and scheme.rounding != Floor():
        assert "which no engine computes in each call; of 8 bits and by minmax, ONNX Runtime computes affine" in why


def test_nothing_is_observed_stored_or_calibrated_where_ranges_are_of_each_call():
    for scheme in ONE, TOKENS:
        site = quantizer(scheme)
        site.start_observing()
        assert (site.mode, site.observer, bool(site.calibrated)) == (Mode.OFF, None, True)
        site.calibrate()
        with pytest.raises(RuntimeError, match="^fc.input: this quantizer has scales of its own in each call$"):
            site.qparams  # noqa: B018
        for bad in torch.tensor([[float("nan")]]), torch.tensor([[float("inf")]]):
            with pytest.raises(ValueError, match="^fc.input: holds NaN or infinite values$"):
                site.codes(bad)


def test_logits_are_calibrated_only_where_anything_is():
    with pytest.raises(ValueError, match="^calibration.logits=.*: nothing is calibrated where ranges are of each call"):
        Recipe(activation=ONE, logits=CrossEntropy())
    assert Recipe(activation=Scheme(AFFINE), logits=MinMax()).logits_scheme is not None


@torch.no_grad()
def test_codes_with_the_range_of_what_they_are_codes_of_are_its_values():
    x = torch.randn(3, 4, 8)
    for scheme in ONE, TOKENS, Scheme(SYMMETRIC, PerGroup(4), dynamic=True):
        site = quantizer(scheme)
        torch.testing.assert_close(site.of_stored(site.stored_codes(x), x), site(x), rtol=0, atol=0)
