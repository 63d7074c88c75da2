"""`skink compress` with recipes that train: text, a teacher, checkpoints, several processes."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import skink
from tests.cli.conftest import ROOT, Run, environment, save_tiny

SMALL = (
    *("--length", 32, "--calibration-windows", 4, "--held-out-windows", 4),
    *("--rounds", 1, "--new-tokens", 2, "--prompt-tokens", 4),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text, and a recipe of two stages with a fair comparison."""
    folder = tmp_path_factory.mktemp("training")
    text = folder / "text.py"
    text.write_text("".join(f"def function_{i}(x):\n    return x + {i}\n\n\n" for i in range(400)), encoding="utf-8")
    (folder / "recipe.yaml").write_text(
        "passes:\n- low-rank{keep=0.5,method=plain}\n- recover{by=layer,train=new,steps=4}\n"
        "- recover{tokens=1500,batch=4,learning_rate=0.003}\n"
        "compare:\n- recover{tokens=1500,batch=4,learning_rate=0.003}\n"
    )
    return folder


def arguments(folder: Path, model: Path, out: str) -> list[str]:
    """A command that has nothing to train on but the text to calibrate on."""
    given = (model, "--recipe", folder / "recipe.yaml", "--calibration", folder / "text.py", "--out", folder / out)
    return ["compress", *map(str, (*given, *SMALL, "--json"))]


