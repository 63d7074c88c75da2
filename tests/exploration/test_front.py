import math
import random

from hypothesis import given
from hypothesis import strategies as st

from skink.exploration.front import pareto_front

NUMBERS = st.one_of(st.integers(0, 6).map(float), st.sampled_from([math.nan, math.inf, -math.inf]))


def by_brute_force(points):
    """A point stays unless another is no worse in both and better in one, or equal in both and earlier."""
    finite = [index for index, point in enumerate(points) if all(map(math.isfinite, point))]

    def beaten(index):
        cost, loss = points[index]
        return any(
            points[other][0] <= cost and points[other][1] <= loss and (points[other] != points[index] or other < index)
            for other in finite
            if other != index
        )

    return {index for index in finite if not beaten(index)}


@given(st.lists(st.tuples(NUMBERS, NUMBERS), max_size=12))
def test_the_front_is_that_of_brute_force(points):
    front = pareto_front(points)
    assert set(front) == by_brute_force(points)
    assert [points[index] for index in front] == sorted(points[index] for index in front)


def test_many_points():
    generator = random.Random(0)
    points = [(generator.random(), generator.random()) for _ in range(400)]
    assert set(pareto_front(points)) == by_brute_force(points)


def test_nothing_has_no_front():
    assert pareto_front([]) == pareto_front([(math.nan, 1.0)]) == []
