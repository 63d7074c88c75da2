import math
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from skink.evaluation import perplexity, text_files, token_windows
from tests.cli.conftest import Run


def test_the_number_comes_with_its_settings(run: Run, tiny: Path, text: Path) -> None:
    done = run("eval", tiny, "--text", text, "--windows", 3, "--length", 16, "--json")
    assert done.code == 0, done.stderr
    found = done.json
    assert (found["windows"], found["length"], found["dtype"]) == (3, 16, "float32")
    assert found["source"] == text.name
    assert math.isclose(found["perplexity"], math.exp(found["nats_per_token"]))
    from transformers import AutoTokenizer

    windows = token_windows(text_files([text]), AutoTokenizer.from_pretrained(tiny), length=16, count=3)
    expected = perplexity(AutoModelForCausalLM.from_pretrained(tiny).eval(), windows).value
    assert math.isclose(found["perplexity"], expected, rel_tol=1e-6)


def test_people_see_the_settings_too(run: Run, tiny: Path, text: Path) -> None:
    shown = run("eval", tiny, "--text", text, "--windows", 3, "--length", 16).stdout
    for part in ("perplexity", "3 of 16 tokens", "sha256", "float32 on cpu"):
        assert part in shown


def test_windows_are_no_longer_than_the_model_reads(run: Run, tiny: Path) -> None:
    assert run("eval", tiny, "--text", "stdlib", "--windows", 2, "--length", 512, "--json").json["length"] == 128


def test_several_files_follow_one_option(run: Run, compressed: Path, text: Path) -> None:
    more = text.with_name("more.py")
    more.write_text("x = 1\n" * 50)
    found = run("eval", compressed, "--text", text, more, "--windows", 2, "--length", 16, "--json").json
    assert found["source"] == "text.py, more.py"


def test_empty_text_is_an_error(run: Run, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    done = run("eval", tiny, "--text", tmp_path / "empty.txt", "--json")
    assert done.code == 1
    assert done.json["error"]["code"] == "CALIBRATION-001"


def test_questions_when_asked(run: Run, tiny: Path, text: Path) -> None:
    arguments = ("eval", tiny, "--text", text, "--windows", 1, "--length", 16, "--questions", 3)
    (found,) = run(*arguments, "--json").json["questions"]
    assert (found["kind"], found["n"], len(found["correct"])) == ("next-line", 3, 3)
    assert "of 3 questions" in run(*arguments).stdout


def test_tasks_need_the_harness(monkeypatch: pytest.MonkeyPatch, run: Run, tiny: Path, text: Path) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    done = run("eval", tiny, "--text", text, "--tasks", "hellaswag", "--json")
    assert done.code == 1
    assert done.json["error"]["code"] == "TASK-001"