@pytest.fixture(scope="module")
def model(tiny: Path, folder: Path) -> Path:
    """The tiny model in Skink's form, which no process need capture."""
    skink.compress(str(tiny), []).save_pretrained(folder / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny / name, folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def report(run: Run, model: Path, folder: Path) -> dict[str, Any]:
    """What one process says of it."""
    out = folder / "out"
    done = run(*arguments(folder, model, "out"))
    assert done.code == 0, done.stderr
    assert (out / "recipe.yaml").read_text().count("recover:") == 2
    assert "Recovery" in (out / "report.html").read_text()
    content: dict[str, Any] = done.json["report"]
    return content


def test_what_was_learnt_is_in_the_report(report: dict[str, Any]) -> None:
    by_layer, by_model = report["recoveries"]
    assert by_layer["name"] == "recover{train=new,by=layer,steps=4}"
    assert by_model["after"] < by_model["before"]
    assert by_model["tokens"] >= 1500
    assert "held out" in by_model["text"]
    # Layers went through the kernels and dtypes of the folder, so it is the same to rounding.
    assert report["forms"][-1]["perplexity"]["nats"] == pytest.approx(by_model["after"], abs=1e-3)


def test_the_dense_model_trained_alike_stands_beside_it(report: dict[str, Any]) -> None:
    names = [row["name"] for row in report["comparisons"]]
    assert names[1] == "recover{tokens=1500,batch=4,learning_rate=0.003}"
    assert report["comparisons"][1]["ratio_to_dense"] < 1


def test_checkpoints_and_a_teacher(run: Run, tiny: Path, compressed: Path, text: Path, tmp_path: Path) -> None:
    def compress(out: str, *more: object) -> Any:
        recipe = "recover{train=new,ce=1,kl=1,steps=2}"
        arguments = ("--recipe", recipe, "--out", tmp_path / out, "--training", text, "--length", 32, "--no-evaluate")
        return run("compress", compressed, *arguments, "--json", *more)

    first, second = (compress(out, "--teacher", tiny, "--checkpoints", tmp_path / "kept") for out in ("one", "two"))
    assert first.code == second.code == 0, first.stderr + second.stderr
    assert first.json["report"]["recoveries"][0]["resumed_at"] is None
    assert second.json["report"]["recoveries"][0]["resumed_at"] == 2
    weights = [(tmp_path / out / "model.safetensors").read_bytes() for out in ("one", "two")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("recipe", "more", "message"),
    [
        ("recover", (), r"\[RECOVER-005\] pass recover trains, and no text to train on was given."),
        ("recover{ce=1}", ("--teacher", "nowhere", "--training", "stdlib"), r"\[RECOVER-009\] a teacher was named"),
        ("low-rank", ("--training", "stdlib"), r"\[RECOVER-009\] text to train on was named"),
        ("low-rank", ("--training-length", 64), r"\[RECOVER-009\] it was said how text to train on is read"),
        ("low-rank", ("--training-packing", "stream"), r"\[RECOVER-009\] it was said how text to train on is read"),
        ("low-rank", ("--checkpoints", "kept"), r"\[RECOVER-009\] a folder for checkpoints was named"),
        (
            "recover",
            ("--training", "stdlib", "--training-packing", "dense"),
            r"\[OPTION-002\] training packing=",
        ),
        (
            "recover",
            ("--training", "stdlib", "--training-field", "answer"),
            r"\[OPTION-002\] training field='answer' does",
        ),
        ("recover", ("--training", "none.txt"), r"\[INPUT-001\] 'none.txt' cannot be read"),
        ("recover{lr=1}", (), r"\[OPTION-001\] recover has no option 'lr'"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(
    run: Run, tmp_path: Path, recipe: str, more: tuple[object, ...], message: str
) -> None:
    for dry in ((), ("--dry-run",)):
        done = run("compress", "no-such-model", "--recipe", recipe, "--out", tmp_path / "out", *more, *dry)
        assert done.code == 1
        assert re.search(message, done.stderr), done.stderr
    assert list(tmp_path.iterdir()) == []


def test_what_is_said_of_training_is_refused_before_transformers_is_loaded(tmp_path: Path) -> None:
    code = (
        "import sys; from skink.cli import app; from typer.testing import CliRunner; "
        f"done = CliRunner().invoke(app, ['compress', 'm', '--recipe', 'low-rank', '--out', {str(tmp_path / 'out')!r}, "
        "'--checkpoints', 'kept']); print(done.exit_code, 'RECOVER-009' in done.stderr, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stdout.split() == ["1", "True", "False"], done.stderr


def test_a_teacher_of_another_vocabulary_is_refused_though_nothing_is_done(
    run: Run, compressed: Path, text: Path, tmp_path: Path
) -> None:
    other = save_tiny(tmp_path / "other", vocab_size=64)
    arguments = ("--recipe", "recover{kl=1,steps=2}", "--out", tmp_path / "out", "--training", text, "--dry-run")
    done = run("compress", compressed, *arguments, "--teacher", other)
    assert done.code == 1
    assert "[RECOVER-006]" in done.stderr
    assert run("compress", compressed, *arguments, "--teacher", compressed).code == 0


def test_lines_and_tokens_are_read_as_was_said(run: Run, tiny: Path, tmp_path: Path) -> None:
    lines, tokens = tmp_path / "rows.jsonl", tmp_path / "tokens.bin"
    lines.write_text("".join(json.dumps({"answer": f"def f{i}():\n    return {i}\n"}) + "\n" for i in range(60)))
    tokens.write_bytes(bytes(range(4, 200)) * 8)
    for file, said in (
        (lines, ("--training-packing", "document", "--training-field", "answer")),
        (tokens, ("--training-dtype", "uint16", "--training-length", 16)),
    ):
        out = tmp_path / f"out-{file.suffix[1:]}"
        recipe = ("--recipe", "recover{ce=1,steps=1,batch=2}", "--training", file, "--length", 32, "--no-evaluate")
        done = run("compress", tiny, *recipe, "--out", out, "--json", *said)
        # uint16 of these bytes are ids of another vocabulary, which shows that it was obeyed.
        assert done.code == (0 if file is lines else 1), done.stderr
        if file is tokens:
            assert "[RECOVER-008] training tokens run from" in done.stderr
        else:
            assert done.json["report"]["recoveries"][0]["text"].startswith("rows.jsonl")


def test_a_dry_run_says_what_is_trained_on(run: Run, compressed: Path, text: Path, tmp_path: Path) -> None:
    arguments = ("--recipe", "recover{steps=2,batch=4}", "--out", tmp_path / "out", "--training", text, "--dry-run")
    done = run("compress", compressed, *arguments, "--json")
    assert done.json["training"] == [{"pass": "recover{steps=2,batch=4}", "tokens": 2 * 4 * 512, "text": str(text)}]
    assert "training    4,096 tokens of" in run("compress", compressed, *arguments).stdout


def test_two_processes_do_what_one_does(model: Path, folder: Path, report: dict[str, Any]) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "skink", *arguments(folder, model, "together")]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment(), check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    # One object, of the first process.
    together = json.loads(done.stdout)["report"]
    assert done.stderr.count("capture: done") == 1
    for found, expected in zip(together["recoveries"], report["recoveries"], strict=True):
        assert found["processes"] == 2
        assert found["tokens"] == expected["tokens"]
        for kind in ("losses", "held_out"):
            assert [loss for _, loss in found[kind]] == pytest.approx([loss for _, loss in expected[kind]], abs=1e-4)
    for found, expected in zip(together["comparisons"], report["comparisons"], strict=True):
        assert found["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-4)
    names = [sorted(path.name for path in (folder / out).iterdir()) for out in ("out", "together")]
    assert names[0] == names[1]
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []
