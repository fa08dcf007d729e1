"""Blocks against a loop over the tensor, and per-channel against per-tensor on every channel."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qexp.quant.affine import fake_quantize
from qexp.quant.calibration import MinMax, Percentile
from qexp.quant.entropy import Entropy
from qexp.quant.granularity import Granularity, PerChannel, PerTensor, blocks
from qexp.quant.grid import CONVENTIONS, IntegerGrid
from qexp.quant.quantizer import Mode, Quantizer
from qexp.quant.recipe import Scheme
from qexp.quant.search import MSE

dimensions = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=4)


def blocks_by_loop(x, block_shape):
    """One slice after the other, the last dimension fastest."""
    starts = [range(0, n, b) for n, b in zip(x.shape, block_shape, strict=True)]
    return torch.stack(
        [
            x[tuple(slice(s, s + b) for s, b in zip(corner, block_shape, strict=True))].flatten()
            for corner in itertools.product(*starts)
        ]
    )


@settings(max_examples=60, deadline=None)
@given(dimensions, st.booleans())
def test_blocks_are_the_slices_of_the_tensor_in_order(counts_and_sizes, transposed):
    block_shape = tuple(b for _, b in counts_and_sizes)
    x = torch.arange(torch.tensor([n * b for n, b in counts_and_sizes]).prod().item())
    x = x.view([n * b for n, b in counts_and_sizes])
    if transposed:  # no longer contiguous
        x, block_shape = x.transpose(0, -1), (block_shape[-1], *block_shape[1:-1], block_shape[0])[: x.dim()]
    assert torch.equal(blocks(x, block_shape), blocks_by_loop(x, block_shape))


def test_the_shape_of_the_parameters_counts_the_blocks():
    assert PerTensor().param_shape((4, 3, 2, 2)) == (1, 1, 1, 1)
    assert PerChannel(0).param_shape((4, 3, 2, 2)) == (4, 1, 1, 1)
    assert PerChannel(1).param_shape((4, 3, 2, 2)) == (1, 3, 1, 1)


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("calibration", [MinMax(), Percentile(99.0), MSE(20), Entropy(256, 64)], ids=str)
def test_per_channel_equals_per_tensor_on_every_channel(convention, calibration):
    weight = torch.randn(6, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    weight *= torch.logspace(-6, 3, 6).view(-1, 1, 1, 1)
    weight[2] = 0
    grid = IntegerGrid(4, convention)
    whole = Quantizer(Scheme(grid, PerChannel(0), calibration), weight.shape, is_weight=True)
    whole.calibrate(weight)
    whole.mode = Mode.QUANTIZE
    for channel in range(6):
        one = Quantizer(Scheme(grid, PerTensor(), calibration), weight[channel].shape, is_weight=True)
        one.calibrate(weight[channel])
        assert torch.equal(one.scale.flatten(), whole.scale[channel].flatten())
        assert torch.equal(fake_quantize(weight[channel], one.qparams, grid), whole(weight)[channel])


def test_an_axis_that_the_tensor_lacks_is_refused():
    with pytest.raises(ValueError, match="axis=2"):
        PerChannel(2).block_shape((4, 3))


@pytest.mark.parametrize("axis", [-1, 0.0, True, "0"])
def test_an_axis_that_is_no_index_is_refused(axis):
    with pytest.raises(ValueError, match="axis="):
        PerChannel(axis)


def test_a_granularity_without_a_block_shape_says_so():
    with pytest.raises(TypeError, match="block_shape"):
        Granularity().block_shape((1,))
