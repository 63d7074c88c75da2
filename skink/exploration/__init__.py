"""The map: design spaces of recipes, explored on one model, and the Pareto fronts that come of it."""

from skink.exploration.explore import explore
from skink.exploration.options import ExploreOptions
from skink.exploration.result import Exploration, PointResult
from skink.exploration.space import Family, Space, load_space, shipped_spaces

__all__ = [
    "Exploration",
    "ExploreOptions",
    "Family",
    "PointResult",
    "Space",
    "explore",
    "load_space",
    "shipped_spaces",
]
