"""The `skink::experts` op."""

from skink.kernels.experts.op import OP

__all__ = ["OP"]
