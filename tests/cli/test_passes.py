from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest

from skink.cli.passes import argument_texts, type_name
from skink.graph.passes import Pass
from tests.cli.conftest import Run


@dataclass(frozen=True)
class Foreign(Pass):
    """A pass of another package.

    Args:
        strength: how much of it,
            in [0, 1].
    """

    strength: float = 0.25
    name: ClassVar[str] = "foreign"
    summary: ClassVar[str] = "does what others do"
    exactness: ClassVar[Literal["exact", "approximate"]] = "approximate"


class _Point:
    class dist:  # noqa: N801
        name = "other-package"

    name = "foreign"
    module = "other.module"

    @staticmethod
    def load() -> type[Pass]:
        return Foreign


class _Broken(_Point):
    name = "broken"

    @staticmethod
    def load() -> type[Pass]:
        raise ImportError("libbroken.so is missing")


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    import skink.passes

    def points(group: str) -> list[type[_Point]]:
        return [_Broken, _Point] if group == "skink.passes" else []

    monkeypatch.setattr("skink.passes.entry_points", points)
    skink.passes.discover.cache_clear()
    yield
    monkeypatch.undo()
    skink.passes.discover.cache_clear()


def test_options_are_listed_with_types_and_defaults(run: Run) -> None:
    listed = {entry["name"]: entry for entry in run("passes", "--json").json["passes"]}
    low_rank = listed["low-rank"]
    options = {option["name"]: option for option in low_rank["options"]}
    assert low_rank["exactness"] == "approximate"
    assert (low_rank["requires"], low_rank["yields"]) == ("canonical", "rewritten")
    assert (options["keep"]["type"], options["keep"]["default"]) == ("float", 0.8)
    assert options["method"]["type"] == "two-sided|whitened|asvd|fisher|plain"
    assert options["targets"]["type"] == "list of str"
    assert "share of the budget's unit" in options["keep"]["help"]


def test_recipes_that_ship_are_listed(run: Run) -> None:
    assert "quickstart" in run("passes", "--json").json["recipes"]
    assert "quickstart" in run("passes").stdout


@pytest.mark.usefixtures("plugin")
def test_passes_of_other_packages_name_their_package(run: Run) -> None:
    listed = {entry["name"]: entry for entry in run("passes", "--json").json["passes"]}
    assert listed["foreign"]["package"] == "other-package"
    assert listed["foreign"]["options"][0]["help"] == "how much of it, in [0, 1]."
    assert listed["low-rank"]["package"] == "skink"
    assert "from the package other-package" in run("passes", "foreign").stdout


@pytest.mark.usefixtures("plugin")
def test_a_pass_that_cannot_be_imported_is_listed_with_the_reason(run: Run) -> None:
    broken = {"name": "broken", "package": "other-package", "reason": "ImportError: libbroken.so is missing"}
    assert run("passes", "--json").json["broken"] == [broken]
    shown = run("passes").stdout
    assert "cannot be imported from the package other-package" in shown
    assert "libbroken.so is missing" in shown
    assert run("passes", "broken").stderr.startswith("[RECIPE-004]")


def test_an_unknown_pass_suggests_the_nearest(run: Run) -> None:
    done = run("passes", "low-rang")
    assert done.code == 1
    assert done.stderr.startswith("[RECIPE-001]")
    assert "did you mean 'low-rank'" in done.stderr


def test_types_read_as_users_write_values() -> None:
    assert type_name(int | None) == "int or none"
    assert type_name(tuple[int, ...]) == "list of int"
    assert type_name(Literal["a", "b"]) == "a|b"


def test_argument_texts_end_with_their_section() -> None:
    text = "What.\n\n    Args:\n        a: one\n            two.\n        b: three.\n\n    Raises:\n        c: no.\n"
    assert argument_texts(text) == {"a": "one two.", "b": "three."}
