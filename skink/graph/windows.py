"""`Windows`: text as a model reads it."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Windows:
    """Token windows and where they came from.

    Args:
        tokens: int64[N, T].
        source: the name that reports give the text.
        sha256: of the text, in hexadecimal; empty where the user gave tokens.
        padding: int64[N, T], 1 for text and 0 for padding; None: all is text.
    """

    tokens: Tensor
    source: str = ""
    sha256: str = ""
    padding: Tensor | None = None
