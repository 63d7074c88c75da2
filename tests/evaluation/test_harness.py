import json
import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from skink.errors import TaskError
from skink.evaluation import harness
from skink.evaluation.harness import TaskScore, run_tasks, write_task
from skink.evaluation.questions import Question, Questions


def questions():
    items = (Question("a\nb", ("\nc", "\nd", "\ne", "\nf"), 2), Question("x", ("\n1", "\n2", "\n3", "\n4"), 0))
    return Questions("next-line", "text", "0" * 64, 0, items, ())


def test_without_the_harness_the_error_says_how_to_have_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(TaskError, match="lm_eval is not installed") as caught:
        run_tasks(None, None, ["hellaswag"])
    assert caught.value.code == "TASK-001"
    assert "pip install lm_eval" in caught.value.fix


@pytest.fixture
def lm_eval(monkeypatch):
    """Stands in for the harness: it knows one task, and gives what the test puts in `results`."""
    asked, results = [], {}

    def simple_evaluate(**options):
        asked.append(options)
        if "error" in results:
            raise results["error"]
        return results

    found = SimpleNamespace(asked=asked, results=results)
    monkeypatch.setattr(
        harness,
        "import_module",
        lambda name: {
            "lm_eval.evaluator": SimpleNamespace(simple_evaluate=simple_evaluate),
            "lm_eval.tasks": SimpleNamespace(TaskManager=lambda: SimpleNamespace(all_tasks=["known"])),
            "lm_eval.models.huggingface": SimpleNamespace(HFLM=lambda **options: options),
        }[name],
    )
    return found


def test_scores_are_read_from_its_results(lm_eval):
    lm_eval.results |= {
        "results": {
            "known": {"alias": "known", "acc,none": 0.25, "acc_norm,none": 0.5, "acc_norm_stderr,none": 0.05},
            "other": {"exact_match,strict": 1, "exact_match_stderr,strict": "N/A"},
        },
        "n-samples": {"known": {"original": 9, "effective": 4}},
        "versions": {"known": 2.0},
    }
    first, second = run_tasks("model", "tokenizer", ["known"], limit=4, batch=2, seed=7)
    assert first == TaskScore("known", "acc_norm", 0.5, 0.05, 4, "2.0")
    assert (second.score, second.accuracy, second.n) == ("exact_match", 1.0, 0)
    assert math.isnan(second.standard_error)
    (options,) = lm_eval.asked
    assert options["model"] == {"pretrained": "model", "tokenizer": "tokenizer", "batch_size": 2}
    assert (options["tasks"], options["limit"], options["random_seed"]) == (["known"], 4, 7)


def test_tasks_that_cannot_be_run_are_errors(lm_eval):
    with pytest.raises(TaskError, match="knows no task 'unknown'"):
        run_tasks("model", "tokenizer", ["unknown"])
    lm_eval.results["error"] = ConnectionError("no data\nmore")
    with pytest.raises(TaskError, match="could not run known") as caught:
        run_tasks("model", "tokenizer", ["known"])
    assert caught.value.why == "ConnectionError: no data"
    del lm_eval.results["error"]
    lm_eval.results["results"] = {"known": {"bleu,none": 0.3}}
    with pytest.raises(TaskError, match="gives no accuracy"):
        run_tasks("model", "tokenizer", ["known"])


def test_a_file_of_ours_needs_no_name(lm_eval, tmp_path):
    lm_eval.results["results"] = {"skink_next_line": {"acc,none": 0.5}}
    path = write_task(questions(), tmp_path)
    assert run_tasks("model", "tokenizer", [str(path)])[0].accuracy == 0.5


def test_a_task_has_the_questions(tmp_path):
    path = write_task(questions(), tmp_path / "new", name="mine")
    content = json.loads(path.read_text())
    assert content["task"] == "mine"
    data = Path(content["dataset_kwargs"]["data_files"]["test"])
    lines = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    assert lines[0] == {"context": "a\nb", "choices": ["\nc", "\nd", "\ne", "\nf"], "answer": 2}
    assert len(lines) == 2
    assert content["target_delimiter"] == ""


def test_the_harness_is_not_loaded_before_it_is_used():
    assert isinstance(harness, ModuleType)
    assert "lm_eval" not in sys.modules
