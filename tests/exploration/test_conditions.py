import pytest

from skink.errors import SpaceError
from skink.exploration.conditions import read_condition


@pytest.mark.parametrize(
    ("text", "values", "expected"),
    [
        ("rank < 8", {"rank": 4}, True),
        ("rank < 8", {"rank": 8}, False),
        ("len(layers) * 2 <= 4 and not rank == 1", {"layers": [1, 2], "rank": 2}, True),
        ("3 in layers or method in ['plain', 'asvd']", {"layers": [1], "method": "asvd"}, True),
        ("max(layers) - min(layers) % 4 != -1", {"layers": [2, 7]}, True),
        ("0 < rank <= 2", {"rank": 3}, False),
    ],
)
def test_conditions(text, values, expected):
    assert read_condition("here", text, tuple(values))(values) is expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rank <", "not an expression"),
        ("rnk < 3", "did you mean 'rank'"),
        ("__import__('os')", "'__import__' is not known"),
        ("rank.bit_length() > 2", "is not allowed"),
        ("().__class__", "is not allowed"),
        ("[x for x in layers]", "is not allowed"),
        ("(lambda: 1)()", "is not allowed"),
        ("layers[0]", "is not allowed"),
        ("f'{rank}'", "is not allowed"),
        ("open", "is not known"),
    ],
)
def test_what_is_no_condition_is_refused(text, message):
    with pytest.raises(SpaceError, match="SPACE-002") as caught:
        read_condition("here", text, ("rank", "layers"))
    assert message in f"{caught.value.why} {caught.value.fix}"


def test_types_that_do_not_fit_are_an_error_of_the_space():
    holds = read_condition("here", "rank < 3", ("rank",))
    with pytest.raises(SpaceError, match="TypeError"):
        holds({"rank": "full"})
