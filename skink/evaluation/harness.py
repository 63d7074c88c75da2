"""lm-evaluation-harness (Gao et al. 2021), where it is installed: its tasks on any model here, our questions as a task.

A Skink model is an ordinary Hugging Face model, so the harness takes it as it is. Nothing of it is loaded before
`run_tasks` is called.
"""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from skink.errors import TaskError
from skink.evaluation.questions import Questions

# Of a task's numbers the first that it has is taken; the normalised one is what multiple choice is compared by.
_SCORES = ("acc_norm", "acc", "exact_match", "f1")


@dataclass(frozen=True)
class TaskScore:
    """One task's result.

    Args:
        name: of the task.
        score: which of its numbers: `acc_norm`, `acc`, `exact_match` or `f1`.
        accuracy: that number.
        standard_error: as the harness gives it; NaN where it gives none.
        n: documents.
        version: of the task.
    """

    name: str
    score: str
    accuracy: float
    standard_error: float
    n: int
    version: str


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    batch: int = 16,
    seed: int = 0,
) -> tuple[TaskScore, ...]:
    """A causal language model's scores on tasks of the harness.

    Args:
        model: a Hugging Face model, or one of ours.
        tokenizer: the model's.
        tasks: names that the harness knows, or YAML files of tasks.
        limit: documents of each task, from its beginning; None for all.
        batch: requests per forward.
        seed: of the harness's draws.

    Raises:
        TaskError: TASK-001 where the harness is not installed, does not know a task, cannot have its data, or gives no
            accuracy for it.
    """
    known = check_tasks(tasks)
    evaluator, hflm = _harness("lm_eval.evaluator"), _harness("lm_eval.models.huggingface").HFLM
    try:
        found = evaluator.simple_evaluate(
            model=hflm(pretrained=model, tokenizer=tokenizer, batch_size=batch),
            tasks=list(tasks),
            task_manager=known,
            limit=limit,
            log_samples=False,
            bootstrap_iters=0,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise TaskError(
            "TASK-001",
            f"lm_eval could not run {', '.join(tasks)}.",
            why=f"{type(error).__name__}: {str(error).strip()}".splitlines()[0],
            fix="the data of a task must be on this machine, or be had from where it runs.",
        ) from error
    return tuple(_score(name, values, found) for name, values in found["results"].items())


def check_tasks(tasks: Sequence[str]) -> Any:
    """The harness's task manager, where it knows all of the tasks.

    Args:
        tasks: names, or YAML files of tasks.

    Raises:
        TaskError: TASK-001 where the harness is not installed, or does not know a task.
    """
    known = _harness("lm_eval.tasks").TaskManager()
    for task in tasks:
        if not _is_file(task) and task not in known.all_tasks:
            raise TaskError(
                "TASK-001",
                f"lm_eval knows no task {task!r}.",
                fix="list them with `lm_eval ls tasks`, or give a YAML file.",
            )
    return known


def write_task(questions: Questions, folder: str | os.PathLike[str], *, name: str = "") -> Path:
    """Questions as a task of the harness: a YAML file beside its data. Returns the YAML file's path.

    Args:
        questions: see `skink.evaluation.questions`.
        folder: made where it does not exist.
        name: of the task; the kind with `skink_` before it by default.
    """
    name = name or f"skink_{questions.kind.replace('-', '_')}"
    root = Path(folder).resolve()
    root.mkdir(parents=True, exist_ok=True)
    data = root / f"{name}.jsonl"
    lines = [
        json.dumps({"context": item.context, "choices": list(item.choices), "answer": item.answer})
        for item in questions.items
    ]
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")
    content = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        # Each choice begins with the line break that follows the context.
        "target_delimiter": "",
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
        ],
        "metadata": {"version": 1.0},
    }
    path = root / f"{name}.yaml"
    # JSON is YAML.
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return path


def _harness(module: str) -> Any:
    """A module of the harness."""
    try:
        return import_module(module)
    except ImportError as error:
        missing = getattr(error, "name", "") or ""
        raise TaskError(
            "TASK-001",
            "lm_eval is not installed, and --tasks needs it.",
            why="" if missing.partition(".")[0] == "lm_eval" else f"{type(error).__name__}: {error}",
            fix="pip install lm_eval.",
        ) from error


def _is_file(task: str) -> bool:
    return task.endswith((".yaml", ".yml")) and Path(task).is_file()


def _score(name: str, values: dict[str, Any], found: dict[str, Any]) -> TaskScore:
    # The harness names a number with the filter that it went through: "acc,none".
    numbers = {key.partition(",")[0]: value for key, value in values.items() if isinstance(value, int | float)}
    score = next((score for score in _SCORES if score in numbers), None)
    if score is None:
        raise TaskError(
            "TASK-001",
            f"the task {name!r} gives no accuracy.",
            why=f"it gives {', '.join(numbers) or 'nothing'}.",
            fix=f"choose tasks with one of {', '.join(_SCORES)}.",
        )
    counts = found.get("n-samples", {}).get(name, {})
    return TaskScore(
        name=name,
        score=score,
        accuracy=float(numbers[score]),
        standard_error=float(numbers.get(f"{score}_stderr", math.nan)),
        n=int(counts.get("effective", 0)),
        version=str(found.get("versions", {}).get(name, "")),
    )
