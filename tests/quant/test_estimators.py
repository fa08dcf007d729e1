"""Every estimator: values, gradients against formulas written out here and against torch's operators, what is left."""

import copy
import math
from dataclasses import dataclass

import pytest
import torch

from qexp.quant.codebooks import NormalFloat
from qexp.quant.estimators import LSQ, Estimator, StraightThrough, sync_
from qexp.quant.granularity import PerChannel, PerGroup, PerTensor, PerToken
from qexp.quant.grid import IntegerGrid
from qexp.quant.learned import PACT, TQT, AdditiveNoise, DoReFa, LSQPlus
from qexp.quant.quantizer import Mode, Once, Quantizer
from qexp.quant.recipe import Scheme
from qexp.quant.rounding import Floor, HalfEven, Stochastic

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = (6, 8, 12)
AFFINE, SYMMETRIC, UNSIGNED = IntegerGrid(4, "affine"), IntegerGrid(4), IntegerGrid(4, "unsigned")
SHIFTS = {name: IntegerGrid(4, name, "power_of_two") for name in ("restricted", "wide_codes", "affine", "unsigned")}


@dataclass(frozen=True)
class Case:
    """A quantizer: an estimator, and what it trains."""

    estimator: Estimator
    grid: object = SYMMETRIC
    granularity: object = PerTensor()
    is_weight: bool = True

    def __str__(self):
        kind = "weight" if self.is_weight else "activation"
        return f"{self.estimator}-{self.grid}-{self.granularity}-{kind}".replace(" ", "_")

    def quantizer(self):
        """Calibrated to two thirds of the data, so that something is clipped."""
        scheme = Scheme(self.grid, self.granularity)
        quantizer = Quantizer(scheme, SHAPE if self.is_weight or self.per_channel else (), "fc.site", self.is_weight)
        lo = -torch.linspace(0.9, 1.7, quantizer.scale.numel()).view(quantizer.scale.shape)
        hi = torch.linspace(2.3, 1.1, quantizer.scale.numel()).view(quantizer.scale.shape)
        positive = isinstance(self.estimator, PACT) or getattr(self.grid, "convention", "") == "unsigned"
        quantizer.set_range(torch.zeros_like(lo) if positive else lo, hi)
        quantizer.mode = Mode.QUANTIZE
        return quantizer

    def training(self):
        """The quantizer with its estimator, and a tensor that needs a gradient."""
        quantizer = self.quantizer()
        quantizer.train_with_(self.estimator)
        return quantizer, self.estimator.start(quantizer, data()).requires_grad_()

    @property
    def per_channel(self):
        return self.granularity != PerTensor()


def data(seed=0):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) * 1.5


def weights_of(output):
    """dL/dx~ of L = sum weights x~."""
    return torch.linspace(-1.0, 2.0, output.numel()).view(output.shape).sin()


CHANNEL = PerChannel(1)
DETERMINISTIC = [
    *(Case(StraightThrough(gradient)) for gradient in StraightThrough.GRADIENTS),
    Case(StraightThrough(), NormalFloat(4), PerChannel(0)), Case(StraightThrough(), AFFINE, CHANNEL, False),
    Case(StraightThrough("identity"), SYMMETRIC, PerToken(), False),
    *(Case(LSQ(how), SYMMETRIC, PerChannel(0)) for how in LSQ.SCALES),
    Case(LSQ()), Case(LSQ(), SYMMETRIC, PerGroup(4)), Case(LSQ(), AFFINE, PerTensor(), False),
    Case(LSQ(), AFFINE, CHANNEL, False),
    Case(LSQPlus(), SYMMETRIC, PerChannel(0)), Case(LSQPlus(), AFFINE, PerTensor(), False),
    Case(LSQPlus(), AFFINE, CHANNEL, False), Case(LSQPlus(), AFFINE, PerGroup(4)), Case(LSQPlus("none"), AFFINE),
    Case(PACT(), AFFINE, PerTensor(), False), Case(PACT(), UNSIGNED, PerTensor(), False),
    Case(PACT(), AFFINE, CHANNEL, False), Case(PACT(0.0), IntegerGrid(2, "unsigned"), CHANNEL, False),
    *(Case(TQT(), grid, granularity) for grid in SHIFTS.values() for granularity in (PerTensor(), PerChannel(0))),
    Case(TQT(), SHIFTS["affine"], CHANNEL, False), Case(TQT(), SHIFTS["wide_codes"], PerGroup(4)),
    Case(DoReFa()), Case(DoReFa(), SYMMETRIC, PerChannel(0)), Case(DoReFa(), NormalFloat(4), PerGroup(4)),
]  # fmt: skip
RANDOM = [
    Case(StraightThrough(rounding_in_training=Stochastic(3))), Case(AdditiveNoise()), Case(AdditiveNoise(7), AFFINE),
    Case(AdditiveNoise(), SYMMETRIC, PerChannel(0)), Case(AdditiveNoise(), AFFINE, CHANNEL, False),
    Case(AdditiveNoise(), SYMMETRIC, PerGroup(4)), Case(AdditiveNoise(), AFFINE, PerToken(), False),
]  # fmt: skip
EVERY = pytest.mark.parametrize("case", [*DETERMINISTIC, *RANDOM], ids=str)
EVERY_DETERMINISTIC = pytest.mark.parametrize("case", DETERMINISTIC, ids=str)
EVERY_RANDOM = pytest.mark.parametrize("case", RANDOM, ids=str)
EVERY_LEARNING = pytest.mark.parametrize(
    "case",
    [case for case in DETERMINISTIC if case.estimator.learns and not isinstance(case.estimator, DoReFa)],
    ids=str,
)


