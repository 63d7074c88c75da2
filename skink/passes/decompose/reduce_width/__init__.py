"""The pass `reduce-width`: pairs of matrices made narrower."""

from skink.passes.decompose.reduce_width.reduce_width import ReduceWidth

__all__ = ["ReduceWidth"]
