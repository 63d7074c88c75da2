import errno
import json
import os
import subprocess
import sys

import pytest

from skink.cli.console import DEFECT
from tests.cli.conftest import ROOT, Run, environment


def test_starting_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, skink.cli; print([m for m in ('torch', 'transformers', 'onnx', 'pydantic') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_passes_and_unknown_recipes_do_without_transformers(run_fresh: Run) -> None:
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom skink.cli import app\n"
        "codes = [CliRunner().invoke(app, line.split()).exit_code for line in "
        "('passes', 'compress stdlib-llama --recipe low-rnk --out nowhere')]\n"
        "print(codes, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[0, 1] False"


def test_the_module_runs_as_the_command(run_fresh: Run) -> None:
    done = run_fresh("--help")
    assert done.code == 0
    for name in ("compress", "inspect", "eval", "generate", "export", "bench", "passes", "bisect", "repro"):
        assert name in done.stdout


def test_the_version_is_printed(run: Run) -> None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        expected = f"skink {version('skink')}"
    except PackageNotFoundError:
        pytest.skip("skink is not installed, only on the path")
    assert run("--version").stdout.strip() == expected


def test_an_unknown_command_suggests_the_nearest(run: Run) -> None:
    done = run("compres")
    assert done.code == 2
    assert "compress" in done.stderr


def test_an_unknown_option_suggests_the_nearest(run: Run) -> None:
    done = run("eval", "x", "--window", "3")
    assert done.code == 2
    assert "--windows" in done.stderr


def test_a_usage_error_is_json_too(run: Run) -> None:
    done = run("compress", "x", "--json")
    assert done.code == 2
    assert done.json["error"]["code"] == "USAGE-001"
    assert "--recipe" in done.json["error"]["what"]
    assert "--recipe" in done.stderr


def test_an_error_is_four_lines_on_stderr(run: Run, tmp_path: object) -> None:
    done = run("compress", "stdlib-llama", "--recipe", "low-rank{keep=2}", "--out", f"{tmp_path}/out")
    assert done.code == 1
    assert done.stdout == ""
    assert done.stderr.splitlines()[0] == "[OPTION-002] low-rank.keep=2.0 is out of range (0, 1]."
    assert done.stderr.splitlines()[-1].startswith("  fix: ")
    assert "\x1b" not in done.stderr


def _break(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("skink.passes.recipe.shipped_recipes", fail)


def test_an_unexpected_exception_is_called_a_defect(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    _break(monkeypatch, ZeroDivisionError("by nought"))
    done = run("passes", "--json")
    assert done.code == DEFECT
    assert "Traceback" in done.stderr
    assert "this is a defect in Skink" in done.stderr
    assert done.json["error"]["code"] == "DEFECT-001"
    assert done.json["error"]["why"] == "by nought"


def test_a_full_disk_is_named_wherever_it_is_met(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    _break(monkeypatch, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere"))
    done = run("passes")
    assert done.code == 1
    assert done.stderr.startswith("[OUTPUT-002] no space left")
    assert "somewhere" in done.stderr


def test_an_interrupted_command_ends_with_130(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    _break(monkeypatch, KeyboardInterrupt())
    done = run("passes", "--json")
    assert done.code == 130
    assert done.stderr.strip() == "Interrupted: nothing half-written was left behind."
    assert done.json["error"]["code"] == "INTERRUPT-001"


def test_what_other_code_prints_does_not_reach_json(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def talk() -> dict[str, str]:
        sys.stdout.write("chatter\n")
        return {}

    monkeypatch.setattr("skink.passes.recipe.shipped_recipes", talk)
    done = run("passes", "--json")
    assert "chatter" in done.stderr
    assert "passes" in done.json


def test_a_reader_that_goes_away_is_no_defect() -> None:
    command = f"{sys.executable} -m skink passes | true"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, cwd=ROOT, env=environment(), check=False
    )
    assert "Traceback" not in done.stderr


def test_json_is_one_object_in_a_process_of_its_own(run_fresh: Run) -> None:
    done = run_fresh("passes", "--json")
    assert done.code == 0
    assert done.stderr == ""
    assert [entry["name"] for entry in json.loads(done.stdout)["passes"]][:2] == ["canonicalize", "low-rank"]
