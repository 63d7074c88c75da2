"""The `skink::rotary` op."""

from skink.kernels.rotary.op import OP

__all__ = ["OP"]
