"""What docs/recipes.md says of recipes is so."""

import re

import yaml

from skink.passes.decompose import LowRank
from skink.passes.recipe import load_recipe, shipped_recipes
from tests.docs.pages import page

PAGE = page("docs/recipes.md")


def test_yaml_one_line_and_python_mean_the_same(tmp_path) -> None:
    (tmp_path / "recipe.yaml").write_text(next(block.text for block in PAGE.blocks() if block.language == "yaml"))
    from_yaml = load_recipe(tmp_path / "recipe.yaml")
    line = next(block.text for block in PAGE.blocks() if block.text.startswith("low-rank{"))
    namespace: dict[str, object] = {}
    exec(next(block.text for block in PAGE.blocks() if block.language == "python"), namespace)
    assert len(from_yaml.passes) == 2
    assert from_yaml.passes == load_recipe(line).passes == load_recipe(namespace["recipe"]).passes
    assert load_recipe(from_yaml.compare[0]).passes == (LowRank(keep=0.7, method="plain"),)


def test_keys_are_those_that_there_are() -> None:
    table = PAGE.sections()["The YAML form"]
    documented = re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE)
    complete = load_recipe("quickstart").to_yaml()
    assert set(documented) == set(yaml.safe_load(complete))


def test_the_recipes_that_ship_are_listed_as_they_are() -> None:
    rows = re.findall(
        r"^\| `([\w\-]+)` \| `(.+?)` \| (?:`(.+?)`)?", PAGE.sections()["The recipes that ship"], re.MULTILINE
    )
    assert {name for name, *_ in rows} == set(shipped_recipes())
    for name, line, compared in rows:
        recipe = load_recipe(name)
        assert recipe.passes == load_recipe(line).passes
        assert recipe.compare == ((compared,) if compared else ())
