"""The compiled fake-quantize against the eager one: values and gradients to the bit."""

import pytest
import torch

from qexp.quant import affine, compiled
from qexp.quant.estimators import LSQ
from qexp.quant.granularity import PerChannel, PerGroup, PerTensor
from qexp.quant.grid import IntegerGrid
from qexp.quant.quantizer import Mode, Quantizer
from qexp.quant.recipe import Scheme
from qexp.quant.rounding import Floor, HalfEven, Stochastic
from qexp.quant.sketch import Sketch

pytestmark = pytest.mark.usefixtures("one_thread")


def both_ways(module, x, qparams, grid, rounding):
    x = x.clone().requires_grad_()
    y = module.fake_quantize(x, qparams, grid, rounding)
    y.backward(torch.arange(1.0, x.numel() + 1).view_as(x))
    return y.detach(), x.grad


@pytest.mark.parametrize("rounding", [HalfEven(), Stochastic(3)], ids=str)
@pytest.mark.parametrize("convention", ["affine", "restricted"])
@pytest.mark.parametrize("channels", [1, 6])
def test_values_and_gradients_are_those_of_the_eager_form(rounding, convention, channels):
    grid = IntegerGrid(4, convention)
    x = torch.randn(6, 257, generator=torch.Generator().manual_seed(0))
    rows = x.view(channels, -1)
    qparams = grid.qparams(*(0.7 * bound for bound in (rows.amin(1, keepdim=True), rows.amax(1, keepdim=True))))
    # Levels, ties and their neighbours, where a rounding or a mask that is off by one float shows.
    row_scale = qparams.scale.expand(channels, 1).repeat_interleave(6 // channels, 0)  # (6, 1)
    marks = torch.arange(-20, 20.5, 0.5) * row_scale  # (6, 81)
    x[:, :243] = torch.cat([torch.nextafter(marks, marks + way) for way in (-1, 0, 1)], 1)
    expected, found = (both_ways(module, x, qparams, grid, rounding) for module in (affine, compiled))
    for wanted, got in zip(expected, found, strict=True):
        assert torch.equal(wanted, got)
    assert 0 < int((expected[1] == 0).sum()) < x.numel()  # some are clipped, some are not


def test_other_roundings_are_refused():
    grid, one = IntegerGrid(4), torch.tensor(1.0)
    with pytest.raises(ValueError, match="rounding=floor, torch.float32 on cpu: compiled are half_even and stochastic"):
        compiled.fake_quantize(torch.ones(3), affine.QParams(one, one * 0), grid, Floor())


@pytest.mark.parametrize("shape", [(3, 5, 7), (1, 5, 1), (3, 1, 7), (1, 1, 7), (3, 5, 1), (3, 1, 1)], ids=str)
def test_scales_of_any_shape_belong_to_their_elements(shape):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 5, 7, generator=generator)
    grid = IntegerGrid(3, "affine")
    qparams = grid.qparams(-torch.rand(shape, generator=generator), torch.rand(shape, generator=generator))
    expected, found = (both_ways(module, x, qparams, grid, HalfEven()) for module in (affine, compiled))
    assert all(map(torch.equal, expected, found))


def quotients_near_rounding_boundaries(scale, codes, generator):
    """x whose float64 quotient lies as close as float32 can tell to where the float32 quotient rounds to a tie."""
    ties = torch.arange(-codes, codes) + 0.5
    up, down = (torch.nextafter(ties, torch.full_like(ties, way)) for way in (torch.inf, -torch.inf))
    boundaries = torch.cat([ties.double(), (ties.double() + up) / 2, (ties.double() + down) / 2])
    x = (boundaries * float(scale)).float()
    return torch.cat([x, *(torch.nextafter(x, torch.full_like(x, way)) for way in (torch.inf, -torch.inf))])


