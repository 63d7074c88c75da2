"""The Pareto front: the points that no other beats in one thing without losing in the other."""

import math
from collections.abc import Sequence


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Places of the points on the front, in order of cost.

    A point is on it where every other point has a larger cost or a larger loss, or is equal in both and stands later.

    Args:
        points: (cost, loss), of both of which less is better; points with a NaN or an infinity are left out.
    """
    order = sorted(
        (index for index, point in enumerate(points) if all(math.isfinite(value) for value in point)),
        key=lambda index: (*points[index], index),
    )
    front: list[int] = []
    least = math.inf
    for index in order:
        if points[index][1] < least:
            front.append(index)
            least = points[index][1]
    return front
