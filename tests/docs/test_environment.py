"""docs/environment.md lists every variable that is read, and nothing else reads the environment."""

import ast
import re
from pathlib import Path

from tests.docs.pages import ROOT, page


def _variables(file: Path) -> set[str]:
    """Names of environment variables that a module reads: strings that look like ours."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return {text for text in strings if re.fullmatch(r"SKINK_[A-Z_]+", text)}


def _documented() -> set[str]:
    return set(re.findall(r"^\| `(SKINK_[A-Z_]+)` \|", page("docs/environment.md").text, flags=re.MULTILINE))


def test_every_variable_is_documented_and_every_documented_one_is_read() -> None:
    settings = _variables(ROOT / "skink" / "settings.py")
    assert "SKINK_VERIFY" in settings
    assert _documented() == settings | _variables(ROOT / "build_backend.py")


def test_defaults_are_as_documented() -> None:
    from skink.settings import Settings

    rows = re.findall(r"^\| `SKINK_(\w+)` \| .+? \| (.+?) \|", page("docs/environment.md").text, flags=re.MULTILINE)
    documented = {name.lower(): default.strip("`") for name, default in rows}
    assert documented["verify"] == str(Settings().verify)
    assert documented["kernels"] == Settings().kernels
    assert Settings().dump is None
    assert documented["dump"] == "none"


def test_only_settings_reads_the_environment() -> None:
    library = [file for file in sorted((ROOT / "skink").rglob("*.py")) if "assets" not in file.parts]
    readers = [
        f"{file.relative_to(ROOT)}:{node.lineno}"
        for file in library
        if file.name != "settings.py"
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")
    ]
    assert not readers
