"""Reproducers: what is written, what is read back, and folders from hostile or clumsy hands."""

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from skink.errors import ReproducerError
from skink.graph.capture import capture
from skink.graph.failure import Failure
from skink.graph.pipeline import Pipeline
from skink.graph.program import Stage
from skink.graph.reproducer import Circumstances, Reproducer, read_reproducer
from skink.graph.write_reproducer import write_reproducer
from skink.settings import settings
from tests.graph.reproducers import PADDING, PASSES, WINDOWS, fail
from tests.graph.scaling import Scale
from tests.programs import batch, captured

TENSORS = tuple(batch(2, 5))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that a failure left; whoever changes it takes a copy."""
    with pytest.MonkeyPatch.context() as patch:

        def set_variables(**variables: str) -> None:
            for name, value in variables.items():
                patch.setenv(name, value)
            settings.cache_clear()

        folder = fail(Pipeline(PASSES), captured("llama"), tmp_path_factory.mktemp("dumps"), set_variables)
    settings.cache_clear()
    return folder


@pytest.fixture
def left(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / original.name))


def test_everything_that_a_run_needs_is_there(left: Path) -> None:
    assert left.name == "reproducer_02_scale"
    kept = {path.name for path in left.iterdir()}
    assert kept == {
        *("reproducer.json", "pipeline.txt", "start.json", "start.safetensors", "before.json", "before.safetensors"),
        *("calibration.safetensors", "edits.jsonl", "program.txt", "error.txt", "versions.json", "README.txt"),
    }
    assert (left / "pipeline.txt").read_text().startswith("canonicalize, low-rank{keep=0.5,targets=[")
    error = (left / "error.txt").read_text()
    assert error.startswith("[VERIFY-002] pass scale calls itself exact")
    assert "Traceback" in error
    assert "skink bisect ." in (left / "README.txt").read_text()
    assert (left / "program.txt").read_text().startswith("program rewritten(")


def test_what_is_read_back_is_what_failed(left: Path) -> None:
    found = read_reproducer(left)
    at = found.circumstances
    assert found.failure == Failure("VerifyError", "VERIFY-002", "scale", found.failure.text)
    assert (at.pipeline, at.index, at.seed, at.verify, at.limit) == (str(Pipeline(PASSES)), 2, 5, 2, None)
    assert torch.equal(at.calibration, WINDOWS)
    assert torch.equal(at.padding, PADDING)
    assert found.versions["torch"] == str(torch.__version__)
    assert {"python", "tests"} <= set(found.versions)
    assert found.weights
    program = captured("llama")
    assert str(found.start) == str(program)
    assert found.start.edits == []
    torch.testing.assert_close(found.start(*TENSORS), program(*TENSORS), rtol=0, atol=0)
    Pipeline(PASSES[:2]).run(program, calibration=WINDOWS, padding=PADDING, seed=5)
    assert str(found.before) == str(program)
    assert found.before.stage is Stage.REWRITTEN
    assert found.before.edits == program.edits
    torch.testing.assert_close(found.before(*TENSORS), program(*TENSORS), rtol=0, atol=0)


def test_what_is_read_back_fails_in_the_same_way_from_both_ends(left: Path) -> None:
    found = read_reproducer(left)
    at = found.circumstances
    again = Pipeline(PASSES).attempt(
        found.start, calibration=at.calibration, padding=at.padding, seed=at.seed, verify=at.verify
    )
    assert found.failure.same(again.failure)
    local = Pipeline(PASSES[2:]).attempt(found.before, seed=at.seed, verify=at.verify)
    assert found.failure.same(local.failure)
    assert found.failure.text == again.failure.text


def change(name: str, edit: Callable[[Any], Any]) -> Callable[[Path], None]:
    """Edits the JSON of one file."""

    def apply(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(edit(content)))

    return apply


def without(key: str) -> Callable[[Any], Any]:
    return lambda content: {name: value for name, value in content.items() if name != key}


def hostile_operator(content: Any) -> Any:
    call = next(node for node in content["nodes"] if node["op"] == "call_function")
    call["target"] = "os.system"
    return content


def huge(folder: Path) -> None:
    (folder / "start.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{}")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: shutil.rmtree(folder), "FileNotFoundError"),
        (lambda folder: (folder / "reproducer.json").write_text("{"), "JSONDecodeError"),
        (lambda folder: (folder / "reproducer.json").write_text("[]"), "reproducer.json is no object"),
        (lambda folder: (folder / "reproducer.json").write_text("[" * 100_000), "RecursionError"),
        (lambda folder: (folder / "reproducer.json").write_bytes(b"\xff\xfe"), "UnicodeDecodeError"),
        (
            change("reproducer.json", lambda content: content | {"format": 9}),
            "of format 9, and this Skink reads format 1",
        ),
        (change("reproducer.json", without("seed")), "KeyError: 'seed'"),
        (change("reproducer.json", lambda content: content | {"seed": "5"}), "'5' is no whole number"),
        (change("reproducer.json", lambda content: content | {"seed": 2**80}), "is no whole number of 64 bits"),
        (change("reproducer.json", lambda content: content | {"index": True}), "True is no whole number"),
        (change("reproducer.json", lambda content: content | {"failure": "x"}), "TypeError"),
        (change("reproducer.json", lambda content: content | {"start": "begun"}), "KeyError: 'BEGUN'"),
        (change("versions.json", lambda content: {"torch": 2}), "2 is no text"),
        (lambda folder: (folder / "pipeline.txt").unlink(), "FileNotFoundError"),
        (change("start.json", hostile_operator), "'os.system' is not allowed"),
        (change("start.json", without("nodes")), "this is not a graph that Skink wrote"),
        (lambda folder: (folder / "start.safetensors").unlink(), "FileNotFoundError"),
        (lambda folder: (folder / "start.safetensors").write_bytes(b"12"), "SafetensorError"),
        (huge, "SafetensorError"),
        (lambda folder: save_file({"a": torch.ones(1)}, folder / "start.safetensors"), "which is not in the folder"),
        (lambda folder: save_file({"a": torch.ones(1)}, folder / "calibration.safetensors"), "KeyError: 'tokens'"),
        (lambda folder: (folder / "edits.jsonl").write_text('{"rule": 3}\n'), "KeyError"),
        (lambda folder: (folder / "before.json").write_text("null"), "NoneType"),
    ],
)
def test_damaged_and_hostile_folders_are_refused(left: Path, damage: Callable[[Path], None], reason: str) -> None:
    damage(left)
    with pytest.raises(ReproducerError, match=r"\[REPRO-001\] '.*' is no reproducer that can be read") as caught:
        read_reproducer(left)
    assert reason in caught.value.why
    assert "reproducer.json in it, copied whole" in caught.value.fix


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a small program, to be spoiled often."""
    pipeline, program = Pipeline((Scale(factors=(3.0,)),)), capture(nn.Linear(4, 4), (torch.zeros(2, 4),))
    done = pipeline.attempt(program)
    at = Circumstances(str(pipeline), (), Stage.CAPTURED, 0, 0, 2, None, None)
    return write_reproducer(
        tmp_path_factory.mktemp("small"),
        done.error,
        done.failure,
        at,
        done.start,
        done.before,  # type: ignore[arg-type]
    )


