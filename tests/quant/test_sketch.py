"""The sketch of a stream: it depends on the multiset of values alone, merges exactly and loses 2^-12 of a value."""

import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qexp.quant.calibration import Percentile
from qexp.quant.granularity import PerChannel
from qexp.quant.grid import IntegerGrid
from qexp.quant.sketch import Sketch, _largest

pytestmark = pytest.mark.usefixtures("one_thread")

OF_BATCHES = {"first", "faded", "batches"}  # the only buffers that know how the data were cut
OCTAVES = 20
# Magnitudes from 2^-60 to 2^60, zeros of both signs and denormals.
numbers = st.one_of(
    st.sampled_from([0.0, -0.0, 1e-45, -1e-40, 2.0**-126]),
    st.builds(math.ldexp, st.floats(-1, 1, width=16), st.integers(-60, 60)).map(np.float32).map(float),
)
samples = st.lists(numbers, min_size=1, max_size=40)
examples = settings(max_examples=60, deadline=None)


def sketched(batches, channels=0, constant=0.01):
    """A sketch of the batches, per tensor or of so many channels."""
    sketch = Sketch(PerChannel(1), (1, channels), constant) if channels else Sketch(constant=constant)
    for batch in batches:
        sketch.update(torch.as_tensor(batch, dtype=torch.float32))
    return sketch


def merged(parts):
    """The first part, with the others merged into it one after the other."""
    whole, *others = parts
    for other in others:
        whole.merge(other)
    return whole


def cut(values, data):
    """The values in as many pieces as `data` (of hypothesis) wants, none empty."""
    cuts = sorted(data.draw(st.lists(st.integers(1, len(values)), max_size=4)))
    return [values[a:b] for a, b in zip([0, *cuts], [*cuts, len(values)], strict=True) if a < b]


def assert_same(one, other, apart_from=OF_BATCHES):
    twins = dict(other.named_buffers())
    for name, buffer in one.named_buffers():
        assert name in apart_from or torch.equal(buffer, twins[name]), name
    a, b = one.compute(), other.compute()
    for name in ("lo", "hi", "points", "weights", *([] if "first" in apart_from else ["average"])):
        assert torch.equal(getattr(a, name), getattr(b, name)), name


def edges(exponent, fraction=11):
    """Edges of the cells of one sign, from their definition: 2^fraction equal parts of each of 20 octaves."""
    octaves = 2.0 ** np.arange(exponent - OCTAVES, exponent)
    return np.concatenate([[0.0], np.outer(octaves, 1 + np.arange(2**fraction) / 2**fraction).ravel(), [2.0**exponent]])


def cells(values, exponent, fraction=11):
    """Counts of the non-zero values by numpy, from the largest negative cell to the largest positive one."""
    values = np.asarray(values, np.float64)
    of_sign = [np.histogram(v[v > 0], edges(exponent, fraction))[0] for v in (-values, values)]
    return np.concatenate([of_sign[0][::-1], of_sign[1]])


@examples
@given(samples, st.data())
def test_batches_and_their_order_change_nothing(values, data):
    batches = cut(data.draw(st.permutations(values)), data)
    assert_same(sketched(batches), sketched([values]))


@examples
@given(samples, st.data())
def test_shards_merge_into_the_sketch_of_the_whole(values, data):
    shards = cut(data.draw(st.permutations(values)), data)
    assert_same(merged([sketched([shard]) for shard in shards]), sketched([values]))


@examples
@given(st.lists(st.tuples(numbers, numbers, numbers), min_size=1, max_size=12), st.data())
def test_shards_of_many_channels_merge_into_the_sketch_of_the_whole(rows, data):
    shards = cut(data.draw(st.permutations(rows)), data)
    whole = sketched([rows], channels=3)
    assert_same(sketched(shards, channels=3), whole)
    assert_same(merged([sketched([shard], channels=3) for shard in shards]), whole)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("channels", [0, 5])
def test_windows_that_lie_octaves_apart_merge(order, channels):
    """More values than the tails hold, over 160 octaves; a merge widens either window."""
    generator = torch.Generator().manual_seed(0)
    shape = (3000, channels) if channels else (6000,)
    batches = [torch.randn(shape, generator=generator) * 2.0**k for k in range(-80, 81, 16)][::order]
    whole = sketched([torch.cat(batches)], channels)
    assert_same(sketched(batches, channels), whole)
    assert_same(merged([sketched([batch], channels) for batch in batches]), whole)


