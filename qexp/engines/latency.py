"""Latency in one process, so that both sides of a ratio see the same machine at the same time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

BLOCK_S = 5e-4  # a timed block is at least this long, so that the clock's own cost does not show


@dataclass(frozen=True)
class Timings:
    """Milliseconds a call, one row a round and one column a side; a round times each side once, in random order."""

    names: tuple[str, ...]
    rounds: np.ndarray

    def median_ms(self, name: str) -> float:
        """Median over all rounds."""
        return float(np.median(self.rounds[:, self.names.index(name)]))

    def fastest_ms(self, name: str) -> float:
        """The least of all rounds, which the machine's other work disturbs least."""
        return float(np.min(self.rounds[:, self.names.index(name)]))

    def ratio(self, slow: str, fast: str, seed: int = 0, resamples: int = 1000) -> tuple[float, float, float]:
        """median(slow) / median(fast) and its 95 % bootstrap interval; whole rounds are resampled."""
        a, b = (self.rounds[:, self.names.index(name)] for name in (slow, fast))
        index = np.random.default_rng(seed).integers(len(a), size=(resamples, len(a)))
        ratios = np.median(a[index], axis=1) / np.median(b[index], axis=1)
        lo, hi = np.quantile(ratios, [0.025, 0.975])
        return float(np.median(a) / np.median(b)), float(lo), float(hi)


def interleave(calls: dict[str, Callable[[], object]], seconds: float, seed: int = 0, least: int = 20) -> Timings:
    """Time every call in random order, round after round, for about `seconds` in all and at least `least` rounds."""
    generator = np.random.default_rng(seed)
    repeats = [_repeats(call) for call in calls.values()]
    rows: list[list[float]] = []
    end = time.perf_counter() + seconds
    while len(rows) < least or time.perf_counter() < end:
        row = [0.0] * len(calls)
        for side in generator.permutation(len(calls)):
            call = list(calls.values())[side]
            call()  # its data were pushed out of the caches by the side before it
            row[side] = _time_ms(call, repeats[side])
        rows.append(row)
    return Timings(tuple(calls), np.array(rows))


def _repeats(call: Callable[[], object]) -> int:
    """Calls in one timed block; finding it out is the warm-up."""
    for _ in range(5):
        call()
    fastest = min(_time_ms(call, 1) for _ in range(5))
    return max(1, int(np.ceil(BLOCK_S * 1e3 / fastest)))


def _time_ms(call: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter_ns()
    for _ in range(repeats):
        call()
    return (time.perf_counter_ns() - start) / repeats / 1e6
