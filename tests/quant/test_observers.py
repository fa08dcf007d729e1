"""Observers: what they saw survives a file to the bit, and a sample of rows depends on the rows alone."""

import io
import math
import pickle

import pytest
import torch

from qexp.quant.granularity import PerChannel, PerTensor
from qexp.quant.observers import Observer, RowSample, _hash
from qexp.quant.stats import Statistics

pytestmark = pytest.mark.usefixtures("one_thread")


KINDS = {
    "per tensor": lambda: Observer(),
    "another constant": lambda: Observer(constant=0.3),
    "channels": lambda: Observer(PerChannel(1), (1, 5)),
    "rows": lambda: Observer(row_length=5),
}
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


def values(seed=0, rows=3000):
    """Rows of five values: more than tails and samples hold, with zeros, outliers and tiny values."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 5, generator=generator) * torch.randn(rows, 1, generator=generator).exp()
    x[::7], x[3], x[4:6] = 0, x[3] * 1000, x[4:6] * 1e-30
    return x


def observed(kind, batches):
    observer = KINDS[kind]()
    for batch in batches:
        observer.update(torch.as_tensor(batch))
    return observer


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_same(one, other, apart_from=()):
    twins = dict(other.named_buffers())
    assert dict(one.named_buffers()).keys() == twins.keys()
    for name, buffer in one.named_buffers():
        assert name in apart_from or torch.equal(buffer, twins[name]), name
    a, b = one.compute(), other.compute()
    for name in "lo", "hi", "points", "weights", *([] if apart_from else ["average"]):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert (a.rows is None) == (b.rows is None) and (a.rows is None or torch.equal(a.rows, b.rows))


@EVERY_KIND
def test_a_state_comes_back_from_a_file_to_the_bit(kind):
    observer = observed(kind, values().split(1000))
    state = through_a_file(observer.state())
    twin = KINDS[kind]()
    twin.load(state)
    assert_same(twin, observer)
    for another in twin, observer:  # it also goes on as the first one does
        another.update(values(seed=1))
    assert_same(twin, observer)
    assert_same(observer, observed(kind, [*values().split(1000), values(seed=1)]))


@EVERY_KIND
def test_a_state_replaces_what_was_seen_before(kind):
    twin = observed(kind, [values(seed=1) * 100])
    twin.load(observed(kind, [values()]).state())
    assert_same(twin, observed(kind, [values()]))


def test_a_state_is_a_copy_and_smaller_than_the_histogram():
    observer = observed("per tensor", [values()])
    state = observer.state()
    before = {name: tensor.clone() for name, tensor in state.items()}
    observer.update(values(seed=1))
    assert all(torch.equal(state[name], before[name]) for name in state)
    assert sum(t.numel() for t in state.values()) < observer.sketch.counts.numel() / 2


@pytest.mark.parametrize(
    ("kind", "other", "width"),
    [
        ("per tensor", KINDS["channels"], 5),
        ("channels", KINDS["per tensor"], 5),
        ("channels", lambda: Observer(PerChannel(1), (1, 4)), 4),
        ("per tensor", KINDS["rows"], 5),
        ("rows", KINDS["per tensor"], 5),
        ("rows", lambda: Observer(row_length=4), 4),
    ],
)
def test_a_state_of_another_kind_is_refused_and_changes_nothing(kind, other, width):
    another = other()
    another.update(torch.ones(2, width))
    before = {name: tensor.clone() for name, tensor in another.named_buffers()}
    with pytest.raises(ValueError, match="observed in another way"):
        another.load(observed(kind, [values()]).state())
    assert all(torch.equal(tensor, before[name]) for name, tensor in another.named_buffers())


def test_the_key_tells_whatever_makes_a_pass_see_something_else():
    different = [
        Observer(), Observer(constant=0.3), Observer(constant=0.3 + 1e-9), Observer(constant=0.01 + 1e-9),
        Observer(row_length=5), Observer(row_length=4), Observer(PerChannel(1), (1, 5)),
        Observer(PerChannel(2), (1, 5, 5)),
    ]  # fmt: skip
    assert len({observer.key for observer in different}) == len(different)
    assert Observer().key == Observer(PerTensor(), (3, 4), 0.01, 0).key
    assert Observer(constant=1).key == Observer(constant=1.0).key


@EVERY_KIND
def test_shards_merge_into_the_observer_of_the_whole(kind):
    whole = observed(kind, values().split(1000))
    first, second = observed(kind, values()[:1000].split(1000)), observed(kind, values()[1000:].split(1000))
    first.merge(second)
    assert_same(first, whole, apart_from=("sketch.faded",))
    assert torch.allclose(first.compute().average, whole.compute().average, rtol=1e-6)


@EVERY_KIND
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_none_are_refused_and_change_nothing(kind, bad):
    observer, x = observed(kind, [values()]), values(seed=1)
    x[2, 3] = bad
    for none, why in (x, "NaN or infinite"), (x[:0], "no value"):
        with pytest.raises(ValueError, match=why):
            observer.update(none)
    assert_same(observer, observed(kind, [values()]))


@EVERY_KIND
def test_memory_does_not_grow_and_nothing_is_in_the_state_dict(kind):
    observer = observed(kind, [values()])
    before = len(pickle.dumps(observer))
    for k in range(8):
        observer.update(values(seed=k) * 4.0**k)
    assert len(pickle.dumps(observer)) == before
    assert not observer.state_dict()


@EVERY_KIND
def test_before_the_first_update_there_is_nothing(kind):
    with pytest.raises(ValueError, match="no calibration data"):
        KINDS[kind]().compute()


def sampled(batches, features=5, size=100):
    sample = RowSample(features, size)
    for batch in batches:
        sample.update(batch)
    return sample


def rows_of(x):
    """The rows as tuples in some fixed order, to compare as multisets."""
    return sorted(map(tuple, x.tolist()))


@pytest.mark.parametrize("seed", range(5))
def test_a_sample_depends_on_the_rows_alone(seed):
    x = values(seed)
    x = torch.cat([x, x[:500]])  # some rows are there twice
    shuffled = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))]
    expected = rows_of(sampled([x]).rows())
    assert rows_of(sampled(shuffled.split(333)).rows()) == expected
    merged = sampled(shuffled[:40].split(7))
    for shard in shuffled[40:].split([30, 900, 60, len(x) - 1030]):  # not all of them fill a sample
        merged.merge(sampled(shard.split(100)))
    assert rows_of(merged.rows()) == expected


def test_a_sample_is_bounded_and_holds_rows_that_were_seen():
    x = values()
    sample = sampled([x])
    assert sample.rows().shape == (100, 5)
    assert set(rows_of(sample.rows())) <= set(rows_of(x))
    assert sum(buffer.numel() for buffer in sample.buffers()) == 100 * 6
    few = x[1:7]
    assert rows_of(sampled(few.split(2)).rows()) == rows_of(few)
    part = sampled([few[:2]])
    part.merge(sampled([few[2:]]))
    assert rows_of(part.rows()) == rows_of(few)
    sample.reset()
    assert sample.rows().shape == (0, 5)


def test_a_sample_is_spread_over_all_rows():
    """Of values that a hash may find hard, whole numbers, no part is preferred: within 4 standard errors."""
    normal = torch.randn(40_000, 3, generator=torch.Generator().manual_seed(0))
    for x in normal, torch.cartesian_prod(*[torch.arange(34.0)] * 3):
        kept = sampled([x], features=3, size=1024).rows()
        error = x.std(0) / 1024**0.5
        assert ((kept.mean(0) - x.mean(0)).abs() < 4 * error).all()
        assert ((kept.std(0) - x.std(0)).abs() < 4 * error).all()


def test_rows_of_any_leading_shape_are_taken_apart():
    x = values()
    assert torch.equal(sampled([x.view(30, 100, 5)]).rows(), sampled([x]).rows())


def test_different_rows_have_different_hashes_and_the_two_zeros_have_one():
    x = torch.cartesian_prod(*[torch.arange(-20.0, 21.0)] * 3)  # also (a, b, c) and (b, a, c)
    assert len(_hash(x).unique()) == len(x)
    assert int(_hash(x).min()) >= 0
    zeros = torch.tensor([[0.0, 1.0], [-0.0, 1.0]])
    assert torch.equal(*sampled([zeros], features=2).keys[:2])


def test_statistics_of_a_tensor_are_its_own_elements():
    x = torch.tensor([[1.0, -2.0, 0.5], [4.0, 5.0, 6.0]], requires_grad=True)
    stats = Statistics.of(x, (1, 3))
    assert torch.equal(stats.points, x.detach()) and not stats.points.requires_grad
    assert stats.lo.tolist() == [-2, 4] and stats.hi.tolist() == [1, 6]
    assert stats.weights.tolist() == [[1.0] * 3] * 2
    assert torch.equal(stats.average, torch.stack([stats.lo, stats.hi]))


@pytest.mark.parametrize("bad", [[math.nan, 1.0], [1.0, math.inf], [-math.inf], [1e39], []])
def test_statistics_of_no_values_are_refused(bad):
    with pytest.raises(ValueError, match="NaN or infinite|no value"):
        Statistics.of(torch.tensor(bad, dtype=torch.float64), (len(bad),))


def test_what_fills_up_a_block_has_no_weight():
    stats = Statistics.of(torch.tensor([[3.0, 5.0, 4.0]]), (1, 2))
    assert stats.points[stats.weights > 0].tolist() == [3, 5, 4]
    assert stats.weights.tolist() == [[1, 1], [1, 0]]
