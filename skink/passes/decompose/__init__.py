"""Passes that replace a weight by a product of smaller ones."""

from skink.passes.decompose.low_rank import LowRank

__all__ = ["LowRank"]
