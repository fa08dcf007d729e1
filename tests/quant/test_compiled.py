"""The compiled fake-quantize against the eager one: values and gradients to the bit."""

import pytest
import torch

from qexp.quant import affine, compiled
from qexp.quant.grid import IntegerGrid
from qexp.quant.rounding import Floor, HalfEven, Stochastic

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
    with pytest.raises(ValueError, match="rounding=floor: compiled are half_even and stochastic"):
        compiled.fake_quantize(torch.ones(3), affine.QParams(one, one * 0), grid, Floor())


def test_compiling_takes_time_that_is_told():
    grid, one = IntegerGrid(4), torch.tensor(1.0)
    assert compiled.warm_up(torch.ones(31), affine.QParams(one, one * 0), grid) > 0
