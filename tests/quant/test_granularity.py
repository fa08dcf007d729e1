"""Blocks against a loop over the tensor, and every granularity against per-tensor on every block."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qexp.quant.affine import fake_quantize
from qexp.quant.calibration import MinMax, Percentile
from qexp.quant.codebooks import NormalFloat
from qexp.quant.entropy import Entropy
from qexp.quant.granularity import (
    Granularity,
    PerBlock,
    PerChannel,
    PerColumn,
    PerElement,
    PerGroup,
    PerRow,
    PerTensor,
    PerToken,
    blocks,
    join,
    split,
)
from qexp.quant.grid import CONVENTIONS, IntegerGrid
from qexp.quant.minifloat import Minifloat
from qexp.quant.quantizer import Mode, Quantizer
from qexp.quant.recipe import Scheme
from qexp.quant.search import MSE
from qexp.quant.stats import Statistics

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


# granularity -> its blocks, written by hand, of a weight (out, in), one (out, in, kh, kw), activations (N, T, D)
OF_WEIGHTS = {
    PerTensor(): ((12, 8), (12, 8, 3, 2), (4, 6, 8)),
    PerChannel(0): ((1, 8), (1, 8, 3, 2), (1, 6, 8)),
    PerChannel(1): ((12, 1), (12, 1, 3, 2), (4, 1, 8)),
    PerColumn(): ((1, 8), (1, 8, 3, 2), (1, 6, 8)),
    PerRow(): ((12, 1), (12, 1, 3, 2), (4, 6, 1)),
    PerColumn(of_weight=False): ((12, 1), (12, 1, 3, 2), (4, 6, 1)),
    PerRow(of_weight=False): ((1, 8), (1, 8, 3, 2), (1, 6, 8)),
    PerGroup(4): ((1, 4), (1, 4, 1, 1), (1, 1, 4)),
    PerGroup(3, pad=True): ((1, 3), (1, 3, 1, 1), (1, 1, 3)),
    PerGroup(64, pad=True): ((1, 64), (1, 64, 1, 1), (1, 1, 64)),
    PerBlock(4, 2): ((4, 2), (4, 2, 3, 2), (4, 6, 2)),
    PerBlock(5, 3, pad=True): ((5, 3), (5, 3, 3, 2), (5, 6, 3)),
    PerToken(): ((1, 8), (1, 8, 1, 1), (1, 1, 8)),
    PerElement(): ((1, 1), (1, 1, 1, 1), (1, 1, 1)),
}
SHAPES = [(12, 8), (12, 8, 3, 2), (4, 6, 8)]
EVERY_GRANULARITY = pytest.mark.parametrize(
    "granularity", OF_WEIGHTS, ids=lambda g: f"{g}{'' if getattr(g, 'of_weight', True) else ' of activations'}"
)


def filled_up(x, block_shape):
    """x in the corner of zeros, of the next multiple of each size."""
    whole = x.new_zeros([-(-n // b) * b for n, b in zip(x.shape, block_shape, strict=True)])
    whole[tuple(slice(n) for n in x.shape)] = x
    return whole


@EVERY_GRANULARITY
def test_blocks_of_every_granularity_are_those_written_by_hand(granularity):
    for shape, block_shape in zip(SHAPES, OF_WEIGHTS[granularity], strict=True):
        assert granularity.block_shape(shape) == block_shape
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        whole = filled_up(x, block_shape)
        assert torch.equal(blocks(x, block_shape), blocks_by_loop(whole, block_shape))
        counts = granularity.param_shape(shape)
        assert counts == tuple(n // b for n, b in zip(whole.shape, block_shape, strict=True))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 7), st.integers(1, 5)), min_size=1, max_size=4), st.booleans())
def test_join_undoes_split_with_or_without_an_incomplete_block(sizes, transposed):
    x = torch.randn([n for n, _ in sizes])
    block_shape = tuple(b for _, b in sizes)
    if transposed:
        x, block_shape = x.transpose(0, -1), (block_shape[-1], *block_shape[1:-1], block_shape[0])[: x.dim()]
    blocked = split(x, block_shape)
    assert list(blocked.shape[1::2]) == list(block_shape)
    assert torch.equal(join(blocked, tuple(x.shape)), x)
    assert torch.equal(blocks(x, block_shape), blocks_by_loop(filled_up(x, block_shape), block_shape))


def test_what_fills_up_a_block_is_no_value():
    x = torch.tensor([[5.0, 6.0, 7.0, 8.0, 9.0]])
    stats = Statistics.of(x, (1, 3))
    assert stats.weights.sum().item() == 5
    assert sorted(stats.points[stats.weights > 0].tolist()) == x[0].tolist()


def random_tensor(shape):
    """Of very different sizes along each dimension, with a block of zeros."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(8))
    for axis, n in enumerate(shape):
        x = x * torch.logspace(-1.5, 1.5, n).view([-1 if i == axis else 1 for i in range(len(shape))])
    x[0] = 0
    return x