@pytest.mark.parametrize(
    "values",
    [
        [-1e-12, 3e38], [-1e-40, 1e20], [1e-45, 1.0], [-1e-45, -1e-36], [1e-36, 5e-37], [-0.0, 1e-9], [0.0, 0.0],
        [-1.0, -3e-7, -5.0], [-0.0, -1e-45], [2.0**-126, -(2.0**-127)],
    ],
    ids=str,
)  # fmt: skip
def test_the_order_changes_nothing_at_the_ends_of_float32(values):
    together = sketched([values])
    assert_same(sketched([[v] for v in values]), together)
    assert_same(sketched([[v] for v in reversed(values)]), together)
    assert_same(merged([sketched([[v]]) for v in reversed(values)]), together)


def test_merged_with_an_empty_one_a_sketch_stays_as_it_is():
    full = sketched([[1.0, -2.0], [3.0]])
    assert_same(merged([sketched([]), full]), full, apart_from=())
    assert_same(merged([sketched([[1.0, -2.0], [3.0]]), sketched([])]), full, apart_from=())


def test_averages_of_consecutive_shards_are_those_of_the_whole():
    """With the constant 1/2 and whole numbers float64 is exact, so merging may not change a bit."""
    batches = torch.randint(-50, 50, (12, 30), generator=torch.Generator().manual_seed(0))
    whole = sketched(batches, constant=0.5)
    for cuts in [(1,), (5,), (11,), (3, 4), (2, 7, 9)]:
        shards = [sketched(shard, constant=0.5) for shard in np.split(batches.numpy(), cuts)]
        assert_same(merged(shards), whole, apart_from=())


@pytest.mark.parametrize("other", [Sketch(constant=0.3), Sketch(PerChannel(1), (1, 2)), Sketch(PerChannel(1), (1, 4))])
def test_sketches_of_another_kind_do_not_merge(other):
    with pytest.raises(ValueError, match="different blocks or constants"):
        Sketch(PerChannel(1), (1, 3)).merge(other)


@examples
@given(samples)
def test_the_counts_are_those_of_numpy(values):
    sketch = sketched([values[:3], values] if values[3:] else [values])
    seen = np.array(values[:3] + values if values[3:] else values, np.float32)
    exponent = max(math.frexp(np.abs(seen).max())[1], -106) if seen.any() else -106
    assert int(sketch.exponent) == exponent
    assert np.array_equal(sketch.counts[0].numpy(), cells(seen, exponent))
    assert int(sketch.zeros) == (seen == 0).sum()
    assert int(sketch.counts.sum() + sketch.zeros) == int(sketch.seen) == len(seen)


def test_the_counts_of_channels_are_those_of_numpy():
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(50, 3, 4, 5)) * [[[[1e-3]], [[1.0]], [[40.0]]]]).astype(np.float32)
    x[rng.random(x.shape) < 0.2] = 0
    sketch = Sketch(PerChannel(1), (1, 3, 4, 5))
    for batch in np.split(x, [7, 30]):
        sketch.update(torch.from_numpy(batch))
    for channel in range(3):
        expected = cells(x[:, channel].ravel(), math.frexp(np.abs(x).max())[1], fraction=7)
        assert np.array_equal(sketch.counts[channel].numpy(), expected)
        assert int(sketch.zeros[channel]) == (x[:, channel] == 0).sum()


@pytest.mark.parametrize("value", [1.0, -1.0, 0.75, 2.0**-30, -(2.0**30), 1 + 2.0**-11, -1 - 2.0**-11])
def test_a_value_at_an_edge_falls_into_the_cell_that_it_opens(value):
    sketch = sketched([[value]])
    (index,) = sketch.counts[0].nonzero().flatten().tolist()
    index = index - sketch.side if value > 0 else sketch.side - 1 - index
    low, high = edges(int(sketch.exponent))[index : index + 2]
    assert low == abs(value) < high == low * (1 + (high - low) / low)
    assert 2.0**-12 < (high - low) / low <= 2.0**-11


@examples
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
def test_the_extrema_are_exact(values):
    stats = sketched([values]).compute()
    assert (stats.lo.item(), stats.hi.item()) == (min(values), max(values))


