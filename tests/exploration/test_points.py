from itertools import product

import pytest

from skink.errors import OptionError, SpaceError
from skink.exploration.axes import ModelFacts
from skink.exploration.points import DENSE, expand
from skink.exploration.space import load_space

FACTS = ModelFacts(tuple(range(6)), ("self_attn.q_proj", "mlp.up_proj"))
PLAIN = "low-rank{keep=$keep,method=plain,ignore=$ignore}"
AXES = {"keep": [0.9, 0.5], "ignore": [["*.q"], ["*.k", "*.v"], []]}


def points(facts=FACTS, most=None, seed=0, family_seed=0, **content):
    content = {"recipe": PLAIN, "axes": AXES, "seed": family_seed} | content
    return expand(load_space(content), facts, most=most, seed=seed)


def test_every_combination_once_in_order():
    found = points()
    expected = [{"keep": keep, "ignore": ignore} for keep, ignore in product(*AXES.values())]
    assert [dict(point.values) for point in found] == expected
    for point in found:
        (entry,) = point.recipe.passes
        assert (entry.keep, list(entry.ignore)) == (point.values["keep"], point.values["ignore"])


def test_a_recipe_that_comes_twice_runs_once():
    assert len(points(axes=AXES | {"keep": [0.5, 0.5]})) == 3


def test_conditions_and_samples():
    assert len(points(where="keep < 0.6")) == 3
    assert len(points(where=["keep < 0.6", "len(ignore) == 2"])) == 1
    whole = [point.text for point in points()]
    first, again, other = ([point.text for point in points(sample=3, family_seed=seed)] for seed in (0, 0, 5))
    assert first == again != other
    assert len(first) == 3
    assert [text for text in whole if text in first] == first


def test_most_points_are_a_part_of_all():
    whole, some = points(), points(most=2)
    assert len(some) == 2
    assert [point for point in whole if point in some] == list(some)
    assert points(most=2, seed=1) != some
    assert len(points(most=100)) == len(whole)
    with pytest.raises(OptionError, match="max_points=0"):
        points(most=0)


def test_a_space_too_large_to_write_out_is_sampled():
    facts = ModelFacts(tuple(range(32)), tuple(f"t{index}" for index in range(7)))
    axes = {"layers": {"subsets": "layers"}, "tensors": {"subsets": "tensors"}}
    content = {"recipe": "low-rank{method=plain,targets=$targets}", "patterns": {"targets": "*.$layers.$tensors"}}
    with pytest.raises(SpaceError, match="545,460,846,465 points") as caught:
        points(facts, axes=axes, **content)
    assert caught.value.code == "SPACE-004"
    found = points(facts, axes=axes, sample=5, where="len(layers) < 12", **content)
    assert len(found) == 5
    assert all(len(point.values["layers"]) < 12 for point in found)
    assert found == points(facts, axes=axes, sample=5, where="len(layers) < 12", **content)


def test_no_points_are_an_error():
    with pytest.raises(SpaceError, match="has no points") as caught:
        points(where="keep > 1")
    assert caught.value.code == "SPACE-004"


def test_the_dense_model_is_no_point():
    assert DENSE.text == ""
    with pytest.raises(SpaceError, match="has no points"):
        expand(load_space({"recipe": []}), FACTS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"axes": {"keep": [0.5, 1.5]}, "recipe": "low-rank{keep=$keep}"}, "keep=1.5 is out of range"),
        ({"axes": {"name": ["low-rnk"]}, "recipe": "$name"}, "there is no pass 'low-rnk'"),
        ({"axes": {"keep": [0.5]}, "recipe": [{"low-rank": {"kep": "$keep"}}]}, "no option 'kep'"),
        ({"axes": {"keep": [0.5]}, "recipe": [["$keep"]]}, "an entry of it"),
        ({"axes": {"keep": [0.5]}, "recipe": "low-rank{keep=$keep"}, "closing brace"),
    ],
)
def test_every_recipe_is_read_before_anything_runs(content, message):
    with pytest.raises(SpaceError, match=message) as caught:
        points(**content)
    assert caught.value.code == "SPACE-003"
    assert "family 'space'" in caught.value.where


def test_passes_as_in_a_recipe():
    found = points(axes={"keep": [0.5]}, recipe=[{"low-rank": {"keep": "$keep", "method": "plain"}}])
    assert found[0].recipe.passes[0].keep == 0.5
