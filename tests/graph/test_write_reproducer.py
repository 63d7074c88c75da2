"""What a failure leaves behind, and what leaves nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from skink.errors import OptionError, RewriteError, VerifyError
from skink.graph import write_reproducer
from skink.graph.failure import Failure
from skink.graph.pipeline import Pipeline
from skink.graph.reproducer import read_reproducer
from skink.graph.windows import Windows
from skink.passes.canonicalize import Canonicalize
from skink.passes.decompose import LowRank
from tests.graph.reproducers import PADDING, PASSES, WINDOWS, fail
from tests.graph.scaling import Scale
from tests.programs import captured


def test_a_failure_in_the_first_pass_needs_one_program(tmp_path: Path, set_environment: Any) -> None:
    folder = fail(Pipeline((Scale(factors=(3.0,)),)), captured("llama"), tmp_path, set_environment)
    assert not (folder / "before.json").exists()
    found = read_reproducer(folder)
    assert str(found.before) == str(found.start)


def test_any_exception_of_a_pass_leaves_a_folder(tmp_path: Path, set_environment: Any) -> None:
    set_environment(SKINK_DUMP=str(tmp_path))
    with pytest.raises(ZeroDivisionError) as caught:
        Pipeline((Scale(factors=(1.0, 0.0)),)).run(captured("llama"))
    assert "skink bisect" in caught.value.__notes__[-1]
    found = read_reproducer(tmp_path / "reproducer_00_scale")
    assert found.failure == Failure("ZeroDivisionError", "", "scale", "ZeroDivisionError: a factor of zero")


def test_what_a_user_can_mend_leaves_nothing(tmp_path: Path, set_environment: Any) -> None:
    set_environment(SKINK_DUMP=str(tmp_path / "dumps"))
    pipeline = Pipeline((Canonicalize(), LowRank(targets=("nothing.*",), method="plain")))
    with pytest.raises(OptionError) as caught:
        pipeline.run(captured("llama"))
    assert "bisect" not in caught.value.fix
    assert not list((tmp_path / "dumps").glob("reproducer*"))


def test_folders_do_not_overwrite_each_other(tmp_path: Path, set_environment: Any) -> None:
    set_environment(SKINK_DUMP=str(tmp_path))
    for _ in range(3):
        with pytest.raises(VerifyError):
            Pipeline((Scale(factors=(3.0,)),)).run(captured("llama"))
    names = [f"reproducer_00_scale{suffix}" for suffix in ("", "_2", "_3")]
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == names


def test_without_a_dump_folder_it_is_left_among_temporary_files() -> None:
    with pytest.raises(VerifyError) as caught:
        Pipeline((Scale(factors=(3.0,)),)).run(captured("llama"))
    assert "skink_reproducer_00_scale_" in caught.value.fix


def test_large_weights_are_left_out_and_the_folder_says_so(
    tmp_path: Path, set_environment: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write_reproducer, "WEIGHTS_LIMIT", 1000)
    folder = fail(Pipeline(PASSES), captured("llama"), tmp_path, set_environment)
    assert [path.name for path in folder.glob("*.safetensors")] == ["calibration.safetensors"]
    assert "The weights are not in here" in (folder / "README.txt").read_text()
    found = read_reproducer(folder)
    assert not found.weights
    assert found.start.is_meta
    assert found.before.is_meta


def test_a_folder_that_cannot_be_written_hides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> Path:
        raise OSError("No space left")

    monkeypatch.setattr("skink.graph.pipeline.write_reproducer", full)
    with pytest.raises(VerifyError, match="VERIFY-002") as caught:
        Pipeline((Scale(factors=(3.0,)),)).run(captured("llama"))
    assert caught.value.fix.endswith("No reproducer could be written: OSError: No space left")


@pytest.mark.parametrize("error", [OSError("No space left"), KeyboardInterrupt()])
def test_half_a_folder_is_not_left(
    tmp_path: Path, set_environment: Any, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr("skink.graph.write_reproducer.versions", full)
    set_environment(SKINK_DUMP=str(tmp_path))
    with pytest.raises((VerifyError, KeyboardInterrupt)):
        Pipeline((Scale(factors=(3.0,)),)).run(captured("llama"))
    assert not list(tmp_path.glob("reproducer*"))


def test_advice_of_other_errors_is_kept(tmp_path: Path, set_environment: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(*_: object) -> None:
        raise RewriteError("REWRITE-001", "without end.", fix="let one refuse.")

    set_environment(SKINK_DUMP=str(tmp_path))
    monkeypatch.setattr(Scale, "run", endless)
    with pytest.raises(RewriteError) as caught:
        Pipeline((Scale(),)).run(captured("llama"))
    assert caught.value.fix.startswith("let one refuse. `skink bisect ")


def test_text_to_train_on_comes_along(tmp_path: Path, set_environment: Callable[..., None]) -> None:
    set_environment(SKINK_DUMP=str(tmp_path))
    training = Windows(WINDOWS, "a text", "12", PADDING)
    with pytest.raises(VerifyError):
        Pipeline(PASSES).run(captured("llama"), calibration=WINDOWS, training=training, held_out=Windows(WINDOWS[:1]))
    (left,) = (path for path in tmp_path.iterdir() if path.is_dir())
    at = read_reproducer(left).circumstances
    assert at.training is not None
    assert at.held_out is not None
    assert (at.training.source, at.training.sha256) == ("a text", "12")
    assert torch.equal(at.training.tokens, WINDOWS)
    assert torch.equal(at.training.padding, PADDING)
    assert torch.equal(at.held_out.tokens, WINDOWS[:1])
    assert at.held_out.padding is None
    # Whoever sends the folder on should know of it.
    assert "the tokens of all given text are in here" in (left / "README.txt").read_text()


def test_text_that_is_too_large_is_left_out(tmp_path: Path, set_environment: Callable[..., None]) -> None:
    set_environment(SKINK_DUMP=str(tmp_path))
    large = Windows(torch.zeros(1, dtype=torch.int64).expand(2**30, 8))
    with pytest.raises(VerifyError):
        Pipeline(PASSES).run(captured("llama"), calibration=WINDOWS, training=large)
    (left,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert read_reproducer(left).circumstances.training is None