@given(data=st.data())
@hypothesis.settings(max_examples=150)
def test_a_folder_with_anything_changed_is_read_or_refused(small: Path, data: st.DataObject) -> None:
    names = sorted(path.name for path in small.iterdir() if path.suffix != ".txt" or path.name == "pipeline.txt")
    path = small / data.draw(st.sampled_from(names))
    original = path.read_bytes()
    begin = data.draw(st.integers(0, len(original)))
    end = data.draw(st.integers(begin, min(begin + 20, len(original))))
    put = data.draw(st.binary(max_size=8) | st.sampled_from([b"null", b"-1", b'""', b"[]", b"{}", b"1e999", b"9" * 30]))
    try:
        path.write_bytes(original[:begin] + put + original[end:])
        with contextlib.suppress(ReproducerError):
            read_reproducer(small)
    finally:
        path.write_bytes(original)


def test_nothing_in_a_folder_is_a_pickle(left: Path) -> None:
    kept = {path.suffix for path in left.iterdir()}
    assert kept == {".txt", ".json", ".jsonl", ".safetensors"}
    assert isinstance(read_reproducer(left), Reproducer)


def test_a_folder_from_before_there_was_training_is_read(original: Path, tmp_path: Path) -> None:
    assert read_reproducer(original).circumstances.training is None
