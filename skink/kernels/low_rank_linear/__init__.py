"""The `skink::low_rank_linear` op."""

from skink.kernels.low_rank_linear.op import OP

__all__ = ["OP"]
