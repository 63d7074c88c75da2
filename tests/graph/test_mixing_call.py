"""A call as the rules see it."""

from typing import Any

import pytest
import torch

from skink.graph.mixing_call import COUNTED, Call, MixingError, Value, leaves
from skink.graph.token_axis import TokenAxis
from tests.graph.symbols import symbolic

MATRIX = torch.zeros(4, 5)


def call(**arguments: Any) -> Call:
    return Call("op", arguments, [MATRIX], symbolic("B", "T")["T"].node.expr)


def test_leaves_of_nested_arguments() -> None:
    assert list(leaves({"a": [1, (2, [3])], "b": "x", "c": None})) == [1, 2, 3, "x", None]


def test_values_are_found_in_lists_too() -> None:
    one, other = Value(MATRIX, None), Value(MATRIX, TokenAxis(0))
    assert call(tensors=[one, other], dim=1).values == [one, other]
    assert call(tensors=[one, other]).only() is other


def test_only_one_argument_may_have_tokens() -> None:
    one = Value(MATRIX, TokenAxis(0))
    with pytest.raises(MixingError, match="every token against every other"):
        call(a=one, b=one).only()
    with pytest.raises(MixingError, match="positions are counted"):
        call(a=Value(MATRIX, None)).only()
    with pytest.raises(MixingError, match="belongs to all of them"):
        call(a=Value(MATRIX, None), b=one).first()
    assert call(a=one, b=Value(MATRIX, None)).first() == (one, TokenAxis(0))


@pytest.mark.parametrize(
    ("arguments", "dims"),
    [({"dim": -1}, {1}), ({"dims": [0, -1]}, {0, 1}), ({"dim": None}, {0, 1}), ({"dim": []}, {0, 1}), ({}, {0, 1})],
)
def test_the_axes_that_a_call_names(arguments: dict[str, Any], dims: set[int]) -> None:
    assert call(**arguments).dims(2) == dims


def test_an_answer_is_held_against_the_shape() -> None:
    sizes = symbolic("B", "T")
    tokens = sizes["T"].node.expr

    class Shaped:
        def __init__(self, *shape: Any) -> None:
            self.shape = shape

    subject = Call("op", {}, [Shaped(sizes["B"], sizes["T"])], tokens)  # type: ignore[list-item]
    subject.check([TokenAxis(1)])
    for axis, reason in ((None, COUNTED), (TokenAxis(0), "more than one axis")):
        with pytest.raises(MixingError, match=reason):
            subject.check([axis])
