"""Loading of the C++ kernels: found or not, said once, and the instruction set that was asked for."""

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from skink.errors import OptionError
from skink.kernels.cpp import library, use_instruction_set
from skink.settings import Settings

module = sys.modules["skink.kernels.cpp.library"]  # the name in the package is the function


@pytest.fixture
def fresh() -> Iterator[None]:
    library.cache_clear()
    yield
    library.cache_clear()


def test_built_where_there_is_a_compiler() -> None:
    tools = all(shutil.which(tool) for tool in ("c++", "cmake"))
    assert library().available or not tools, library().reason


def test_says_what_it_loaded(built: None) -> None:
    loaded = library()
    assert loaded.reason == ""
    assert loaded.path is not None
    assert loaded.path.exists()
    assert loaded.instruction_sets[0] == "baseline"
    assert loaded.instruction_set == loaded.instruction_sets[-1] or os.environ.get("SKINK_INSTRUCTION_SET")


def test_says_once_that_it_was_not_built(
    fresh: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_find", lambda: None)
    with caplog.at_level(logging.WARNING):
        assert not library().available
        assert library().reason == "the C++ kernels were not built when skink was installed"
    assert len(caplog.records) == 1
    assert "pip install --no-build-isolation" in caplog.text


def test_says_that_it_could_not_be_loaded(
    fresh: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    damaged = tmp_path / "libskink_kernels.so"
    damaged.write_bytes(b"no library")
    monkeypatch.setattr(module, "_find", lambda: damaged)
    assert not library().available
    assert "could not be loaded" in library().reason
    assert len(caplog.records) == 1


def test_reference_kernels_on_request(
    fresh: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "settings", lambda: Settings(kernels="reference"))
    assert library().reason == "SKINK_KERNELS=reference"
    assert not caplog.records


def test_instruction_set_from_the_environment(built: None) -> None:
    code = "from skink.kernels.cpp import library; print(library().instruction_set)"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"SKINK_INSTRUCTION_SET": "baseline"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == "baseline"


def test_unknown_instruction_set(built: None) -> None:
    with pytest.raises(OptionError, match="instruction set 'axv2'") as caught, use_instruction_set("axv2"):
        pass
    assert caught.value.code == "OPTION-002"
    assert "valid: baseline" in caught.value.fix


def test_instruction_set_comes_back(built: None) -> None:
    select, selected = module._open(library().path), library().instruction_set
    with use_instruction_set("baseline"):
        assert select.skink_selected_instruction_set() == b"baseline"
    assert select.skink_selected_instruction_set().decode() == selected


def test_operators_in_exported_and_compiled_graphs(built: None) -> None:
    class Norm(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.skink_cpp.rms_norm(x, None, 1e-6) * 2

    x = torch.randn(3, 8)
    exported = torch.export.export(Norm(), (x,), dynamic_shapes={"x": {0: torch.export.Dim("B", min=1)}})
    assert torch.equal(exported.module()(x), Norm()(x))
    compiled = torch.compile(Norm(), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), Norm()(x))
