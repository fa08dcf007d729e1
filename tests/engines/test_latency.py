"""How latency is measured, on a clock that the test turns itself, and the statistics against scipy's."""

import numpy as np
import pytest
import scipy.stats

from qexp.engines import latency
from qexp.engines.latency import Timings, interleave


class Clock:
    """Time passes only inside the calls."""

    def __init__(self) -> None:
        self.ns, self.order = 0, []

    def call(self, name: str, ms: float):
        def run() -> None:
            self.ns += int(ms * 1e6)
            self.order.append(name)

        return run

    def perf_counter_ns(self) -> int:
        return self.ns

    def perf_counter(self) -> float:
        return self.ns / 1e9


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(latency, "time", clock)
    return clock


def test_every_side_is_timed_in_every_round_in_changing_order(clock):
    timings = interleave({name: clock.call(name, ms) for name, ms in (("a", 3.0), ("b", 1.5), ("c", 0.7))}, 1.0)
    assert timings.names == ("a", "b", "c")
    assert timings.rounds.shape == (len(timings.rounds), 3)
    np.testing.assert_allclose(timings.rounds, np.tile([3.0, 1.5, 0.7], (len(timings.rounds), 1)))
    assert timings.ratio("a", "b") == (2.0, 2.0, 2.0)
    assert (timings.median_ms("c"), timings.fastest_ms("c")) == (0.7, 0.7)
    rounds = "".join(clock.order[30:])  # after the warm-up; each call once untimed, once timed
    orders = {rounds[i : i + 6] for i in range(0, len(rounds) - 5, 6)}
    assert orders == {"".join(2 * side for side in order) for order in ("abc", "acb", "bac", "bca", "cab", "cba")}


def test_the_time_is_kept_and_there_are_enough_rounds(clock):
    interleave({"a": clock.call("a", 1.0)}, 2.0)
    assert 2.0 <= clock.perf_counter() <= 2.1
    slow = interleave({"a": clock.call("a", 1000.0)}, 0.1)
    assert len(slow.rounds) == 20


def test_a_short_call_is_repeated_until_the_clock_can_tell(clock):
    timings = interleave({"a": clock.call("a", 0.01)}, 0.5)
    np.testing.assert_allclose(timings.rounds, 0.01)
    assert len(clock.order) > 50 * len(timings.rounds)


def test_a_side_against_itself_is_one_and_the_interval_is_scipys(monkeypatch):
    generator = np.random.default_rng(0)
    machine = generator.gamma(9, 0.1, (400, 1))  # what disturbs a round disturbs both sides
    rounds = machine * (np.array([3.0, 3.0, 1.5]) + generator.normal(0, 0.05, (400, 3)))
    timings = Timings(("a", "again", "b"), np.c_[rounds, rounds[:, 0]][:, [0, 3, 2]])
    assert timings.ratio("a", "again") == (1.0, 1.0, 1.0)
    value, lo, hi = timings.ratio("a", "b")
    assert lo < value < hi

    def ratio(a, b, axis):
        return np.median(a, axis=axis) / np.median(b, axis=axis)

    sides = rounds[:, 0], rounds[:, 2]
    other = scipy.stats.bootstrap(
        sides, ratio, paired=True, method="percentile", n_resamples=4000, rng=np.random.default_rng(1)
    ).confidence_interval
    assert abs(lo - other.low) < 0.15 * (other.high - other.low)
    assert abs(hi - other.high) < 0.15 * (other.high - other.low)
    # As if rounds were not paired, the machine's own noise would not cancel.
    unpaired = Timings(("a", "b"), np.c_[sides[0], generator.permutation(sides[1])]).ratio("a", "b")
    assert hi - lo < 0.8 * (unpaired[2] - unpaired[1])