def heavy(rng, n):
    """A bulk with values from 2^-40 to a thousand times itself, and zeros."""
    x = rng.normal(size=n) * np.exp(rng.normal(size=n))
    x[: n // 100] *= 1000
    x[n // 100 : n // 50] *= 2.0**-40
    x[n // 50 : n // 20] = 0
    return rng.permutation(x).astype(np.float32)


@pytest.mark.parametrize("sign", [None, 1, -1])
def test_points_are_sorted_and_within_2_to_the_minus_12_of_the_values(sign):
    x = heavy(np.random.default_rng(0), 200_000)
    x = x if sign is None else sign * np.abs(x)
    stats = sketched(np.array_split(x, 9)).compute()
    assert (stats.points.diff(dim=1) >= 0).all()
    points = np.repeat(stats.points[0].double().numpy(), stats.weights[0].long().numpy())
    assert len(points) == len(x)
    window = 2.0 ** (math.frexp(np.abs(x).max())[1] - OCTAVES)
    x = np.sort(x).astype(np.float64)
    inside = np.abs(x) >= window
    assert inside.sum() > 0.8 * len(x)
    assert np.abs(points - x)[inside].max() > 0
    assert (np.abs(points - x)[inside] <= np.abs(x[inside]) * 2.0**-12).all()
    assert (np.abs(points - x)[~inside] <= window).all()
    assert x[0] == stats.lo == points[0] and x[-1] == stats.hi == points[-1]
    assert (points == 0).sum() == (x == 0).sum()


def test_points_of_few_values_are_the_values():
    values = heavy(np.random.default_rng(1), 2000)
    stats = sketched([values]).compute()
    assert np.array_equal(np.repeat(stats.points[0].numpy(), stats.weights[0].long().numpy()), np.sort(values))


def test_zeros_stay_exact_points_of_their_own():
    stats = sketched([[0.0, -0.0, 3.0, 0.0, 1e-9]]).compute()
    assert stats.weights[stats.points == 0].tolist() == [3.0]


@pytest.mark.parametrize("zeros", [[0.0] * 5, [-0.0] * 5], ids=str)
def test_zeros_alone_leave_the_window_where_it_is(zeros):
    stats = sketched([zeros]).compute()
    assert (stats.points.tolist(), stats.weights.tolist()) == ([[0.0]], [[5.0]])
    small = torch.rand(5000, generator=torch.Generator().manual_seed(0)) * 1e-9
    assert torch.equal(sketched([zeros, small]).counts, sketched([small]).counts)


BEYOND = [1, 2, 3, 17, 100, 1000, *range(2040, 2049)]  # numbers of values at or beyond a percentile


@pytest.mark.parametrize("draw", ["normal", "heavy", "relu", "whole numbers"])
def test_extreme_percentiles_of_a_large_stream_are_those_of_numpy(draw):
    """Of a million values the 2,048 largest of each sign are exact, so percentiles above 1 - 2048 / N are."""
    rng = np.random.default_rng(2)
    x = {
        "normal": lambda: rng.normal(size=1_200_000),
        "heavy": lambda: heavy(rng, 1_200_000),
        "relu": lambda: rng.normal(size=1_200_000).clip(min=0),
        "whole numbers": lambda: rng.integers(-3000, 3000, size=1_200_000),
    }[draw]().astype(np.float32)
    stats = sketched([x[:300_000], x[300_000:300_500], x[300_500:]]).compute()
    shares = 1 - (np.array(BEYOND) - 0.5) / len(x)
    above, below, both = (np.quantile(v, shares, method="inverted_cdf") for v in (x, -x, np.abs(x)))
    found = [Percentile(100 * share).range(stats, IntegerGrid(8, "affine")) for share in shares]
    assert np.array_equal([hi.item() for _, hi in found], above)
    assert np.array_equal([-lo.item() for lo, _ in found], below)
    found = [Percentile(100 * share).range(stats, IntegerGrid(8)) for share in shares]
    assert np.array_equal([hi.item() for _, hi in found], both)


LARGE = 2 * 128 * 2048 + 77
generator = torch.Generator().manual_seed(3)
TENSORS = {
    "normal": torch.randn(LARGE, generator=generator),
    "ties": torch.randint(-9, 9, (LARGE,), generator=generator).float(),
    "one value": torch.full((LARGE,), 2.5),
    "zeros": torch.zeros(LARGE),
    "few above zero": torch.zeros(LARGE).index_fill(0, torch.arange(LARGE - 50, LARGE, 3), 7.0),
    "negative": -torch.rand(LARGE, generator=generator) - 1,
    "all large ones in one piece": torch.arange(LARGE, 0, -1.0),
    "a clipped one": torch.randn(LARGE, generator=generator).clamp(-6, 0.5),
}


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("kept", [0.0, 0.4, 2.5])
def test_the_largest_values_of_a_tensor_are_those_of_topk(name, kept):
    """Of what exceeds the values that are kept already; for tensors of all sizes, pieces of 128 and what is left."""
    for size in LARGE, 128 * 2048 - 1, 5000, 128, 100, 1:
        values = TENSORS[name][-size:]
        for sign in 1, -1:
            found = _largest(values[None], sign, 2048, torch.tensor([kept]))[0]
            found, expected = (v[v > kept].sort(descending=True).values[:2048] for v in (found, values * sign))
            assert torch.equal(found, expected), (size, sign)


@pytest.mark.parametrize("name", TENSORS)
def test_tails_are_the_largest_values_of_each_sign(name):
    x = TENSORS[name]
    sketch = sketched([x[:1000], x[1000:]])
    for tail, values in zip(sketch.tails[:, 0], (-x, x), strict=True):
        assert torch.equal(tail.sort().values, values.topk(2048).values.clamp(min=0).sort().values)


NO_VALUES = [[math.nan, 1.0], [1.0, math.inf], [-math.inf], []]


@pytest.mark.parametrize("bad", NO_VALUES, ids=str)
@pytest.mark.parametrize("channels", [0, 1, 2])
def test_values_that_are_none_are_refused_and_change_nothing(bad, channels):
    def good(constant=0.01):
        return sketched([torch.arange(2.0 * max(channels, 1)).view(2, -1) + 1], channels, constant)

    sketch = good()
    with pytest.raises(ValueError, match="NaN or infinite|no value"):
        sketch.update(torch.tensor(bad).repeat(max(channels, 1), 1).T)
    assert_same(sketch, good(), apart_from=())


def test_a_number_beyond_float32_is_infinite():
    sketch = sketched([[1.0]])
    with pytest.raises(ValueError, match="NaN or infinite"):
        sketch.update(torch.tensor([1e39], dtype=torch.float64))
    assert_same(sketch, sketched([[1.0]]), apart_from=())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int32])
def test_other_dtypes_are_taken_as_float32(dtype):
    x = (torch.arange(-100, 100) / (1 if dtype == torch.int32 else 8)).to(dtype)
    sketch = Sketch()
    sketch.update(x)
    assert_same(sketch, sketched([x.float()]), apart_from=())


def test_neither_the_layout_nor_the_shape_of_a_tensor_matters():
    x = torch.randn(6, 4, 5, 7, generator=torch.Generator().manual_seed(0))
    for same in x.contiguous(memory_format=torch.channels_last), x.flip(3), x.transpose(1, 3), x.flatten():
        assert_same(sketched([same]), sketched([x]), apart_from=())
    channels_last = Sketch(PerChannel(1), (1, 4, 1, 1))
    channels_last.update(x.contiguous(memory_format=torch.channels_last))
    assert_same(channels_last, sketched([x.transpose(0, 1).flatten(1).T], channels=4), apart_from=())


@pytest.mark.parametrize("channels", [0, 3])
def test_before_the_first_and_after_a_reset_there_is_nothing(channels):
    values = [[5.0, -3.0, 0.0]]
    sketch = sketched([values, values], channels)
    sketch.reset()
    empty = dict(sketched([], channels).named_buffers())
    assert all(torch.equal(buffer, empty[name]) for name, buffer in sketch.named_buffers())
    with pytest.raises(ValueError, match="no calibration data"):
        sketch.compute()
    sketch.update(torch.tensor(values))
    assert_same(sketch, sketched([values], channels), apart_from=())


@pytest.mark.parametrize("channels", [0, 10])
def test_memory_does_not_grow(channels):
    sketch = sketched([torch.ones(1, 10)], channels)
    before = len(pickle.dumps(sketch))
    for k in range(0, 50, 5):
        sketch.update(torch.randn(100, 10) * 2.0**k)
    assert len(pickle.dumps(sketch)) == before


def test_sketches_leave_no_trace_in_the_state_dict():
    assert not sketched([[1.0]]).state_dict()
