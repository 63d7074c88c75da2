"""One budget for all: what each choice costs in loss and in the budget's unit, and who gets how much."""

from skink.budget.allocate import Curve, allocate
from skink.budget.ranks import rank_curve
from skink.budget.target import UNITS, Pricing, Unit, Workload, pricing

__all__ = ["UNITS", "Curve", "Pricing", "Unit", "Workload", "allocate", "pricing", "rank_curve"]
