"""Exact clean-ups and raising."""

from skink.passes.canonicalize.canonicalize import Canonicalize

__all__ = ["Canonicalize"]