@pytest.mark.parametrize("kind", ["anywhere", "just below a power of two", "tiny", "huge", "subnormal"])
def test_the_quotient_is_that_of_a_division(kind):
    generator = torch.Generator().manual_seed(2)
    grid = IntegerGrid(8)
    scales = {
        "anywhere": torch.exp(torch.randn(2000, generator=generator) * 8),
        "just below a power of two": 1 - torch.arange(1, 300) * 2.0**-24,
        "tiny": 2.0**-124 * (1 + torch.rand(50, generator=generator)),
        "huge": 2.0**119 * (1 + torch.rand(50, generator=generator)),
        "subnormal": 2.0**-140 * (1 + torch.rand(50, generator=generator)),
    }[kind]
    for scale in scales:
        x = quotients_near_rounding_boundaries(scale, 128, generator)
        x = torch.cat([x, torch.tensor([3e38, -3e38, 1e-45, 0.0, -0.0])])
        # A float64 quotient of two float32 numbers rounds to their float32 quotient.
        quotient = (x.double() / scale.double()).float()
        expected = quotient.round().clamp(grid.quant_min, grid.quant_max) * scale + 0.0
        found = compiled.fake_quantize(x, affine.QParams(scale, scale * 0), grid)
        assert torch.equal(found, expected) and torch.equal(found.signbit(), expected.signbit())


def test_not_a_number_stays_one():
    one = torch.tensor(1.0)
    values = compiled.fake_quantize(torch.tensor([torch.nan, 2.2]), affine.QParams(one, one * 0), IntegerGrid(4))
    assert values[0].isnan() and values[1] == 2


def test_other_types_are_refused():
    one = torch.tensor(1.0)
    with pytest.raises(ValueError, match="rounding=half_even, torch.float64 on cpu: compiled are"):
        compiled.fake_quantize(torch.ones(3).double(), affine.QParams(one, one * 0), IntegerGrid(4))


def test_compiling_takes_time_that_is_told():
    assert compiled.warm_up() > 0


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(1)], ids=str)
def test_a_sketch_counts_the_same(granularity, threads, monkeypatch):
    generator = torch.Generator().manual_seed(3)
    batches = [torch.randn(50, 4, 500, generator=generator) * 10.0**k for k in (-3, 0, -12, 2)]
    batches += [batches[0].relu(), torch.zeros(50, 4, 500), torch.full((50, 4, 500), -1e-40)]
    compiled.warm_up()
    torch.set_num_threads(threads)
    fast, plain = (Sketch(granularity, (50, 4, 500)) for _ in range(2))
    for x in batches:
        fast.update(x)
        with monkeypatch.context() as patch:
            patch.setattr(compiled, "is_loaded", lambda: False)
            plain.update(x)
    assert int(fast.counts.sum() + fast.zeros.sum()) == sum(x.numel() for x in batches)
    for name, buffer in plain.named_buffers():
        assert torch.equal(buffer, fast.get_buffer(name)), name


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0), PerChannel(1), PerGroup(9)], ids=str)
def test_a_learned_scale_gets_the_same_gradient(granularity, monkeypatch):
    generator = torch.Generator().manual_seed(4)
    x, grad = (torch.randn(6, 14, 900, generator=generator) for _ in range(2))
    compiled.warm_up()
    found = []
    for loaded in True, False:
        monkeypatch.setattr(compiled, "is_loaded", lambda loaded=loaded: loaded)
        quantizer = Quantizer(Scheme(IntegerGrid(4), granularity), tuple(x.shape), "w", is_weight=True)
        quantizer.calibrate(0.6 * x)
        quantizer.mode = Mode.QUANTIZE
        quantizer.train_with_(LSQ())
        moved = x.clone().requires_grad_()
        y = quantizer(moved)
        y.backward(grad)
        found.append((y.detach(), moved.grad, quantizer.learned_scale.grad))
    (y, of_x, of_scale), (same_y, same_of_x, near_of_scale) = found
    assert torch.equal(y, same_y) and torch.equal(of_x, same_of_x)
    torch.testing.assert_close(of_scale, near_of_scale, rtol=1e-4, atol=1e-5 * float(near_of_scale.abs().max()))


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
def test_deterministic_training_goes_on_filling_what_others_allocate():
    one = torch.tensor(1.0)
    both_ways(compiled, torch.ones(3), affine.QParams(one, one * 0), IntegerGrid(4), HalfEven())
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(1000).isnan().all()
