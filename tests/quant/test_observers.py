"""Observers: nothing depends on how the data were cut into batches, and the histogram is numpy's."""

import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qexp.quant.observers import HistogramObserver, MinMaxObserver, Statistics

BOTH = pytest.mark.parametrize("kind", [MinMaxObserver, HistogramObserver])
# Magnitudes from 2^-20 to 2^20 as from a network, and zeros.
numbers = st.one_of(
    st.just(0.0),
    st.builds(math.ldexp, st.floats(-1, 1, width=16), st.integers(-20, 20)).map(np.float32).map(float),
)
samples = st.lists(numbers, min_size=1, max_size=40)
examples = settings(max_examples=60, deadline=None)


def observed(kind, batches):
    observer = kind()
    for batch in batches:
        observer.update(torch.tensor(batch))
    return observer


def edges(exponent):
    return np.arange(-(2**14), 2**14 + 1) * 2.0 ** (exponent - 14)


def assert_same(one, other):
    for buffer, twin in zip(one.buffers(), other.buffers(), strict=True):
        assert torch.equal(buffer, twin)
    a, b = one.compute(), other.compute()
    assert torch.equal(a.lo, b.lo) and torch.equal(a.hi, b.hi)
    if a.points is not None:
        assert torch.equal(a.points, b.points) and torch.equal(a.weights, b.weights)


@BOTH
@examples
@given(samples, st.data())
def test_batches_and_their_order_change_nothing(kind, values, data):
    shuffled = data.draw(st.permutations(values))
    cuts = sorted(data.draw(st.lists(st.integers(1, len(values)), max_size=4)))
    batches = [shuffled[a:b] for a, b in zip([0, *cuts], [*cuts, len(values)], strict=True) if a < b]
    assert_same(observed(kind, batches), observed(kind, [values]))


@pytest.mark.parametrize("order", [1, -1])
def test_growing_batches_widen_to_the_histogram_of_all(order):
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(500, generator=generator) * 4.0**k).tolist() for k in range(-8, 12)][::order]
    assert_same(observed(HistogramObserver, batches), observed(HistogramObserver, [sum(batches, [])]))


@pytest.mark.parametrize("values", [[-1e-12, 3e38], [-1e-40, 1e20], [1e-45, 1.0], [-1e-45, -1e-36], [1e-36, 5e-37]])
def test_the_order_changes_nothing_at_the_ends_of_float32(values):
    together = observed(HistogramObserver, [values])
    assert_same(observed(HistogramObserver, [[v] for v in values]), together)
    assert_same(observed(HistogramObserver, [[v] for v in reversed(values)]), together)


@examples
@given(samples)
def test_the_counts_are_those_of_numpy(values):
    observer = observed(HistogramObserver, [values[:3], values] if values[3:] else [values])
    seen = np.array(values[:3] + values if values[3:] else values)
    magnitude = np.abs(seen).max()
    if magnitude > 0:
        exponent = math.frexp(magnitude)[1]
        assert int(observer.exponent) == exponent
        assert np.array_equal(observer.counts.numpy(), np.histogram(seen[seen != 0], edges(exponent))[0])
    assert int(observer.zeros) == (seen == 0).sum()
    assert int(observer.counts.sum() + observer.zeros) == int(observer.seen) == len(seen)


@pytest.mark.parametrize("value", [1.0, -1.0, 0.75, 2.0**-30, -(2.0**30)])
def test_a_power_of_two_falls_into_the_bin_that_it_opens(value):
    observer = observed(HistogramObserver, [[value]])
    (index,) = observer.counts.nonzero().flatten().tolist()
    low, high = edges(int(observer.exponent))[index : index + 2]
    assert low <= value < high


@BOTH
@examples
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
def test_the_extrema_are_exact(kind, values):
    stats = observed(kind, [values]).compute()
    assert (stats.lo.item(), stats.hi.item()) == (min(values), max(values))


@examples
@given(samples)
def test_points_are_sorted_and_within_half_a_bin_of_the_values(values):
    observer = observed(HistogramObserver, [values])
    stats, half = observer.compute(), 2.0 ** (int(observer.exponent) - 15)
    points = np.repeat(stats.points[0].numpy(), stats.weights[0].long().numpy())
    assert np.abs(points - np.sort(np.array(values, np.float32))).max() <= half
    assert (stats.weights[(stats.points < stats.lo) | (stats.points > stats.hi)] == 0).all()


def test_zeros_stay_exact_points_of_their_own():
    stats = observed(HistogramObserver, [[0.0, -0.0, 3.0, 0.0, 1e-9]]).compute()
    assert stats.weights[stats.points == 0].tolist() == [3.0]


@BOTH
@pytest.mark.parametrize("bad", [[math.nan, 1.0], [1.0, math.inf], [-math.inf], []])
def test_values_that_are_none_are_refused_and_change_nothing(kind, bad):
    observer = observed(kind, [[1.0, 2.0]])
    with pytest.raises(ValueError, match="NaN or infinite|no value"):
        observer.update(torch.tensor(bad))
    assert_same(observer, observed(kind, [[1.0, 2.0]]))
    with pytest.raises(ValueError, match="NaN or infinite|no value"):
        Statistics.of(torch.tensor(bad), (len(bad),))


@BOTH
def test_before_the_first_and_after_a_reset_there_is_nothing(kind):
    observer = observed(kind, [[5.0, -3.0]])
    observer.reset()
    assert all(torch.equal(a, b) for a, b in zip(observer.buffers(), kind().buffers(), strict=True))
    with pytest.raises(ValueError, match="no calibration data"):
        observer.compute()
    observer.update(torch.tensor([1.0]))
    assert observer.compute().hi.item() == 1.0


@BOTH
def test_memory_does_not_grow(kind):
    observer = observed(kind, [[1.0]])
    before = len(pickle.dumps(observer))
    for k in range(50):
        observer.update(torch.randn(1000) * 2.0**k)
    assert len(pickle.dumps(observer)) == before


@BOTH
def test_observers_leave_no_trace_in_the_state_dict(kind):
    assert not observed(kind, [[1.0]]).state_dict()


def test_statistics_of_a_tensor_are_its_own_elements():
    x = torch.tensor([[1.0, -2.0, 0.5], [4.0, 5.0, 6.0]], requires_grad=True)
    stats = Statistics.of(x, (1, 3))
    assert torch.equal(stats.points, x.detach()) and not stats.points.requires_grad
    assert stats.lo.tolist() == [-2, 4] and stats.hi.tolist() == [1, 6]
    assert stats.weights.tolist() == [[1.0] * 3] * 2
