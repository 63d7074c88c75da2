"""A wrong rewrite, in a pass of another package, is caught, found and reproduced: verification, bisect, reproducer."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from skink.cli import app
from skink.errors import VerifyError
from skink.graph.bisect import bisect
from skink.graph.pipeline import Pipeline
from skink.graph.reproducer import read_reproducer
from skink.passes import discover
from skink.passes.canonicalize import Canonicalize
from skink.passes.recipe import parse_passes
from tests.programs import captured

ROOT = Path(__file__).parents[2]

# Exact in the first layer; in the others not, by a factor in the exponent.
SPLIT_SILU = '''
"""silu(x) -> x * sigmoid(x)"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from skink.graph.passes import Pass, PassResult

aten = torch.ops.aten


@dataclass(frozen=True)
class SplitSilu(Pass):
    name: ClassVar[str] = "split-silu"
    summary: ClassVar[str] = "write SiLU as a product"

    def run(self, program, rewriter, context):
        for node in program.graph.find_nodes(op="call_function", target=aten.silu.default):
            factor = 1.0 if "layers.0" in node.meta["module"] else 1.01
            with rewriter.before(node):
                inner = rewriter.call(aten.mul.Tensor, node.args[0], factor, rule="silu-to-product")
                gate = rewriter.call(aten.sigmoid.default, inner, rule="silu-to-product")
                new = rewriter.call(aten.mul.Tensor, node.args[0], gate, rule="silu-to-product")
            rewriter.replace(node, new, rule="silu-to-product")
        return PassResult(edits=rewriter.count)
'''


def install(folder: Path, module: str, source: str, entry: str, name: str) -> None:
    """What pip leaves of a package with one pass: the module, and its metadata."""
    (folder / f"{module}.py").write_text(source)
    info = folder / f"{module}-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module.replace('_', '-')}\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text(f"[skink.passes]\n{name} = {module}:{entry}\n")
    (info / "RECORD").write_text(f"{module}.py,,\n")
    (info / "top_level.txt").write_text(f"{module}\n")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "packages"
    folder.mkdir()
    install(folder, "split_silu", SPLIT_SILU, "SplitSilu", "split-silu")
    monkeypatch.syspath_prepend(folder)
    discover.cache_clear()
    yield folder
    discover.cache_clear()
    sys.modules.pop("split_silu", None)


def skink(*arguments: object, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own, as on another machine."""
    folders = [str(entry) for entry in (path, ROOT) if entry is not None]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "skink", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)


def test_a_wrong_rewrite_is_caught_found_and_reproduced(package: Path) -> None:
    program = captured("llama")
    given = program.clone()
    pipeline = Pipeline((Canonicalize(), *parse_passes("split-silu")))

    # Caught, with the pass and its rule named, and a folder left.
    with pytest.raises(VerifyError, match=r"\[VERIFY-002\] pass split-silu calls itself exact") as caught:
        pipeline.run(program)
    assert caught.value.why == "the pass's edits: silu-to-product 2 times."
    (name,) = re.findall(r"skink bisect (\S+)`", caught.value.fix)
    folder = Path(name)
    assert json.loads((folder / "versions.json").read_text())["split-silu"] == "0.1"

    # Found: the second of two rewrites by one rule, after all those of canonicalize.
    found = bisect(given, pipeline)
    assert found.edit is not None
    assert (found.edit.pass_name, found.edit.rule) == ("split-silu", "silu-to-product")
    assert found.edit.qualified_name == "model.layers.1.mlp.act_fn"
    assert found.edit.index == found.edits - 1
    assert found.error_before < 1e-6 < found.error_after
    assert "aten.mul.Tensor(%linear_11, 1.01)" in found.diff()
    assert found.runs <= 2 + found.edits.bit_length()

    # Reproduced in a process that knows nothing but the folder and the package.
    done = skink("repro", folder, path=package)
    assert done.returncode == 0, done.stderr
    assert "It fails in the same way." in done.stdout

    # From the folder, the search finds the same.
    again = CliRunner().invoke(app, ["bisect", str(folder), "--json"])
    assert again.exit_code == 0, again.stderr
    assert json.loads(again.stdout)["edit"]["index"] == found.edit.index

    # Without the package the folder says what is missing.
    done = skink("repro", folder)
    assert done.returncode == 1
    assert "[REPRO-001]" in done.stderr
    assert "split-silu" in done.stderr

    # Mended, it fails no more, and that has a status of its own.
    (package / "split_silu.py").write_text(SPLIT_SILU.replace("1.01", "1.0"))
    done = skink("repro", folder, path=package)
    assert done.returncode == 3, done.stderr
    assert "It does not fail." in done.stdout
    assert read_reproducer(folder).failure.pass_name == "split-silu"
