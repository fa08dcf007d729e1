"""The front of what one cannot improve without paying for it."""

from __future__ import annotations

import math
from collections.abc import Sequence


def pareto_front(points: Sequence[tuple[float | None, float | None]]) -> list[int]:
    """Indices of the points (cost, benefit) that no other beats, by rising cost.

    One point beats another that costs no less and brings no more, unless they are equal: of equal points all stay.
    Points with a None or NaN are on no front.

    >>> pareto_front([(1.0, 0.9), (2.0, 0.8), (2.0, 0.95), (None, 1.0)])
    [0, 2]
    """
    known = [i for i, point in enumerate(points) if not any(x is None or math.isnan(x) for x in point)]
    front: list[int] = []
    for i in sorted(known, key=lambda i: (points[i][0], -points[i][1])):
        if not front or points[i][1] > points[front[-1]][1] or tuple(points[i]) == tuple(points[front[-1]]):
            front.append(i)
    return front
