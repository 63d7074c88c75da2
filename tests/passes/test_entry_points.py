"""skink/passes/__init__.py: the list of passes, and passes of other packages."""

import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint, EntryPoints
from types import ModuleType

import pytest

import skink.passes
from skink.errors import RecipeError
from skink.passes import PASSES, all_passes, find_pass
from skink.passes.canonicalize import Canonicalize
from tests.sample_pass import Sample


@pytest.fixture
def other_package(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    module = ModuleType("other_package")
    module.Sample = Sample  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "other_package", module)
    points = EntryPoints([EntryPoint("sample", "other_package:Sample", "skink.passes")])
    monkeypatch.setattr(skink.passes, "entry_points", lambda group: points.select(group=group))
    all_passes.cache_clear()
    yield
    all_passes.cache_clear()


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


def test_passes_are_found_by_name() -> None:
    assert find_pass("canonicalize") is Canonicalize
    with pytest.raises(RecipeError, match=r"\[RECIPE-001\] there is no pass 'canonicalise'") as caught:
        find_pass("canonicalise")
    assert "did you mean 'canonicalize'? valid: canonicalize" in caught.value.fix