def fit_(quantizer, x, steps=3):
    """Some steps of Adam towards another tensor, as a task makes them."""
    optimizer = torch.optim.Adam([x, *quantizer.parameters()], lr=0.003)
    quantizer.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (quantizer(x) - data(1)).square().mean() + quantizer.estimator.penalty(quantizer)
        if loss.requires_grad:
            loss.backward()
        optimizer.step()
        quantizer.estimator.sync_(quantizer)


def evaluated(quantizer, x):
    quantizer.eval()
    with torch.no_grad():
        y = quantizer(x)
    quantizer.train()
    return y


# Values


@EVERY_DETERMINISTIC
def test_training_sees_what_evaluation_computes_to_the_bit(case):
    quantizer, x = case.training()
    assert torch.equal(quantizer(x), evaluated(quantizer, x))
    fit_(quantizer, x)
    assert torch.equal(quantizer(x), evaluated(quantizer, x))


@EVERY
def test_attaching_changes_nothing_that_was_calibrated(case):
    before, (quantizer, x) = case.quantizer(), case.training()
    assert torch.equal(before.scale, quantizer.scale)
    assert torch.equal(before.zero_point, quantizer.zero_point)
    quantizer.estimator.sync_(quantizer)
    assert torch.equal(before.scale, quantizer.scale)
    assert torch.equal(before.zero_point, quantizer.zero_point)
    if not isinstance(case.estimator, DoReFa):
        assert torch.equal(evaluated(before, data()), evaluated(quantizer, x.detach()))


@pytest.mark.parametrize("mode", [Floor(), HalfEven()], ids=str)
def test_another_rounding_in_training_is_that_rounding(mode):
    quantizer, x = Case(StraightThrough(rounding_in_training=mode)).training()
    expected = mode(data() / quantizer.scale).clamp(-7, 7) * quantizer.scale
    assert torch.equal(quantizer(x), expected)
    assert torch.equal(evaluated(quantizer, x), (data() / quantizer.scale).round().clamp(-7, 7) * quantizer.scale)


# Gradients


def closed_form(quantizer, x, g):
    """Gradients of sum g x~ by the equations of the papers, in float64; one scale for each element."""
    grid, estimator = quantizer.grid, quantizer.estimator
    block = quantizer.scheme.granularity.block_shape(SHAPE)
    repeats = [b for b, _ in zip(block, SHAPE, strict=True)]

    def each(parameter):
        full = parameter.double().view(parameter.shape or (1, 1, 1))
        for axis, repeat in enumerate(repeats):
            full = full.repeat_interleave(repeat, axis)
        return full

    def total(per_element):
        """Sum over the elements that share a scale."""
        for axis, repeat in enumerate(repeats):
            per_element = per_element.unfold(axis, repeat, repeat).sum(-1)
        return per_element.view(quantizer.scale.shape)

    x, g = x.detach().double(), g.double()
    scale, zero_point = each(quantizer.scale), each(quantizer.zero_point)
    quotient = x / scale
    lowest, highest = grid.quant_min - zero_point, grid.quant_max - zero_point
    below, above = quotient.round() < lowest, quotient.round() > highest
    inside = ~below & ~above
    nothing = torch.zeros_like(g)
    clipped_gradient = torch.where(inside, g, nothing)
    of_step = torch.where(below, lowest, torch.where(above, highest, quotient.round() - quotient))
    if isinstance(estimator, StraightThrough):
        return {"x": {"clipped": clipped_gradient, "identity": g, "none": nothing}[estimator.gradient]}
    if isinstance(estimator, AdditiveNoise):
        return {"x": torch.where((quotient >= lowest) & (quotient <= highest), g, nothing)}
    if isinstance(estimator, LSQ):
        top = grid.quant_max - quantizer.zero_point.double().mean()
        count = x.numel() / quantizer.scale.numel()
        factor = {"full": 1 / (count * top).sqrt(), "size": count**-0.5, "none": 1.0}[estimator.gradient_scale]
        found = {"x": clipped_gradient, "learned_scale": total(g * of_step) * factor}
        if isinstance(estimator, LSQPlus) and not grid.symmetric:
            found["learned_zero_point"] = total(torch.where(inside, nothing, -scale * g)) * factor
        return found
    if isinstance(estimator, PACT):
        alpha = each(quantizer.learned_alpha.detach())
        passes = torch.where((x >= 0) & (x < alpha), g, nothing)
        return {"x": passes, "learned_alpha": total(torch.where(x >= alpha, g, nothing))}
    assert isinstance(estimator, TQT)
    return {"x": clipped_gradient, "learned_log2_threshold": total(g * of_step * scale * math.log(2))}


