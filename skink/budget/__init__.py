"""One budget for all: what each choice costs in loss and in the budget's unit, and who gets how much."""

from skink.budget.allocate import Curve, allocate
from skink.budget.ranks import rank_curve
from skink.budget.target import Pricing, Unit, Workload, pricing

__all__ = ["Curve", "Pricing", "Unit", "Workload", "allocate", "pricing", "rank_curve"]
