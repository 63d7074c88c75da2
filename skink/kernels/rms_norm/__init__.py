"""The `skink::rms_norm` op."""

from skink.kernels.rms_norm.op import OP

__all__ = ["OP"]
