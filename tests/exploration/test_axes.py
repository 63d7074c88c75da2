from itertools import combinations, pairwise

import pytest

from skink.errors import SpaceError
from skink.exploration.axes import ModelFacts, Subsets, read_axis
from tests.programs import canonical

FACTS = ModelFacts((0, 1, 2, 3), ("q", "k", "v"))


def every(n, size, arrangement):
    """All subsets by brute force."""
    gaps = {"any": lambda gap: True, "spaced": lambda gap: gap > 1, "neighbours": lambda gap: gap == 1}[arrangement]
    return [c for c in combinations(range(n), size) if all(gaps(b - a) for a, b in pairwise(c))]


@pytest.mark.parametrize("arrangement", ["any", "spaced", "neighbours"])
@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_subsets_are_those_of_brute_force(n, arrangement):
    sizes = tuple(range(1, n + 1))
    found = Subsets(tuple(range(n)), sizes, arrangement)
    expected = [list(subset) for size in sizes for subset in every(n, size, arrangement)]
    assert sorted(found[index] for index in range(len(found))) == sorted(expected)
    assert len(found) == len(expected)
    assert found[: len(found)] == list(found)


def test_the_study_s_space_is_numbered_without_being_written_out():
    layers, tensors = Subsets(tuple(range(32)), tuple(range(1, 33))), Subsets(tuple(range(7)), tuple(range(1, 8)))
    assert len(layers) * len(tensors) == (2**32 - 1) * (2**7 - 1)
    assert layers[2**32 - 2] == list(range(32))


def test_a_place_beyond_the_end_is_refused():
    with pytest.raises(IndexError):
        Subsets((1, 2), (1,))[2]


def test_facts_are_those_of_the_model():
    facts = ModelFacts.of(canonical("llama"))
    assert facts.layers == (0, 1)
    assert set(facts.tensors) == {
        *(f"self_attn.{name}_proj" for name in "qkvo"),
        *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
    }


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([1, "a"], [1, "a"]),
        ({"subsets": "layers", "sizes": [1]}, [[0], [1], [2], [3]]),
        ({"subsets": "layers", "sizes": 2, "arrangement": "neighbours"}, [[0, 1], [1, 2], [2, 3]]),
        ({"subsets": "tensors", "sizes": [3]}, [["q", "k", "v"]]),
        ({"subsets": ["a", "b"]}, [["a"], ["b"], ["a", "b"]]),
    ],
)
def test_axes(value, expected):
    assert list(read_axis("here", "x", value, FACTS)) == expected


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "is \\[\\]"),
        (3, "is 3"),
        ({"subsets": "heads"}, "subsets of 'heads'"),
        ({"subsets": "layers", "size": 1}, "unknown key 'size'"),
        ({"subsets": "layers", "sizes": [5]}, "no subset of those sizes among 4"),
        ({"subsets": "layers", "sizes": [0]}, "the sizes \\[0\\]"),
        ({"subsets": "layers", "sizes": [3], "arrangement": "spaced"}, "no subset"),
        ({"subsets": "layers", "arrangement": "far"}, "the arrangement 'far'"),
    ],
)
def test_what_is_no_axis_is_refused(value, message):
    with pytest.raises(SpaceError, match=message) as caught:
        read_axis("here", "x", value, FACTS)
    assert caught.value.code == "SPACE-002"
    assert caught.value.where == "here"
