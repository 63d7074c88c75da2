"""Tests mirror the package: skink/a/b.py has tests/a/test_b.py, or a reason why not."""

from pathlib import Path

import pytest

import skink

PACKAGE = Path(skink.__file__).parent
TESTS = Path(__file__).parent

# Modules without a mirror → where they are tested instead, and why.
ELSEWHERE = {
    "__main__.py": "one call of the command line, run by tests/cli",
    "kernels/__init__.py": "the list of ops and a look-up in it: tests/kernels/test_opdef.py",
    "export/huggingface/__init__.py": "names of its modules, loaded when used: every test in tests/export/huggingface",
    "export/onnx/__init__.py": "names of its modules, loaded when used: every test in tests/export/onnx",
}


def modules() -> list[str]:
    paths = [path for path in sorted(PACKAGE.rglob("*.py")) if "assets" not in path.parts]
    return [str(path.relative_to(PACKAGE)) for path in paths if has_code(path)]


def has_code(path: Path) -> bool:
    """Whether there is more in a module than imports and a list of exports."""
    if path.name != "__init__.py":
        return True
    text = path.read_text()
    return "\ndef " in text or "\nclass " in text


def mirrors(module: str) -> list[Path]:
    """Where the tests of a module may be: its mirror, or for a package file tests named after what it does."""
    folder, stem = TESTS / Path(module).parent, Path(module).stem
    if stem == "__init__":
        # skink/__init__.py: test_layering.py; skink/passes/__init__.py: test_entry_points.py; others: test_<package>.py
        named = [folder / "test_entry_points.py", folder / "test_layering.py", folder / f"test_{folder.name}.py"]
        return [path for path in named if path.exists()]
    # One module, one file of tests, or several that begin with its name.
    return sorted(folder.glob(f"test_{stem}.py")) + sorted(folder.glob(f"test_{stem}_*.py"))


@pytest.mark.parametrize("module", modules())
def test_every_module_has_tests(module: str) -> None:
    if module in ELSEWHERE:
        return
    assert mirrors(module), f"skink/{module} has no tests/{Path(module).parent}/test_{Path(module).stem}.py"


def test_the_list_of_exceptions_is_up_to_date() -> None:
    for module in ELSEWHERE:
        assert (PACKAGE / module).exists(), f"{module} is gone"
        assert not mirrors(module) or module.endswith("__init__.py"), f"{module} has tests of its own now"
