"""Binding of ops to kernels."""

from skink.passes.lower.select_kernels import Choice, lower

__all__ = ["Choice", "lower"]
