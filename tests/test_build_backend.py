"""The installation without a compiler: a pure-Python wheel with everything that the package reads at run time."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    code = f"import build_backend; build_backend.build_wheel({str(folder)!r})"
    hidden = {"CC": "/nonexistent/cc", "CXX": "/nonexistent/c++"}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | hidden | environment, capture_output=True, text=True
    )


def test_installs_without_a_compiler(tmp_path: Path) -> None:
    done = build(tmp_path, SKINK_BUILD_KERNELS="")
    assert done.returncode == 0, done.stderr
    assert "the C++ kernels were not built" in done.stderr
    (wheel,) = tmp_path.iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    files = set(zipfile.ZipFile(wheel).namelist())
    assert {
        "skink/py.typed",
        "skink/assets/stdlib-llama/model.safetensors",
        "skink/kernels/attention/cpu.h",
        "skink/kernels/cpp/problem.h",
    } <= files
    source = {
        file.relative_to(ROOT).as_posix()
        for file in (ROOT / "skink").rglob("*")
        if file.is_file() and file.suffix not in {".pyc", ".cpp"}
    }
    assert source <= files


def test_packagers_can_insist_on_the_kernels(tmp_path: Path) -> None:
    assert build(tmp_path, SKINK_BUILD_KERNELS="required").returncode != 0
    assert not list(tmp_path.iterdir())


def test_a_missing_cmake_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = pytest.importorskip("build_backend", reason="scikit-build-core is not installed")
    from scikit_build_core.errors import CMakeNotFoundError

    calls: list[object] = []

    def hook(folder: str, config: object) -> str:
        calls.append(config)
        if len(calls) == 1:
            raise CMakeNotFoundError
        return "skink.whl"

    monkeypatch.setattr(backend.build, "build_editable", hook)
    monkeypatch.delenv("SKINK_BUILD_KERNELS", raising=False)
    assert backend.build_editable("folder", {"key": "value"}) == "skink.whl"
    assert calls == [{"key": "value"}, {"key": "value", "wheel.cmake": "false"}]
