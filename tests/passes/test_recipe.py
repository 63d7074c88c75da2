"""Recipes in their three forms, and what is refused."""

import dataclasses
import math
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import skink.passes
from skink.errors import OptionError, RecipeError
from skink.graph.passes import Pass
from skink.passes import PASSES, discover
from skink.passes.canonicalize import Canonicalize
from skink.passes.recipe import Recipe, load_recipe, parse_passes, parse_value, shipped_recipes
from tests.sample_pass import Sample


@pytest.fixture(autouse=True, scope="module")
def sample_is_a_pass() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(skink.passes, "PASSES", (*PASSES, Sample))
        discover.cache_clear()
        yield
    discover.cache_clear()


samples = st.builds(
    Sample,
    keep=st.floats(min_value=1e-300, max_value=1.0),
    rounds=st.integers(),
    method=st.sampled_from(["whitened", "plain", "off"]),
    exact=st.booleans(),
    layers=st.lists(st.text(max_size=6), max_size=3).map(tuple),
    ranks=st.lists(st.integers(), max_size=3).map(tuple),
    limit=st.none() | st.floats(allow_nan=False),
    note=st.text(max_size=8)
    | st.sampled_from(["true", "No", "null", "1e-6", "3", "[a]", "{", '"', "\\", " x ", "a,b"]),
)


@given(st.lists(samples, max_size=3))
def test_the_one_line_form_reads_back_as_the_same(passes: list[Sample]) -> None:
    recipe = Recipe(tuple(passes))
    assert parse_passes(str(recipe)) == recipe.passes


@given(st.lists(samples, max_size=2))
def test_yaml_reads_back_as_the_same(tmp_path_factory: pytest.TempPathFactory, passes: list[Sample]) -> None:
    recipe = Recipe(tuple(passes), description="for a test", compare=("sample{keep=0.3}", "sample"))
    path = tmp_path_factory.mktemp("recipes") / "recipe.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(path) == recipe
    assert load_recipe(str(path)) == recipe


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Any value of an option's type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin is tuple and arguments[-1] is not ...:
        return st.tuples(*map(values, arguments))
    if origin is tuple:
        return st.lists(values(arguments[0]), max_size=3).map(tuple)
    if arguments:
        return st.one_of(*map(values, arguments))
    if hint is type(None):
        return st.none()
    if hint is float:
        return st.floats(0, 1) | st.floats(allow_nan=False)
    if hint is str:
        return st.text(max_size=6) | st.sampled_from(["*.mlp.*", "true", "1e-6", "[a", "}", ",", "=", ""])
    return st.from_type(hint)


@st.composite
def passes_that_ship(draw: st.DrawFn) -> Pass:
    """A pass of Skink's own with any options that it takes."""
    kind = draw(st.sampled_from(PASSES))
    hints = typing.get_type_hints(kind)
    names = draw(st.sets(st.sampled_from([entry.name for entry in dataclasses.fields(kind)] or [""])))
    try:
        return kind(**{name: draw(values(hints[name])) for name in sorted(names) if name})
    except OptionError:
        assume(False)  # out of its range
        raise


@given(st.lists(passes_that_ship(), max_size=3))
@settings(max_examples=100, suppress_health_check=[HealthCheck.filter_too_much])
def test_passes_that_ship_read_back_as_the_same_in_every_form(
    tmp_path_factory: pytest.TempPathFactory, passes: list[Pass]
) -> None:
    recipe = Recipe(tuple(passes))
    whole = tuple(entry.resolved() for entry in passes)
    assert parse_passes(str(recipe)) == recipe.passes
    assert parse_passes(recipe.describe()) == whole
    path = tmp_path_factory.mktemp("recipes") / "recipe.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(path) == Recipe(whole)
    assert tuple(type(entry).from_options(entry.options()) for entry in passes) == recipe.passes


@given(samples)
def test_the_form_with_every_option_reads_back_as_the_same(sample: Sample) -> None:
    assert parse_passes(sample.describe()) == (sample,)


@pytest.mark.parametrize("text", ["inf", "-inf", ".inf", "1e400", "Infinity"])
def test_infinities_are_numbers(text: str) -> None:
    limit = parse_passes(f"sample{{limit={text}}}")[0].options()["limit"]
    assert limit == float(text.strip("."))


def test_what_is_not_a_number_reads_back_too() -> None:
    (sample,) = parse_passes(str(Sample(limit=float("nan"))))
    assert math.isnan(sample.options()["limit"])


def test_all_forms_give_the_same_recipe(tmp_path: Path) -> None:
    wanted = (Sample(keep=0.25, layers=("a", "b")), Canonicalize())
    path = tmp_path / "recipe.yml"
    path.write_text("- sample: {keep: 0.25, layers: [a, b]}\n- canonicalize\n")
    for form in (
        path,
        "sample{keep=0.25, layers=[a,b]}, canonicalize",
        ["sample{keep=0.25,layers=[a,b]}", Canonicalize()],
        list(wanted),
        Recipe(wanted),
    ):
        assert load_recipe(form).passes == wanted


@pytest.mark.parametrize("empty", ["", [], Recipe(()), " , "])
def test_an_empty_recipe_is_a_recipe(empty: Any) -> None:
    assert load_recipe(empty).passes == ()
    assert str(load_recipe(empty)) == ""


