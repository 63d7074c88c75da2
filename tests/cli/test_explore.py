import json
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import Run

FAST = (
    *("--calibration-windows", 2, "--held-out-windows", 2, "--length", 32, "--questions", 4),
    *("--prompt-tokens", 4, "--new-tokens", 3, "--rounds", 1),
)


@pytest.fixture
def space(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text("axes: {keep: [0.7, 0.4]}\nrecipe: low-rank{keep=$keep,method=plain}\n", encoding="utf-8")
    return path


def test_a_map_is_made_and_made_only_once(run: Run, tiny: Path, text: Path, space: Path, tmp_path: Path) -> None:
    arguments = ("explore", tiny, "--space", space, "--out", tmp_path / "map", "--held-out", text, *FAST)
    first = run(*arguments, "--json")
    assert first.code == 0, first.stderr
    found = first.json
    assert [point["values"]["keep"] for point in found["points"]] == [0.7, 0.4]
    assert set(found["fronts"]) == {"perplexity", "accuracy"}
    assert {"latency", "bytes", "macs_per_token"} <= set(found["points"][0]["metrics"])
    assert json.loads((tmp_path / "map" / "explore.json").read_text())["points"] == found["points"]
    lines = (tmp_path / "map" / "points.jsonl").read_text()
    again = run(*arguments)
    assert again.code == 0, again.stderr
    for part in ("small: 2 points", "explore.html", "beside dense", "dense"):
        assert part in again.stdout
    assert (tmp_path / "map" / "points.jsonl").read_text() == lines


def test_a_dry_run_lists_the_points(run: Run, tiny: Path, text: Path, space: Path, tmp_path: Path) -> None:
    arguments = ("explore", tiny, "--space", space, "--out", tmp_path / "map", "--held-out", text, *FAST, "--dry-run")
    done = run(*arguments)
    assert done.code == 0, done.stderr
    assert "low-rank{keep=0.4,method=plain}" in done.stdout
    assert "2 points" in done.stdout
    assert [point["family"] for point in run(*arguments, "--json").json["points"]] == ["small", "small"]
    assert not (tmp_path / "map").exists()


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("--space", "quik"), "SPACE-001"),
        (("--space", "quick", "--quality", "beauty"), "OPTION-002"),
        (("--space", "quick"), "CALIBRATION-002"),
        (
            ("--space", "quick", "--training-length", 64, "--calibration", "stdlib", "--calibration-windows", 2),
            "RECOVER-009",
        ),
    ],
)
def test_errors_have_codes(run: Run, tiny: Path, tmp_path: Path, arguments: tuple[object, ...], code: str) -> None:
    done = run("explore", tiny, *arguments, "--out", tmp_path / "map", "--json")
    assert done.code == 1
    assert done.json["error"]["code"] == code
    assert not (tmp_path / "map").exists()


def test_tasks_need_the_harness(
    monkeypatch: pytest.MonkeyPatch, run: Run, tiny: Path, text: Path, space: Path, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    arguments = ("--held-out", text, *FAST, "--tasks", "hellaswag", "--no-latency", "--json")
    done = run("explore", tiny, "--space", space, "--out", tmp_path / "map", *arguments)
    # A task that cannot be run is refused before any point.
    assert done.code == 1, done.stdout
    assert done.json["error"]["code"] == "TASK-001"
