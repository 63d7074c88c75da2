import json
from pathlib import Path

import yaml

from tests.cli.conftest import Run

FAST = ("--no-evaluate", "--verify", 0)
QUICK = ("--length", 32, "--rounds", 1, "--prompt-tokens", 8, "--new-tokens", 4)


def test_everything_is_measured_and_said(run: Run, tiny: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    done = run(
        *("compress", tiny, "--recipe", "low-rank{keep=0.5}", "--set", "low-rank.keep=0.6", "--out", out, *QUICK),
        *("--calibration", text, "--held-out-windows", 4, "--calibration-windows", 8, "--prompt", "def f", "--json"),
    )
    assert done.code == 0, done.stderr
    result = done.json
    assert result["out"] == str(out)
    assert {"config.json", "model.safetensors", "graph.json", "recipe.yaml", "report.html"} <= set(result["files"])
    source, _, small = result["report"]["forms"]
    assert small["linear_parameters"] < 0.62 * source["linear_parameters"]
    assert small["perplexity"]["settings"]["length"] == 32
    assert small["speed"]["decode"]["median"] > 0
    assert yaml.safe_load((out / "recipe.yaml").read_text())["passes"][0]["low-rank"]["keep"] == 0.6
    assert json.loads((out / "report.json").read_text()) == result["report"]
    assert list(result["samples"]["continuations"]) == [str(tiny), str(out)]
    assert "perplexity: done in" in done.stderr


def test_people_get_the_table_the_files_and_what_to_do_next(run: Run, tiny: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run(
        *("compress", tiny, "--recipe", "low-rank{method=plain}", "--out", out, *QUICK, "--held-out", text),
        *("--held-out-windows", 2, "--prompt", "def f"),
    )
    assert done.code == 0, done.stderr
    for part in (
        "Perplexity",
        "Decode, tok/s",
        "model.safetensors",
        "skink generate",
        "from_pretrained",
        f"{out} writes",
    ):
        assert part in done.stdout


def test_the_empty_recipe_gives_the_same_model_back(run: Run, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run("compress", tiny, "--recipe", "", "--out", out, *FAST, "--json")
    assert done.code == 0, done.stderr
    arguments = ("def f", "--max-new-tokens", 8, "--json")
    same = [run("generate", model, *arguments).json["continuation"] for model in (tiny, out)]
    assert same[0] == same[1]


def test_a_folder_is_replaced_only_when_asked(run: Run, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    arguments = ("compress", tiny, "--recipe", "", "--out", out, *FAST, "--json")
    refused = run(*arguments)
    assert refused.code == 1
    assert refused.json["error"]["code"] == "OUTPUT-001"
    assert "--overwrite" in refused.json["error"]["fix"]
    assert [path.name for path in out.iterdir()] == ["precious.txt"]
    assert run(*arguments, "--overwrite").code == 0
    assert not (out / "precious.txt").exists()


def test_a_dry_run_checks_and_writes_nothing(run: Run, tiny: Path, text: Path, tmp_path: Path) -> None:
    arguments = ("compress", tiny, "--recipe", "low-rank", "--out", tmp_path / "out", "--dry-run", "--json")
    done = run(*arguments, "--calibration", text)
    assert done.code == 0, done.stderr
    assert [entry["pass"] for entry in done.json["passes"]] == ["canonicalize", "low-rank"]
    assert done.json["text"]["calibration"]["documents"] == 1
    assert done.json["model"]["parameters"] > 0
    assert run(*arguments).json["error"]["code"] == "CALIBRATION-002"
    assert list(tmp_path.iterdir()) == [text]


def test_a_dry_run_reads_well(run: Run, compressed: Path, tmp_path: Path) -> None:
    done = run("compress", compressed, "--recipe", "", "--out", tmp_path / "out", "--dry-run")
    assert done.code == 0, done.stderr
    assert "1. canonicalize (exact)" in done.stdout
    assert done.stdout.endswith("Dry run: nothing was written.\n")


def test_a_sample_that_cannot_be_had_does_not_spoil_the_result(run: Run, tiny: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((tiny / name).read_bytes())
    done = run("compress", bare, "--recipe", "", "--out", tmp_path / "out", *FAST, "--prompt", "x", "--json")
    assert done.code == 0, done.stderr
    assert done.json["samples"]["continuations"] == {}
    assert "no sample: [MODEL-001]" in done.stderr


def test_a_skink_folder_can_be_compressed_further(run: Run, compressed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run("compress", compressed, "--recipe", "", "--out", out, *FAST, "--json")
    assert done.code == 0, done.stderr
    arguments = ("def f", "--max-new-tokens", 8, "--json")
    same = [run("generate", model, *arguments).json["continuation"] for model in (compressed, out)]
    assert same[0] == same[1]