NAMED = [
    case for case in [*DETERMINISTIC, *RANDOM[1:]]
    if isinstance(case.grid, IntegerGrid) and case.granularity != PerToken() and case.estimator != DoReFa()
]  # fmt: skip


@pytest.mark.parametrize("case", NAMED, ids=str)
def test_gradients_equal_the_equations_of_the_paper(case):
    quantizer, x = case.training()
    y = quantizer(x)
    g = weights_of(y)
    expected = closed_form(quantizer, x, g)
    assert (expected["x"] == 0).any() or case.estimator == StraightThrough("identity")
    parameters = dict(quantizer.named_parameters())
    assert set(parameters) == set(expected) - {"x"}
    if not y.requires_grad:
        assert case.estimator == StraightThrough("none")
        return
    (y * g).sum().backward()
    for name, value in {"x": x, **parameters}.items():
        torch.testing.assert_close(value.grad.double(), expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_gradient_none_hands_nothing_back_and_identity_all():
    for gradient, factor in ("none", 0.0), ("identity", 1.0):
        quantizer, x = Case(StraightThrough(gradient)).training()
        y = quantizer(x) + 0.0 * x  # so that there is a graph
        (y * weights_of(y)).sum().backward()
        assert torch.equal(x.grad, factor * weights_of(y))


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(1)], ids=str)
@pytest.mark.parametrize("grid", [AFFINE, SYMMETRIC, IntegerGrid(8, "affine"), IntegerGrid(8, "wide_codes")], ids=str)
@pytest.mark.parametrize("estimator", [StraightThrough(), LSQ(), LSQPlus(), LSQPlus("none")], ids=str)
def test_values_and_gradients_equal_those_of_torchs_operators(estimator, grid, granularity):
    quantizer = Case(estimator, grid, granularity, False).quantizer()
    # Of a power of two, torch's product with 1 / S is the quotient.
    count = quantizer.scale.numel()
    quantizer.scale.copy_(2.0 ** -(torch.arange(count) % 3 + (2 if grid.bits == 4 else 6)).view(quantizer.scale.shape))
    if not grid.symmetric:
        quantizer.zero_point.copy_((torch.arange(count) + 5).view(quantizer.scale.shape))
    quantizer.train_with_(estimator)
    x, theirs_x = data().requires_grad_(), data().requires_grad_()
    y = quantizer(x)
    (y * weights_of(y)).sum().backward()
    scale, zero_point = (p.flatten().clone() for p in (quantizer.scale, quantizer.zero_point))
    bounds = grid.quant_min, grid.quant_max
    if isinstance(estimator, StraightThrough):
        per_channel = torch.fake_quantize_per_channel_affine, (scale, zero_point.int(), 1, *bounds)
        per_tensor = torch.fake_quantize_per_tensor_affine, (scale[0].item(), int(zero_point[0]), *bounds)
    else:
        scale.requires_grad_()
        zero_point.requires_grad_()
        factor = estimator.factor(quantizer, x)
        per_channel = torch._fake_quantize_learnable_per_channel_affine, (scale, zero_point, 1, *bounds, factor)
        per_tensor = torch._fake_quantize_learnable_per_tensor_affine, (scale, zero_point, *bounds, factor)
    operator, arguments = per_tensor if granularity == PerTensor() else per_channel
    theirs = operator(theirs_x, *arguments)
    (theirs * weights_of(theirs)).sum().backward()
    assert torch.equal(y, theirs)
    assert torch.equal(x.grad, theirs_x.grad)
    if isinstance(estimator, LSQ):
        torch.testing.assert_close(quantizer.learned_scale.grad.flatten(), scale.grad.flatten(), rtol=1e-4, atol=1e-5)
    if hasattr(quantizer, "learned_zero_point"):
        ours = quantizer.learned_zero_point.grad.flatten()
        torch.testing.assert_close(ours, zero_point.grad.flatten(), rtol=1e-4, atol=1e-5)
        assert ours.abs().min() > 0


