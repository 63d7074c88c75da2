"""skink/passes/__init__.py: the list of passes, and passes of other packages."""

import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint, EntryPoints
from types import ModuleType

import pytest

import skink.passes
from skink.errors import RecipeError
from skink.passes import PASSES, all_passes, discover, find_pass
from skink.passes.canonicalize import Canonicalize
from skink.passes.recipe import load_recipe
from tests.sample_pass import Sample


@pytest.fixture
def other_package(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    module = ModuleType("other_package")
    module.Sample = Sample  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "other_package", module)
    points = EntryPoints(
        [
            EntryPoint("broken", "no_such_package:Pass", "skink.passes"),
            EntryPoint("no-pass", "sys:path", "skink.passes"),
            EntryPoint("sample", "other_package:Sample", "skink.passes"),
        ]
    )
    monkeypatch.setattr(skink.passes, "entry_points", lambda group: points.select(group=group))
    discover.cache_clear()
    yield
    discover.cache_clear()


def test_names_are_unique_and_kebab_case_and_every_pass_says_what_it_does() -> None:
    names = [entry.name for entry in PASSES]
    assert len(set(names)) == len(names)
    for entry in PASSES:
        assert entry.name == entry.name.lower().replace("_", "-")
        assert entry.summary[:1].islower()
        assert not entry.summary.endswith(".")


@pytest.mark.usefixtures("other_package")
def test_passes_of_other_packages_come_after_ours() -> None:
    assert list(all_passes().values()) == [*PASSES, Sample]
    assert find_pass("sample") is Sample


@pytest.mark.usefixtures("other_package")
def test_a_package_that_cannot_be_imported_stops_only_what_names_it() -> None:
    assert load_recipe("sample").passes == (Sample(),)
    with pytest.raises(RecipeError, match=r"\[RECIPE-004\] the pass 'broken'.*cannot be imported") as caught:
        load_recipe("broken")
    assert "no_such_package" in caught.value.why
    with pytest.raises(RecipeError, match=r"\[RECIPE-004\]") as caught:
        find_pass("no-pass")
    assert "names no subclass of Pass" in caught.value.why


def test_passes_are_found_by_name() -> None:
    assert find_pass("canonicalize") is Canonicalize
    with pytest.raises(RecipeError, match=r"\[RECIPE-001\] there is no pass 'canonicalise'") as caught:
        find_pass("canonicalise")
    assert "did you mean 'canonicalize'? valid: canonicalize" in caught.value.fix
