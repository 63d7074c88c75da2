from pathlib import Path

from tests.cli.conftest import Run

QUICK = ("--rounds", 2, "--prompt-tokens", 4, "--new-tokens", 3)


def test_ratios_are_to_the_first_of_the_others(run: Run, tiny: Path, compressed: Path) -> None:
    done = run("bench", compressed, "--against", tiny, compressed / "onnx", *QUICK, "--json")
    assert done.code == 0, done.stderr
    models = done.json["models"]
    assert list(models) == [str(tiny), str(compressed / "onnx"), str(compressed)]
    assert {entry["baseline"] for entry in models.values()} == {str(tiny)}
    assert models[str(tiny)]["decode_ratio"]["median"] == 1.0
    assert models[str(compressed)]["rounds"] == 2
    assert done.json["machine"]["torch"]


def test_people_get_a_table_with_its_settings(run: Run, tiny: Path) -> None:
    done = run("bench", tiny, "--against", tiny, *QUICK)
    assert done.code == 0, done.stderr
    for part in ("decode, tok/s", "(2)", "2 rounds", "prompts of 4", "PyTorch"):
        assert part in " ".join(done.stdout.split())


def test_one_model_alone_has_no_ratio(run: Run, tiny: Path) -> None:
    done = run("bench", tiny, *QUICK)
    assert done.code == 0, done.stderr
    assert "ratios" not in done.stdout


def test_a_model_that_is_not_there_is_an_error(run: Run, tiny: Path, tmp_path: Path) -> None:
    done = run("bench", tiny, "--against", tmp_path, "--json")
    assert done.code == 1
    assert done.json["error"]["code"] == "MODEL-001"