@pytest.mark.parametrize(
    "case",
    [Case(LSQ("none")), Case(LSQPlus("none"), AFFINE, PerTensor(), False), Case(PACT(), AFFINE, PerTensor(), False),
     Case(LSQ("none"), SYMMETRIC, PerChannel(0)), Case(PACT(), UNSIGNED, CHANNEL, False)],
    ids=str,
)  # fmt: skip
def test_where_all_is_clipped_gradients_are_finite_differences_of_what_evaluation_computes(case):
    quantizer, _ = case.training()
    x = data().sign() * 50
    y = quantizer(x)
    (y * weights_of(y)).sum().backward()
    name = quantizer.estimator.learns[0]
    parameter = getattr(quantizer, name)
    start, found = parameter.detach().clone(), torch.zeros_like(parameter)
    for index in range(parameter.numel()):
        losses = []
        for step in (0.01, -0.01):
            with torch.no_grad():
                parameter.copy_(start).view(-1)[index] += step
            quantizer.estimator.sync_(quantizer)
            values = evaluated(quantizer, x)
            losses.append((values * weights_of(values)).sum())
        found.view(-1)[index] = (losses[0] - losses[1]) / 0.02
    torch.testing.assert_close(parameter.grad, found, rtol=1e-3, atol=1e-2)


def test_one_more_of_the_zero_point_moves_what_is_clipped_by_one_scale_and_nothing_else():
    quantizer, x = Case(LSQPlus("none"), AFFINE, PerTensor(), False).training()
    scale, zero_point = float(quantizer.scale), float(quantizer.zero_point)
    stays_clipped = ((x / scale).round() + zero_point < -1) | ((x / scale).round() + zero_point > 16)
    inside = ((x / scale).round() + zero_point >= 0) & ((x / scale).round() + zero_point <= 14)
    before = evaluated(quantizer, x)
    with torch.no_grad():
        quantizer.learned_zero_point += 1
    quantizer.estimator.sync_(quantizer)
    moved = evaluated(quantizer, x) - before
    assert stays_clipped.any() and inside.any()
    torch.testing.assert_close(moved[stays_clipped], torch.full_like(moved[stays_clipped], -scale))
    assert not moved[inside].any()


@pytest.mark.parametrize("name", SHIFTS)
def test_the_threshold_gradient_integrated_over_one_octave_is_the_step_of_the_clipped_value(name):
    quantizer, _ = Case(TQT(), SHIFTS[name]).training()
    x = torch.full((1,), 1e4)
    before = evaluated(quantizer, x)
    slope = torch.autograd.grad(quantizer(x).sum(), quantizer.learned_log2_threshold)[0]
    with torch.no_grad():
        quantizer.learned_log2_threshold += 1
    quantizer.estimator.sync_(quantizer)
    # S 2^v ln 2 p, integrated from v = 0 to 1, is S p.
    torch.testing.assert_close(evaluated(quantizer, x) - before, slope.view(1) / math.log(2))


def test_dorefa_has_the_gradient_of_tanh_and_of_the_maximum():
    quantizer, w0 = Case(DoReFa(), SYMMETRIC, PerChannel(0)).training()
    y = quantizer(w0)
    (y * weights_of(y)).sum().backward()
    t, m = w0.detach().double().tanh(), quantizer.magnitude.double()
    largest = t.abs().max()
    w = m * t / largest
    code = (w / quantizer.scale.double()).round()
    g = torch.where(code.abs() <= 7, weights_of(y).double(), 0.0)
    of_t = g * m / largest
    at = t.abs().flatten().argmax()
    of_t.view(-1)[at] -= t.view(-1)[at].sign() * m / largest**2 * (g * t).sum()
    torch.testing.assert_close(w0.grad.double(), of_t * (1 - t**2), rtol=1e-5, atol=1e-6)


# What is learned


