"""The `skink::pivoted_linear` op."""

from skink.kernels.pivoted_linear.op import OP

__all__ = ["OP"]
