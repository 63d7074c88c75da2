"""The `skink::attention` op."""

from skink.kernels.attention.op import OP

__all__ = ["OP"]
