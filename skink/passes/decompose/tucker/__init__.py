"""The pass `tucker`: weights and convolutions as small cores between thin factors."""

from skink.passes.decompose.tucker.tucker import Tucker

__all__ = ["Tucker"]
