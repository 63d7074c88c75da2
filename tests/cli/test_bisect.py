"""`skink bisect`: on a folder, and on a model with a recipe."""

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Run
from tests.cli.test_repro import FACTORS, folder, original, scale_is_a_pass  # noqa: F401


def test_a_folder_gives_the_rewrite(run: Run, folder: Path) -> None:  # noqa: F811
    done = run("bisect", folder)
    assert done.code == 0, done.stderr
    title, *rows = done.stdout.splitlines()
    assert title.startswith("The first rewrite that breaks it: edit ")
    told = {row.split()[0]: row.split()[1] for row in rows[:5]}
    assert (told["pass"], told["rule"], told["node"]) == ("scale", "scale", "%linear_3")
    assert told["module"] == "model.layers.0.self_attn.o_proj"
    assert "modeling_llama.py:" in told["source"]
    assert "\n+  %mul_tensor_3 : f32[B,T,64] = aten.mul.Tensor(%linear_3, 2.0)  # scale\n" in done.stdout
    assert "bisect: done" in done.stderr


def test_the_json_has_all_of_it(run: Run, folder: Path) -> None:  # noqa: F811
    done = run("bisect", folder, "--json", "--lines", 0)
    assert done.code == 0, done.stderr
    found = done.json
    edits = len((folder / "edits.jsonl").read_text().splitlines())
    assert found["edit"]["index"] == edits + FACTORS.index(2.0)
    assert found["edit"]["rule"] == found["pass"] == "scale"
    assert found["error_before"] < 1e-5 < found["error_after"]
    assert found["failure"].startswith("[VERIFY-002]")
    assert (found["edits"], found["failed_otherwise"]) == (edits + len(FACTORS), 0)
    assert all(line[0] in "+-@" for line in found["diff"].splitlines())


def test_an_error_bound_goes_before_the_failure_of_the_folder(run: Run, folder: Path) -> None:  # noqa: F811
    done = run("bisect", folder, "--error-above", 50, "--json")
    assert done.code == 1
    assert done.json["error"]["code"] == "BISECT-001"
    assert "not above 50" in done.json["error"]["what"]


def test_a_pass_that_fails_by_itself_is_named(run: Run, folder: Path) -> None:  # noqa: F811
    (folder / "pipeline.txt").write_text("canonicalize, scale{factors=[0.0]}\n")
    content = json.loads((folder / "reproducer.json").read_text())
    content["failure"] |= {"kind": "ZeroDivisionError", "code": ""}
    (folder / "reproducer.json").write_text(json.dumps(content))
    done = run("bisect", folder)
    assert done.code == 0, done.stderr
    assert done.stdout.startswith("No rewrite breaks it: pass scale fails by itself, after ")


def test_a_folder_that_does_not_fail_has_nothing_to_find(run: Run, folder: Path) -> None:  # noqa: F811
    (folder / "pipeline.txt").write_text("canonicalize, scale{factors=[1.0]}\n")
    done = run("bisect", folder)
    assert done.code == 1
    assert "[BISECT-001] the pipeline runs to its end" in done.stderr
    assert "skink repro shows both" in done.stderr


def test_a_model_and_a_recipe(run: Run, tiny: Path) -> None:
    recipe = "low-rank{keep=0.5,method=plain,targets=[*.mlp.*]}"
    done = run("bisect", tiny, "--recipe", recipe, "--error-above", "0.001", "--json")
    assert done.code == 0, done.stderr
    found = done.json
    assert (found["edit"]["pass_name"], found["edit"]["rule"]) == ("low-rank", "linear-to-low-rank")
    assert found["error_before"] <= 0.001 < found["error_after"]
    assert found["edit"]["qualified_name"].startswith("model.layers.")


def test_a_recipe_without_fault_has_nothing_to_find(run: Run, tiny: Path) -> None:
    done = run("bisect", tiny, "--recipe", "", "--json")
    assert done.code == 1
    assert done.json["error"]["code"] == "BISECT-001"
    assert "--error-above" in done.json["error"]["fix"]


def test_a_recipe_that_calibrates_takes_text(run: Run, tiny: Path, text: Path) -> None:
    recipe = ("--recipe", "low-rank{method=whitened,targets=[*.0.mlp.up_proj]}", "--set", "low-rank.keep=0.5")
    recipe += ("--error-above", "0.001", "--json")
    done = run("bisect", tiny, *recipe)
    assert done.code == 1
    assert done.json["error"]["code"] == "CALIBRATION-002"
    done = run("bisect", tiny, *recipe, "--calibration", text, "--windows", 2, "--length", 16)
    assert done.code == 0, done.stderr
    assert done.json["pass"] == "low-rank"


def test_what_is_neither_a_folder_nor_has_a_recipe_is_a_mistake_of_use(run: Run, tmp_path: Path) -> None:
    done = run("bisect", tmp_path, "--json")
    assert done.code == 2
    assert done.json["error"]["code"] == "USAGE-001"
    assert "a model needs --recipe" in done.json["error"]["what"]


@pytest.mark.parametrize("recipe", ["low-rnk", "low-rank{keep=2}"])
def test_a_recipe_with_a_mistake_is_refused(run: Run, recipe: str) -> None:
    assert run("bisect", "stdlib-llama", "--recipe", recipe).code == 1


def test_passes_that_train_are_left_out(run: Run, tiny: Path) -> None:
    recipe = "low-rank{keep=0.5,method=plain}, recover"
    done = run("bisect", tiny, "--recipe", recipe, "--error-above", 0.01, "--json")
    assert done.code == 0, done.stderr
    assert "Passes that train are left out: they rewrite nothing." in done.stderr
    assert done.json["edit"]["pass_name"] == "low-rank"
