"""`skink compress --dry-run` says what would be done, and does none of it."""

from pathlib import Path

from typer.testing import CliRunner

from skink.cli import app


def test_the_plan_names_model_passes_text_and_folder_and_writes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["compress", "stdlib-llama", "--recipe", "quickstart", "--out", str(out), "--dry-run"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    for part in ("stdlib-llama (llama)", "1. canonicalize (exact)", "2. low-rank (approximate)", "standard library"):
        assert part in result.stdout
    assert not out.exists()
    assert list(tmp_path.iterdir()) == []


def test_a_bad_recipe_is_found_without_work(tmp_path: Path) -> None:
    arguments = ["compress", "stdlib-llama", "--recipe", "low-rnak", "--out", str(tmp_path / "out"), "--dry-run"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert "RECIPE-001" in result.stderr
    assert "low-rank" in result.stderr