@EVERY
def test_settled_nothing_is_left_but_scale_zero_point_and_the_same_output(case):
    quantizer, x = case.training()
    names = set(case.quantizer().state_dict())
    fit_(quantizer, x)
    scale, zero_point, before = quantizer.scale.clone(), quantizer.zero_point.clone(), evaluated(quantizer, x.detach())
    settled = quantizer.settle_(x.detach())
    assert quantizer.estimator is None and not list(quantizer.parameters())
    assert set(quantizer.state_dict()) == names
    assert torch.equal(quantizer.scale, scale) and torch.equal(quantizer.zero_point, zero_point)
    assert torch.equal(evaluated(quantizer, settled), before)
    assert torch.equal(quantizer(settled), before)  # no estimator: training computes the same


@EVERY_LEARNING
def test_what_is_learned_moves_and_reaches_scale_and_zero_point(case):
    before, (quantizer, x) = case.quantizer(), case.training()
    starts = {name: p.detach().clone() for name, p in quantizer.named_parameters()}
    assert starts
    fit_(quantizer, x, steps=20)
    for name, parameter in quantizer.named_parameters():
        assert not torch.equal(parameter, starts[name]), name
    if not isinstance(case.estimator, TQT):  # whose threshold moves within its octave
        assert not torch.equal(before.scale, quantizer.scale)
    levels = quantizer.grid.levels(quantizer.qparams)
    assert (quantizer.zero_point == quantizer.zero_point.round()).all() and (levels == 0).any(-1).all()


@EVERY
def test_a_checkpoint_goes_on_from_where_it_was_taken(case):
    quantizer, x = case.training()
    fit_(quantizer, x)
    state, at = copy.deepcopy(quantizer.state_dict()), x.detach().clone()
    resumed, _ = case.training()
    resumed.load_state_dict(state)
    assert torch.equal(evaluated(quantizer, at), evaluated(resumed, at))
    other = at.clone().requires_grad_()
    fit_(quantizer, x)
    fit_(resumed, other)
    assert torch.equal(x, other)
    for (name, value), (_, again) in zip(quantizer.state_dict().items(), resumed.state_dict().items(), strict=True):
        assert torch.equal(value, again), name


IMPOSSIBLE = [
    *((Case(LSQ()), "learned_scale", value) for value in (0.0, -0.25, math.nan, math.inf, 1e-40)),
    (Case(LSQPlus(), AFFINE), "learned_scale", -0.25), (Case(LSQPlus(), AFFINE), "learned_zero_point", math.nan),
    *((Case(PACT(), AFFINE, PerTensor(), False), "learned_alpha", value) for value in (0.0, -3.0, math.nan)),
    *((Case(TQT(), SHIFTS["affine"]), "learned_log2_threshold", value) for value in (math.nan, 300.0, -300.0)),
]  # fmt: skip


@pytest.mark.parametrize(("case", "name", "value"), IMPOSSIBLE, ids=str)
def test_an_impossible_learned_value_is_one_sentence_with_the_site(case, name, value):
    quantizer, _ = case.training()
    with torch.no_grad():
        getattr(quantizer, name).fill_(value)
    kept = quantizer.scale.clone()
    with pytest.raises(ValueError, match=r"^fc\.site: its learned [a-z ]+ became [^;\n]+; lower the learning rate$"):
        quantizer.estimator.sync_(quantizer)
    assert torch.equal(quantizer.scale, kept) or name == "learned_zero_point"


def test_one_wrong_scale_among_many_is_the_one_that_is_named():
    quantizer, _ = Case(LSQ(), SYMMETRIC, PerChannel(0)).training()
    with torch.no_grad():
        quantizer.learned_scale[2] = -0.125
    with pytest.raises(ValueError, match="became -0.125;"):
        quantizer.estimator.sync_(quantizer)


def test_sites_together_store_what_each_stores_alone_or_name_the_wrong_one():
    cases = [Case(LSQ(), SYMMETRIC, PerChannel(0)), Case(LSQ()), Case(LSQPlus(), AFFINE), Case(StraightThrough()),
             Case(TQT(), SHIFTS["affine"]), Case(PACT(), UNSIGNED, CHANNEL, False)]  # fmt: skip
    together, alone = ([case.training()[0] for case in cases] for _ in range(2))
    for quantizer in [*together, *alone]:
        with torch.no_grad():
            for name in quantizer.learned:
                getattr(quantizer, name).mul_(1.25)
    sync_([*together, cases[0].quantizer()])  # one that has no estimator
    for quantizer, other in zip(together, alone, strict=True):
        other.estimator.sync_(other)
        assert torch.equal(quantizer.scale, other.scale) and torch.equal(quantizer.zero_point, other.zero_point)
    together[1].site = "fc.wrong"
    with torch.no_grad():
        together[1].learned_scale.fill_(-1)
    with pytest.raises(ValueError, match=r"^fc\.wrong: its learned scale became -1;"):
        sync_(together)


