"""Links between pages resolve, and files that pages name exist."""

import re

import pytest

from tests.docs.pages import ROOT, Page, page, pages

_EXTERNAL = ("http://", "https://", "mailto:")
# Folders whose files a page means when it names a path that begins with them.
_NAMED = re.compile(
    r"`((?:skink|docs|tests|benchmarks|\.ci)/[\w./\-]*|constraints\.txt|pyproject\.toml|Makefile|CMakeLists\.txt)`"
)
# Examples of files that a reader would make.
_MADE_UP = {"tests/kernels/<op>/", "skink/a/b.py", "tests/a/test_b.py"}


@pytest.mark.parametrize("entry", pages(), ids=lambda entry: entry.path)
def test_links_resolve(entry: Page) -> None:
    broken = [link for link in entry.links() if not link.startswith(_EXTERNAL) and not _resolves(entry, link)]
    assert not broken


def _resolves(entry: Page, link: str) -> bool:
    target, _, fragment = link.partition("#")
    file = (entry.file.parent / target).resolve() if target else entry.file
    if not file.exists():
        return False
    if not fragment:
        return True
    return fragment in Page(file.relative_to(ROOT).as_posix()).anchors()


@pytest.mark.parametrize("entry", pages(), ids=lambda entry: entry.path)
def test_files_that_are_named_exist(entry: Page) -> None:
    named = set(_NAMED.findall(entry.prose)) - _MADE_UP
    missing = sorted(name for name in named if "<" not in name and not (ROOT / name).exists())
    assert not missing


def test_a_broken_link_is_noticed() -> None:
    readme = page("README.md")
    assert _resolves(readme, "docs/errors.md#capture-001")
    assert not _resolves(readme, "docs/errors.md#capture-999")
    assert not _resolves(readme, "docs/nowhere.md")


def test_every_page_of_docs_is_linked_from_the_readme() -> None:
    linked = {link.partition("#")[0] for link in page("README.md").links()}
    assert {entry.path for entry in pages() if entry.path.startswith("docs/")} <= linked


def test_no_page_names_a_path_of_one_machine() -> None:
    found = [entry.path for entry in pages() if re.search(r"(?<![\w.*])/(?:home|root|tmp|usr|opt)/", entry.text)]
    assert not found
