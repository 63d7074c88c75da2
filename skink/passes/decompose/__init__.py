"""Passes that replace a weight by a product of smaller ones."""

from skink.passes.decompose.basis_sharing import BasisSharing
from skink.passes.decompose.low_rank import LowRank
from skink.passes.decompose.reduce_width import ReduceWidth
from skink.passes.decompose.tucker import Tucker

__all__ = ["BasisSharing", "LowRank", "ReduceWidth", "Tucker"]