def test_lsq_fits_a_tensor_better_than_its_extremes_do():
    w = data(5)
    scheme = Scheme(IntegerGrid(3, "restricted"))
    quantizer = Quantizer(scheme, SHAPE, "fc.weight", is_weight=True)
    quantizer.calibrate(w)
    quantizer.mode = Mode.QUANTIZE
    start = (quantizer(w) - w).square().mean()
    quantizer.train_with_(LSQ())
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=1.0)
    for _ in range(200):
        optimizer.zero_grad()
        (quantizer(w) - w).square().mean().backward()
        optimizer.step()
        quantizer.estimator.sync_(quantizer)
    quantizer.settle_()
    end = (quantizer(w) - w).square().mean()
    scales = torch.linspace(0.05, 1.5, 2000)
    best = min(float(((w / s).round().clamp(-3, 3) * s - w).square().mean()) for s in scales)
    assert best <= end * 1.0001 and end < 1.05 * best
    assert end < 0.7 * start


# One estimator each


def test_the_zero_point_of_lsq_plus_is_rounded_and_stays_among_the_codes():
    quantizer, x = Case(LSQPlus(), AFFINE, CHANNEL, False).training()
    learned = torch.tensor([-3.0, 0.5, 1.5, 2.4, 7.6, 14.9, 15.4, 99.0]).view(quantizer.zero_point.shape)
    with torch.no_grad():
        quantizer.learned_zero_point.copy_(learned)
    quantizer.estimator.sync_(quantizer)
    assert quantizer.zero_point.flatten().tolist() == [0, 0, 2, 2, 8, 15, 15, 15]
    assert quantizer.learned_zero_point.min() == 0 and quantizer.learned_zero_point.max() == 15
    assert torch.equal(quantizer(x), evaluated(quantizer, x))


def test_lsq_plus_is_lsq_where_the_zero_point_is_fixed():
    found = []
    for estimator in LSQ(), LSQPlus():
        quantizer, x = Case(estimator, SYMMETRIC, PerChannel(0)).training()
        fit_(quantizer, x, steps=5)
        assert not hasattr(quantizer, "learned_zero_point")
        found.append((x.detach(), quantizer.scale, quantizer.learned_scale.grad))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))


def test_pact_starts_at_the_end_of_the_range_and_adds_its_decay():
    quantizer, _ = Case(PACT(decay=0.25), AFFINE, CHANNEL, False).training()
    torch.testing.assert_close(quantizer.learned_alpha.detach(), quantizer.hi, rtol=2.0**-23, atol=0)
    torch.testing.assert_close(quantizer.learned_alpha.detach(), quantizer.scale * 15)
    penalty = quantizer.estimator.penalty(quantizer)
    torch.testing.assert_close(penalty, 0.25 * quantizer.hi.square().sum())
    penalty.backward()
    torch.testing.assert_close(quantizer.learned_alpha.grad, 0.5 * quantizer.hi)
    assert PACT(0.0).penalty(quantizer) == 0.0


@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_pact_on_a_scale_that_is_no_quotient_of_its_range(bits):
    quantizer = Case(PACT(), IntegerGrid(bits, "unsigned"), CHANNEL, False).quantizer()
    quantizer.scale.mul_(1.2345)
    before = quantizer.scale.clone()
    quantizer.train_with_(PACT())
    alpha = quantizer.learned_alpha.detach()
    assert torch.equal(quantizer.scale, alpha / (2**bits - 1))
    assert ((quantizer.scale / before - 1).abs() <= 2.0**-23).all()
    x = torch.cat([alpha, alpha * 0.999, alpha * 2, -alpha]).expand(4, 8, 5)
    assert torch.equal(quantizer(x), evaluated(quantizer, x))


@pytest.mark.parametrize("bits", range(1, 17))
def test_pact_leaves_every_calibrated_scale_to_the_bit(bits):
    quantizer = Quantizer(Scheme(IntegerGrid(bits, "affine"), CHANNEL), (8, 10_000), "fc.input")
    hi = torch.rand(1, 10_000, generator=torch.Generator().manual_seed(0)) + 0.01
    quantizer.set_range(torch.zeros_like(hi), hi)
    before = quantizer.scale.clone()
    quantizer.train_with_(PACT())
    assert torch.equal(quantizer.scale, before)
    torch.testing.assert_close(quantizer.learned_alpha.detach(), hi, rtol=2.0**-23, atol=0)


