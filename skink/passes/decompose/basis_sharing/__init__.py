"""The pass `basis-sharing`: layers in a row that share a factor."""

from skink.passes.decompose.basis_sharing.basis_sharing import BasisSharing

__all__ = ["BasisSharing"]
