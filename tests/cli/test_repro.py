"""`skink repro`: a failure again, and folders that are not what they were."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import skink
import skink.passes
from skink.cli.models import load_model
from skink.compression.compress import captured as captured_model
from skink.errors import VerifyError
from skink.graph.pipeline import Pipeline
from skink.passes import PASSES, discover
from skink.passes.canonicalize import Canonicalize
from skink.settings import settings
from tests.cli.conftest import Run
from tests.graph.scaling import Scale
from tests.programs import captured

FACTORS = (1.0, 1.0, 1.0, 2.0)


@pytest.fixture(autouse=True, scope="module")
def scale_is_a_pass() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(skink.passes, "PASSES", (*PASSES, Scale))
        discover.cache_clear()
        yield
    discover.cache_clear()


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    parent = tmp_path_factory.mktemp("dumps")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SKINK_DUMP", str(parent))
        settings.cache_clear()
        with pytest.raises(VerifyError):
            Pipeline((Canonicalize(), Scale(factors=FACTORS))).run(captured("llama"))
    settings.cache_clear()
    return parent / "reproducer_01_scale"


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "left"))


@pytest.mark.parametrize("options", [(), ("--local",)])
def test_the_failure_happens_again(run: Run, folder: Path, options: tuple[str, ...]) -> None:
    done = run("repro", folder, *options)
    assert done.code == 0, done.stderr
    assert done.stdout.startswith("It fails in the same way.\n[VERIFY-002] pass scale calls itself exact")
    rows = {line.split()[0]: line.split() for line in done.stdout.splitlines() if line.strip()}
    assert rows["torch"][1] == rows["torch"][2]


def test_nothing_of_a_new_failure_is_left(run: Run, folder: Path, tmp_path: Path, set_environment: object) -> None:
    set_environment(SKINK_DUMP=str(tmp_path / "dumps"))  # type: ignore[operator]
    assert run("repro", folder).code == 0
    assert not (tmp_path / "dumps").exists()


def test_the_json_has_both_failures_and_both_versions(run: Run, folder: Path) -> None:
    known = json.loads((folder / "versions.json").read_text())
    (folder / "versions.json").write_text(json.dumps(known | {"torch": "1.0", "left-pad": "3"}))
    done = run("repro", folder, "--local", "--json")
    assert done.code == 0
    content = done.json
    assert content["same"]
    assert content["from"] == "before"
    assert content["failure"] == content["expected"] | {"text": content["failure"]["text"]}
    assert content["weights"]
    assert content["versions"]["torch"]["there"] == "1.0"
    assert content["versions"]["left-pad"] == {"there": "3", "here": "not installed"}


def test_what_differs_is_marked(run: Run, folder: Path) -> None:
    known = json.loads((folder / "versions.json").read_text())
    (folder / "versions.json").write_text(json.dumps(known | {"torch": "1.0"}))
    (line,) = (line for line in run("repro", folder).stdout.splitlines() if line.startswith("torch "))
    assert line.split()[-1] == "differs"


def test_a_pipeline_that_does_not_fail_any_more_has_a_status_of_its_own(run: Run, folder: Path) -> None:
    (folder / "pipeline.txt").write_text("canonicalize, scale{factors=[1.0]}\n")
    done = run("repro", folder)
    assert done.code == 3
    assert done.stdout.startswith("It does not fail.\n")
    assert "It failed with:\n[VERIFY-002]" in done.stdout


def test_another_failure_is_not_the_same(run: Run, folder: Path) -> None:
    (folder / "pipeline.txt").write_text("canonicalize, scale{factors=[0.0]}\n")
    done = run("repro", folder)
    assert done.code == 3
    assert done.stdout.startswith("It fails in another way.\na factor of zero")


def test_a_folder_without_weights_says_so(run: Run, folder: Path) -> None:
    content = json.loads((folder / "reproducer.json").read_text())
    (folder / "reproducer.json").write_text(json.dumps(content | {"weights": False}))
    done = run("repro", folder)
    assert done.code == 3
    assert "The folder holds no weights" in done.stderr


def test_the_weights_of_a_model_take_the_place_of_those_left_out(
    run: Run, tiny: Path, tmp_path: Path, set_environment: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("skink.graph.write_reproducer.WEIGHTS_LIMIT", 1000)
    set_environment(SKINK_DUMP=str(tmp_path))
    with pytest.raises(VerifyError):
        Pipeline((Canonicalize(), Scale(factors=FACTORS))).run(captured_model(load_model(str(tiny)).model))
    folder = tmp_path / "reproducer_01_scale"
    assert run("repro", folder).code == 3
    assert run("repro", folder, "--weights-of", tiny).code == 0
    # In Skink's form, which needs no capture.
    same = tmp_path / "same"
    skink.compress(str(tiny), []).save_pretrained(same)
    assert run("repro", folder, "--weights-of", same, "--local").code == 0
    found = run("bisect", folder, "--weights-of", same, "--json")
    assert (found.code, found.json["edit"]["node"]) == (0, "linear_3")
    missing = run("repro", folder, "--weights-of", tmp_path / "nothing")
    assert missing.code == 1
    assert "[MODEL-001]" in missing.stderr


@pytest.mark.parametrize(
    ("pipeline", "what", "fix"),
    [
        ("canonicalize, other-pass", "cannot be made here", "install what it needs, in the versions of versions.json"),
        ("scale{factors=[1.0]}, low-rank", "cannot be made here", "install what it needs"),
        ("canonicalize, scale{fctors=[1.0]}", "cannot be made here", "install the version of Skink"),
        ("canonicalize", "says that pass number 1 of its pipeline failed, 'scale'", "as the failure left it"),
        ("scale, canonicalize", "says that pass number 1 of its pipeline failed, 'scale'", "as the failure left it"),
    ],
)
def test_a_pipeline_that_does_not_fit_is_refused(run: Run, folder: Path, pipeline: str, what: str, fix: str) -> None:
    (folder / "pipeline.txt").write_text(pipeline)
    done = run("repro", folder, "--json")
    assert done.code == 1
    assert done.json["error"]["code"] == "REPRO-001"
    assert what in done.json["error"]["what"]
    assert fix in done.json["error"]["fix"]


def test_a_program_that_does_not_run_is_the_folders_fault(run: Run, folder: Path) -> None:
    content = json.loads((folder / "start.json").read_text())
    for node in content["nodes"]:
        if node.get("target") == "aten.embedding.default":
            node["args"] = [{"weight": "model.norm.weight"}, *node["args"][1:]]
    (folder / "start.json").write_text(json.dumps(content))
    done = run("repro", folder, "--json")
    assert done.code == 1
    assert done.json["error"]["code"] == "REPRO-001"


@pytest.mark.parametrize("name", ["nowhere", "."])
def test_a_folder_that_is_none_is_refused(run: Run, tmp_path: Path, name: str) -> None:
    done = run("repro", tmp_path / name)
    assert done.code == 1
    assert done.stderr.startswith("[REPRO-001]")