GRIDS = [
    IntegerGrid(4), IntegerGrid(4, "affine"), IntegerGrid(8, "full_range"), IntegerGrid(3, "unsigned"),
    IntegerGrid(4, "restricted", "power_of_two"), Minifloat(2, 1, "none", "e8m0"), Minifloat(4, 3, "fn"),
    NormalFloat(4),
]  # fmt: skip


def quantizer_of(scheme, x, is_weight):
    quantizer = Quantizer(scheme, tuple(x.shape), "site", is_weight)
    if not is_weight:
        quantizer.start_observing()
        quantizer(x)
    quantizer.calibrate(x if is_weight else None)
    quantizer.mode = Mode.QUANTIZE
    return quantizer


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@EVERY_GRANULARITY
def test_every_granularity_equals_per_tensor_on_every_block(granularity, grid):
    kernel = (4, 4, 2, 1)
    for calibration, shape in (Percentile(80.0), (4, 8)), (MinMax(), kernel):
        x = random_tensor(shape)
        sizes = granularity.block_shape(shape)
        expected, codes, clipped = torch.empty_like(x), torch.empty_like(x), 0
        for corner in itertools.product(*(range(0, n, b) for n, b in zip(shape, sizes, strict=True))):
            place = tuple(slice(start, start + b) for start, b in zip(corner, sizes, strict=True))
            one = quantizer_of(Scheme(grid, PerTensor(), calibration), x[place], is_weight=True)
            expected[place], codes[place] = one(x[place]), one.codes(x[place])
            clipped += one.clipped(x[place])
        whole = quantizer_of(Scheme(grid, granularity, calibration), x, is_weight=True)
        assert torch.equal(whole(x), expected)
        assert torch.equal(whole.codes(x), codes)
        assert whole.clipped(x) == clipped
        # Activations whose blocks lie within a sample have the ranges of each call.
        if granularity.follows_batch:
            passing = quantizer_of(Scheme(grid, granularity, calibration), x, is_weight=False)
            assert torch.equal(passing(x), expected)
            assert torch.equal(passing.codes(x), codes)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("granularity", [PerToken(), PerGroup(4), PerGroup(3, pad=True), PerElement()], ids=str)
@pytest.mark.parametrize("shape", [(5, 8), (5, 4, 8), (5, 8, 3, 3)])
def test_a_sample_alone_is_quantized_as_in_a_batch(grid, granularity, shape):
    x = random_tensor(shape)
    quantizer = quantizer_of(Scheme(grid, granularity), x, is_weight=False)
    assert quantizer.dynamic
    together = quantizer(x)
    for sample in range(5):
        assert torch.equal(quantizer(x[sample : sample + 1])[0], together[sample])
    assert torch.equal(quantizer(x[[3, 1, 3]]), together[[3, 1, 3]])