def test_pact_fits_activations_that_begin_at_zero_alone():
    assert PACT().fits(Case(PACT(), AFFINE, PerTensor(), False).quantizer())
    assert PACT().fits(Case(PACT(), UNSIGNED, PerTensor(), False).quantizer())
    others = [
        Case(LSQ(), AFFINE, PerTensor(), False), Case(LSQ(), SYMMETRIC, PerTensor(), False),
        Case(PACT(), AFFINE, PerToken(), False), Case(PACT(), UNSIGNED), Case(PACT(), SYMMETRIC),
    ]  # fmt: skip
    for quantizer in (case.quantizer() for case in others[:2]):
        assert not PACT().fits(quantizer)
    for case in others[3:]:
        quantizer = case.quantizer()
        assert not PACT().fits(quantizer)
        assert PACT().refusal(quantizer.scheme, True) is None
        with pytest.raises(ValueError, match=r"^fc\.site: pact trains activations whose range begins at zero"):
            quantizer.train_with_(PACT())
    assert StraightThrough().fits(others[0].quantizer()) and TQT().fits(others[0].quantizer())


@pytest.mark.parametrize("name", SHIFTS)
def test_tqt_starts_in_the_middle_of_the_octave_of_every_power_of_two(name):
    quantizer = Quantizer(Scheme(SHIFTS[name], PerChannel(0)), (254, 3), "fc.weight", is_weight=True)
    quantizer.set_range(-torch.ones(254, 1) * (name != "unsigned"), torch.ones(254, 1))
    quantizer.scale.copy_(torch.tensor([2.0**e for e in range(-126, 128)])[:, None])
    before = quantizer.scale.clone()
    quantizer.train_with_(TQT())
    for offset in (0.0, 0.49, -0.98):
        with torch.no_grad():
            quantizer.learned_log2_threshold += offset
        quantizer.estimator.sync_(quantizer)
        assert torch.equal(quantizer.scale, before)
    bits = 4 if name in ("affine", "unsigned") else 3
    expected = torch.arange(-126.0, 128.0)[:, None] + bits - 0.99
    torch.testing.assert_close(quantizer.learned_log2_threshold.detach(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0), PerGroup(4)], ids=str)
def test_dorefa_starts_from_the_weight_that_was_calibrated(granularity):
    quantizer, w0 = Case(DoReFa(), SYMMETRIC, granularity).training()
    w = data()
    again = quantizer.estimator.before(quantizer, w0.detach())
    torch.testing.assert_close(again, w, rtol=2e-6, atol=0)
    assert quantizer.magnitude == w.abs().max()
    assert abs(float(w0.detach().abs().max()) - 1) < 1e-6
    fit_(quantizer, w0)
    settled = quantizer.estimator.before(quantizer, w0.detach())
    torch.testing.assert_close(settled.abs().max(), w.abs().max())  # m is a constant
    quantizer.estimator.attach_(quantizer)
    assert quantizer.magnitude == w.abs().max()


def test_dorefa_keeps_a_weight_of_zeros():
    quantizer = Case(DoReFa()).quantizer()
    quantizer.train_with_(DoReFa())
    w0 = quantizer.estimator.start(quantizer, torch.zeros(SHAPE)).requires_grad_()
    y = quantizer(w0)
    y.sum().backward()
    assert not w0.any() and not y.any() and w0.grad.isfinite().all()


# Draws


@EVERY_RANDOM
def test_draws_are_within_one_step_of_the_clipped_value_and_have_its_mean(case):
    quantizer, x = case.training()
    limit = 1.0 if isinstance(case.estimator, StraightThrough) else 0.5
    blocked, (scale, zero_point, _) = quantizer._blocked(data())
    lowest, highest = (scale * (end - zero_point) for end in (case.grid.quant_min, case.grid.quant_max))
    wanted = quantizer._joined(blocked.maximum(lowest).minimum(highest), x)
    scale = quantizer._joined(scale.expand(blocked.shape), x)
    steps, mean = 2000, torch.zeros(SHAPE)
    with torch.no_grad():
        for _ in range(steps):
            error = (quantizer(x) - wanted) / scale
            assert error.abs().max() <= limit + 1e-5
            mean += error / steps
    # One draw has a standard deviation of sqrt(1/12) or, rounded at random, of at most 1/2.
    deviation = 0.5 if limit == 1.0 else 12**-0.5
    assert mean.abs().max() < 5 * deviation / steps**0.5
    assert mean.mean().abs() < 5 * deviation / (steps * mean.numel()) ** 0.5
    if isinstance(case.estimator, AdditiveNoise):
        assert abs(float(mean.std() * steps**0.5) - 12**-0.5) < 0.06


