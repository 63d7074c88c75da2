"""Recovery: a changed model learns from text, and from the model that it was."""

from skink.passes.recover.recover import Recover

__all__ = ["Recover"]