@pytest.mark.parametrize("grid", [g for g in GRIDS if g.scale == "float32" and g.convention != "unsigned"], ids=str)
def test_per_element_leaves_an_error_of_rounding_alone(grid):
    x = random_tensor((12, 8))
    quantizer = quantizer_of(Scheme(grid, PerElement()), x, is_weight=True)
    if grid == IntegerGrid(8, "full_range"):  # sends +max to the middle between two codes, half of which does not exist
        assert torch.allclose(quantizer(x), x, rtol=1 / 255 + 1e-6, atol=0)
    else:
        assert torch.allclose(quantizer(x), x, rtol=4e-7, atol=0)


def test_columns_and_rows_are_those_of_w_in_y_equals_x_w():
    linear, x = torch.nn.Linear(6, 4, bias=False), torch.randn(3, 6)
    w = linear.weight.detach().T  # (in, out)
    assert torch.allclose(linear(x), x @ w, atol=1e-6)
    grid = IntegerGrid(8)
    by_column = quantizer_of(Scheme(grid, PerColumn()), linear.weight.detach(), is_weight=True)
    by_row = quantizer_of(Scheme(grid, PerRow()), linear.weight.detach(), is_weight=True)
    assert torch.equal(by_column.scale.flatten(), w.abs().amax(0) / 127)
    assert torch.equal(by_row.scale.flatten(), w.abs().amax(1) / 127)
    by_channel = quantizer_of(Scheme(grid, PerChannel(0)), linear.weight.detach(), is_weight=True)
    assert torch.equal(by_channel(linear.weight), by_column(linear.weight))
    # Of X a row is a sample, whose range is that of each call, and a column is a feature.
    rows = quantizer_of(Scheme(grid, PerRow(of_weight=False)), x, is_weight=False)
    assert rows.dynamic and torch.equal(rows.qparams_for(x).scale.flatten(), x.abs().amax(1) / 127)
    columns = quantizer_of(Scheme(grid, PerColumn(of_weight=False)), x, is_weight=False)
    assert not columns.dynamic and torch.equal(columns.scale.flatten(), x.abs().amax(0) / 127)


@pytest.mark.parametrize(
    ("granularity", "shape", "says"),
    [
        (PerGroup(32), (4, 40), r"per_group\(32\): blocks of 32 do not divide dimension 1 of .* shape \(4, 40\)"),
        (PerGroup(3), (4, 8, 3, 3), r"blocks of 3 do not divide dimension 1 of a tensor of shape \(4, 8, 3, 3\)"),
        (PerGroup(5), (2, 3, 8), r"blocks of 5 do not divide dimension 2 of a tensor of shape \(2, 3, 8\)"),
        (PerBlock(16, 4), (24, 8), r"per_block\(16x4\): blocks of 16 do not divide dimension 0 .* \(24, 8\)"),
        (PerBlock(4, 4), (7,), r"per_block\(4x4\): a tensor of shape \(7,\) has no rows and columns"),
    ],
)
def test_blocks_that_do_not_divide_a_tensor_are_refused_with_both(granularity, shape, says):
    with pytest.raises(ValueError, match=says):
        granularity.param_shape(shape)
    with pytest.raises(ValueError, match=says):
        Quantizer(Scheme(IntegerGrid(4), granularity), shape, is_weight=True)
    if len(shape) > 1:
        passing = Quantizer(Scheme(IntegerGrid(4), granularity), shape, "fc.input")
        passing.mode = Mode.QUANTIZE
        with pytest.raises(ValueError, match=f"fc.input: .*{says}"):
            passing(torch.ones(shape))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: PerGroup(0), "size=0: must be an integer of at least 1"),
        (lambda: PerGroup(True), "size=True"),
        (lambda: PerGroup(8, 1), "pad=1: allowed are true and false"),
        (lambda: PerBlock(0, 4), "rows=0"),
        (lambda: PerBlock(4, 2.5), "columns=2.5"),
        (lambda: PerBlock(4, 4, None), "pad=None"),
    ],
)
def test_sizes_that_are_none_are_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()