def test_an_empty_file_is_an_empty_recipe(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("")
    assert load_recipe(tmp_path / "empty.yaml") == Recipe(())


def test_every_option_is_saved() -> None:
    saved = yaml.safe_load(Recipe((Sample(),), description="text").to_yaml())
    assert saved["description"] == "text"
    assert saved["passes"] == [{"sample": {**Sample().options(), "layers": [], "ranks": [1]}}]


def test_exponents_without_a_point_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("passes:\n  - sample: {keep: 1e-3}\n")
    assert load_recipe(path).passes == load_recipe("sample{keep=1e-3}").passes == (Sample(keep=0.001),)


def test_overrides_change_a_pass_wherever_it_stands() -> None:
    recipe = load_recipe("sample{rounds=1}, canonicalize, sample{rounds=2}", {"sample.keep": 0.25})
    assert recipe.passes == (Sample(keep=0.25, rounds=1), Canonicalize(), Sample(keep=0.25, rounds=2))


@pytest.mark.parametrize(
    ("key", "code", "message", "fix"),
    [
        ("sampel.keep", "OPTION-001", "'sampel.keep' names no pass of this recipe", "did you mean 'sample'?"),
        ("keep", "OPTION-001", "'keep' names no pass of this recipe", "write pass.option=value"),
        ("sample.kep", "OPTION-001", "sample has no option 'kep'", "did you mean 'keep'?"),
        ("sample.rounds", "OPTION-003", "sample.rounds=0.5 is a float", "give a int"),
    ],
)
def test_wrong_overrides_are_refused(key: str, code: str, message: str, fix: str) -> None:
    with pytest.raises(OptionError) as caught:
        load_recipe("sample", {key: 0.5})
    assert caught.value.code == code
    assert message in caught.value.what
    assert fix in caught.value.fix


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        ("smaple{keep=0.5}", "RECIPE-001", "there is no pass 'smaple'"),
        ("sample{keep=0.5", "RECIPE-002", "'sample{keep=0.5' lacks its closing brace"),
        ("sample{keep}", "RECIPE-002", "'keep' in 'sample{keep}' is not key=value"),
        ('sample{note="a}', "RECIPE-002", "is not text in quotes"),
        ('sample{note="a" b}', "RECIPE-002", "is not text in quotes"),
        pytest.param("sample{ranks=" + "[" * 9000 + "]" * 9000 + "}", "RECIPE-002", "is nested too deeply", id="deep"),
    ],
)
def test_wrong_text_is_refused(text: str, code: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(text)
    assert caught.value.code == code
    assert message in caught.value.what


def test_an_unknown_pass_lists_passes_recipes_and_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"\[RECIPE-001\]") as caught:
        load_recipe("sampl")
    assert "did you mean 'sample'? valid: " in caught.value.fix
    assert "canonicalize" in caught.value.fix
    assert all(name in caught.value.fix for name in shipped_recipes())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("passes: [", "is not YAML"),
        ("3", "is a int, not a list of passes"),
        ("recipe: []", "has an unknown key 'recipe'"),
        ("passes: sample", "passes of the recipe"),
        ("passes: 3", "passes of the recipe"),
        ("compare: sample", "compare of the recipe"),
        ("- sample: 0.5", "an entry of the recipe"),
        ("- {sample: {}, canonicalize: {}}", "an entry of the recipe"),
        ("- 3", "an entry of the recipe"),
        ("\x00", "is not YAML"),
        ("- sample: {note: 2024-99-99}", "is not YAML"),
        pytest.param("- sample: {rounds: " + "9" * 5000 + "}", "is not YAML", id="long"),
        pytest.param("[" * 9000, "is not YAML", id="deep"),
    ],
)
def test_wrong_files_are_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    with pytest.raises(RecipeError, match=r"\[RECIPE-002\]") as caught:
        load_recipe(path)
    assert message in caught.value.what


@pytest.mark.parametrize("name", ["absent.yaml", "", "binary.yaml"])
def test_files_that_cannot_be_read_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(RecipeError, match=r"\[RECIPE-002\] the recipe .* cannot be read") as caught:
        load_recipe(tmp_path / name)
    assert "recipes that ship" in caught.value.fix


def test_entries_that_are_no_passes_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"\[RECIPE-002\] an entry of the recipe is a int"):
        load_recipe([3])  # type: ignore[list-item]


def test_yaml_runs_no_code(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"- !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{tmp_path}/x']]")
    with pytest.raises(RecipeError, match="is not YAML"):
        load_recipe(path)
    assert not (tmp_path / "x").exists()


def test_recipes_that_ship_can_be_loaded_by_name() -> None:
    assert {"quickstart", "low-rank-80"} <= set(shipped_recipes())


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("0.5", 0.5),
        ("true", True),
        ("null", None),
        ("plain", "plain"),
        ("[a, 2,[true]]", ["a", 2, [True]]),
        ("*", "*"),
        ("model.layers.*.mlp", "model.layers.*.mlp"),
        ("2024-01-01", "2024-01-01"),
        ("2024-99-99", "2024-99-99"),
        pytest.param("9" * 5000, "9" * 5000, id="long"),
        ('"3"', "3"),
        ("a: b", "a: b"),
    ],
)
def test_values(text: str, value: Any) -> None:
    found = parse_value(text)
    assert found == value
    assert type(found) is type(value)
