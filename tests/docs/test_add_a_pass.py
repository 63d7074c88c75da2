"""The worked example of docs/add_a_pass.md runs, from a package of its own too."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, page

PAGE = page("docs/add_a_pass.md")


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder with the files of the example, and what installing it would add."""
    for block in PAGE.blocks():
        if block.name:
            (tmp_path / block.name).parent.mkdir(exist_ok=True)
            (tmp_path / block.name).write_text(block.text, encoding="utf-8")
    project = tomllib.loads((tmp_path / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    installed = tmp_path / f"relu_gates-{project['version']}.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    points = project["entry-points"]["skink.passes"]
    (installed / "entry_points.txt").write_text(
        "[skink.passes]\n" + "".join(f"{name} = {target}\n" for name, target in points.items())
    )
    return tmp_path


def _run(package: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=package,
        env={"PYTHONPATH": f"{package}:{ROOT}", "PATH": "", "OMP_NUM_THREADS": "1", "HOME": str(package)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_tests_of_the_example_pass(package: Path) -> None:
    assert "2 passed" in _run(package, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_relu_gates.py")


def test_an_installed_package_is_found_by_its_entry_point(package: Path) -> None:
    code = (
        "from skink.passes.recipe import load_recipe;"
        "print(load_recipe('relu-gates{ignore=[model.layers.0.*]}, low-rank{keep=0.5}'))"
    )
    assert _run(package, "-c", code).strip() == "relu-gates{ignore=[model.layers.0.*]}, low-rank{keep=0.5}"