@EVERY_RANDOM
def test_draws_follow_from_seed_site_and_step_alone(case):
    (quantizer, x), (again, _) = case.training(), case.training()
    with torch.no_grad():
        first = quantizer(x)
        torch.rand(3)
        assert torch.equal(again(x), first)
        second = quantizer(x)
        assert not torch.equal(second, first)
        evaluated(again, x)  # draws nothing, and takes no step
        assert torch.equal(again(x), second)
        again.site = "fc.other"
        quantizer(x), again.step.copy_(quantizer.step - 1)
        assert not torch.equal(again(x), quantizer(x))
    rounded = case.quantizer()(data())
    assert torch.equal(evaluated(quantizer, x), rounded)


# Refusals


@pytest.mark.parametrize(
    ("case", "why"),
    [
        (Case(LSQ(), NormalFloat(4)), "lsq: a scale that is learned needs an integer grid with scale=float32"),
        (Case(LSQPlus(), SHIFTS["affine"]), r"lsq\+: a scale that is learned needs"),
        (Case(LSQ(), SYMMETRIC, PerToken(), False), "lsq: a scale of each call"),
        (Case(PACT(), AFFINE, PerToken(), False), "pact: an alpha of each call"),
        (Case(PACT(), SYMMETRIC, PerTensor(), False), "pact: clipping at 0 and alpha needs convention=affine"),
        (Case(TQT()), "tqt: needs an integer grid with scale=power_of_two, as that of quantizer=int8_pow2"),
        (Case(TQT(), NormalFloat(4)), "tqt: needs an integer grid"),
        (Case(TQT(), SHIFTS["affine"], PerToken(), False), "tqt: a threshold of each call"),
        (Case(DoReFa(), AFFINE, PerTensor(), False), "dorefa: is made for weights alone"),
        (Case(AdditiveNoise(), NormalFloat(4)), "additive noise: noise of one step needs evenly spaced values"),
    ],
    ids=str,
)
def test_what_cannot_be_trained_is_refused_with_the_site(case, why):
    quantizer = Quantizer(Scheme(case.grid, case.granularity), SHAPE, "fc.site", case.is_weight)
    with pytest.raises(ValueError, match=rf"^fc\.site: {why}"):
        quantizer.train_with_(case.estimator)
    assert quantizer.estimator is None


@pytest.mark.parametrize(
    ("make", "option"),
    [
        (lambda: StraightThrough("soft"), "gradient='soft'"),
        (lambda: LSQ("half"), "gradient_scale='half'"),
        (lambda: LSQPlus("half"), "gradient_scale='half'"),
        (lambda: PACT(-1.0), "decay=-1.0"),
        (lambda: PACT(math.nan), "decay=nan"),
        (lambda: PACT(True), "decay=True"),
        (lambda: AdditiveNoise(-1), "seed=-1"),
    ],
)
def test_wrong_options_are_named(make, option):
    with pytest.raises(ValueError, match=option):
        make()


def test_sites_that_read_one_tensor_by_one_scale_quantize_it_once():
    """Value and gradients are those of two quantizers, each on its own."""
    torch.manual_seed(0)
    x, w = torch.randn(64), torch.randn(64)

    def both(shared: bool):
        sites = [Quantizer(Scheme(IntegerGrid(3)), (), name) for name in ("a", "b")]
        for site in sites:
            site.set_range(torch.tensor(-1.0), torch.tensor(1.0))
            site.mode = Mode.QUANTIZE
            site.train_with_(LSQ())
            site.train()
        sites[1].learned_scale = sites[0].learned_scale
        if shared:
            sites[0].once = sites[1].once = Once()
        leaf = x.clone().requires_grad_()
        read = leaf * 1.5
        a, b = (site(read) for site in sites)
        (a * w + b * b).sum().backward()
        return a, b, leaf.grad, sites

    a, b, grad, _ = both(False)
    once_a, once_b, once_grad, sites = both(True)
    assert once_a is once_b
    torch.testing.assert_close((once_a, once_b, once_grad), (a, b, grad), rtol=1e-6, atol=1e-6)
    alone, shared = (both(flag)[3][0].learned_scale.grad for flag in (False, True))
    torch.testing.assert_close(shared, alone, rtol=1e-5, atol=1e-6)
    other = x * 1.5  # equal, and yet another tensor
    assert sites[0](other) is not sites[0](x * 1.5)
    first = sites[0](other)
    other += 1  # what was read has changed since
    assert not torch.equal(sites[1](other), first)
