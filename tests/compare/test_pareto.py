"""The front against its definition, by comparing all pairs."""

import math

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qexp.compare import pareto_front

# A busy machine is no fault of these.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
coordinates = st.one_of(st.integers(0, 5).map(float), st.floats(-10, 10), st.none(), st.just(math.nan))


def beats(one, other):
    return one != other and one[0] <= other[0] and one[1] >= other[1]


@patient
@given(st.lists(st.tuples(coordinates, coordinates), max_size=30))
def test_the_front_is_what_nothing_beats(points):
    known = [i for i, p in enumerate(points) if None not in p and not any(map(math.isnan, p))]
    expected = [i for i in known if not any(beats(points[j], points[i]) for j in known)]
    found = pareto_front(points)
    assert sorted(found) == expected
    assert [points[i][0] for i in found] == sorted(points[i][0] for i in found)
