"""One call as the rules of token mixing see it: its arguments by name, each tensor with its token axis."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
from torch import Tensor

from skink.graph.token_axis import TokenAxis, fits

COUNTED = "positions are counted from the number of tokens, and a step sees the new tokens only."
PAIRS = "it sets every token against every other."


class MixingError(Exception):
    """Why a call mixes tokens."""


@dataclass(frozen=True)
class Value:
    """A tensor argument and its token axis, None where it is the same for every token."""

    tensor: Tensor
    axis: TokenAxis | None


@dataclass
class Call:
    """One call: `arguments` by name, tensors as `Value`; `results`, the tensors it gives; `tokens`, the symbol T."""

    name: str
    arguments: Mapping[str, Any]
    results: Sequence[Tensor]
    tokens: sympy.Symbol
    values: list[Value] = field(init=False)

    def __post_init__(self) -> None:
        self.values = [entry for entry in leaves(self.arguments) if isinstance(entry, Value)]

    @property
    def rank(self) -> int:
        """Number of axes of the (first) result."""
        return self.results[0].dim()

    def only(self) -> Value:
        """The one argument that has tokens."""
        found = [value for value in self.values if value.axis is not None]
        if len(found) != 1:
            raise MixingError(PAIRS if found else COUNTED)
        return found[0]

    def first(self) -> tuple[Value, TokenAxis]:
        """The first tensor argument, which alone may have tokens, and its token axis."""
        value = self.only()
        if value is not self.values[0] or value.axis is None:
            raise MixingError("its tokens are in an argument that belongs to all of them.")
        return value, value.axis

    def dims(self, rank: int) -> set[int]:
        """The axes that the call names by `dim` or `dims`; all where it names none."""
        given = next((self.arguments[key] for key in ("dim", "dims") if key in self.arguments), None)
        named = [given] if isinstance(given, int) else list(given or ())
        return {dim % rank for dim in named} if named and rank else set(range(rank))

    def check(self, axes: Sequence[TokenAxis | None]) -> None:
        """Raise `MixingError` where the shapes of the results do not bear out a rule's answer."""
        for result, axis in zip(self.results, axes, strict=True):
            if not fits(axis, result.shape, self.tokens):
                raise MixingError(COUNTED if axis is None else "its result has tokens on more than one axis.")


def leaves(argument: Any) -> Iterator[Any]:
    """All that is in nested lists, tuples and mappings."""
    if isinstance(argument, Mapping):
        for entry in argument.values():
            yield from leaves(entry)
    elif isinstance(argument, list | tuple):
        for entry in argument:
            yield from leaves(entry)
    else:
        yield argument
