"""The pass `low-rank`: linear layers as products of thin ones."""

from skink.passes.decompose.low_rank.low_rank import LowRank

__all__ = ["LowRank"]
