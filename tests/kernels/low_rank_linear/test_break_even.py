"""Measured times: what is measured, how it is kept, that damaged files do no harm. Sizes of times are not looked at."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from skink.kernels.low_rank_linear import break_even
from skink.kernels.low_rank_linear.break_even import forget, measured_forms, measured_seconds

SHAPE = (1, 24, 16)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, set_environment: Callable[..., None]) -> Path:
    set_environment(SKINK_CACHE=str(tmp_path / "times"))
    forget()
    return tmp_path / "times"


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was measured; every measuring takes a second longer than the one before."""
    shapes: list[Any] = []

    def measure(shape: Any, *_: Any) -> dict[str, float]:
        shapes.append(shape)
        seconds = float(len(shapes))
        return {"products": seconds + 0.5, "fused": seconds} if shape[3] else {"dense": seconds}

    monkeypatch.setattr(break_even, "_measure", measure)
    return shapes


def test_the_forms_of_a_layer(set_environment: Callable[..., None], folder: Path) -> None:
    assert set(measured_forms(*SHAPE, None, torch.float32)) == {"dense"}
    found = measured_forms(*SHAPE, 3, torch.bfloat16)
    assert {"products"} <= set(found) <= {"products", "fused"}
    assert measured_seconds(*SHAPE, 3, torch.bfloat16) == min(found.values()) > 0
    set_environment(SKINK_KERNELS="reference", SKINK_CACHE=str(folder))
    assert set(measured_forms(*SHAPE, 3, torch.bfloat16)) == {"products"}


def test_pivoted_forms_have_times_of_their_own(folder: Path, measured: list[Any]) -> None:
    assert measured_seconds(*SHAPE, 3, torch.float32) == 1.0
    assert measured_seconds(*SHAPE, 3, torch.float32, pivoted=True) == 2.0
    # Of a dense layer there is one form.
    assert measured_seconds(*SHAPE, None, torch.float32) == 3.0
    assert measured_seconds(*SHAPE, None, torch.float32, pivoted=True) == 3.0
    forget()
    assert measured_seconds(*SHAPE, 3, torch.float32, pivoted=True) == 2.0
    assert len(measured) == 3


def test_what_is_timed_of_pivoted_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(
        break_even,
        "pivoted_products",
        lambda x, kept, rest, order: calls.append((x.shape, kept.shape, rest.shape, sorted(order.tolist()))),
    )
    assert {"products"} <= set(measured_forms(2, 6, 5, 2, torch.float32, pivoted=True)) <= {"products", "fused"}
    assert calls[0] == ((2, 5), (2, 5), (4, 2), [0, 1, 2, 3, 4, 5])


def test_each_shape_is_measured_once(measured: list[Any]) -> None:
    for _ in range(2):
        assert measured_seconds(*SHAPE, None, torch.float32) == 1.0
        assert measured_seconds(*SHAPE, 3, torch.float32) == 2.0
        assert measured_seconds(2, 24, 16, 3, torch.float32) == 3.0
        assert measured_seconds(*SHAPE, 3, torch.float16, torch.device("cpu")) == 4.0
        assert measured_seconds(*SHAPE, 3, torch.float16, "meta") == 4.0
    assert len(measured) == 4


def test_threads_and_kernels_have_times_of_their_own(
    monkeypatch: pytest.MonkeyPatch, measured: list[Any], folder: Path
) -> None:
    assert measured_seconds(*SHAPE, 3, torch.float32) == 1.0
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    assert measured_seconds(*SHAPE, 3, torch.float32) == 2.0
    assert sorted("7 threads" in path.read_text() for path in folder.iterdir()) == [False, True]


def test_another_process_finds_them(measured: list[Any]) -> None:
    assert measured_seconds(*SHAPE, 3, torch.float32) == 1.0
    forget()
    assert measured_seconds(*SHAPE, 3, torch.float32) == 1.0
    assert dict(measured_forms(*SHAPE, 3, torch.float32)) == {"products": 1.5, "fused": 1.0}
    assert len(measured) == 1


def test_what_others_wrote_meanwhile_is_kept(measured: list[Any], folder: Path) -> None:
    measured_seconds(*SHAPE, 3, torch.float32)
    (path,) = folder.iterdir()
    data = json.loads(path.read_text())
    data["seconds"]["1,2,3,0,float32,cpu"] = {"dense": 9.0}
    path.write_text(json.dumps(data))
    measured_seconds(*SHAPE, 4, torch.float32)
    forget()
    assert measured_seconds(1, 2, 3, None, torch.float32) == 9.0
    assert len(measured) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: '"text"',
        lambda text: text.replace('"seconds"', '"minutes"'),
        lambda text: text.replace("1.0", '"much"'),
        lambda text: text.replace("1.0", "-1.0"),
        lambda text: text.replace("1.0", "NaN"),
        lambda text: text.replace("threads", "spools"),
    ],
)
def test_damaged_files_are_measured_anew(damage: Callable[[str], str], measured: list[Any], folder: Path) -> None:
    measured_seconds(*SHAPE, 3, torch.float32)
    (path,) = folder.iterdir()
    path.write_text(damage(path.read_text()))
    forget()
    assert measured_seconds(*SHAPE, 3, torch.float32) == 2.0
    assert json.loads(path.read_text())["seconds"]["1,24,16,3,float32,cpu"]["fused"] == 2.0


def test_writers_at_once_leave_a_whole_file(measured: list[Any], folder: Path) -> None:
    threads = [threading.Thread(target=measured_seconds, args=(rows, 24, 16, 3, torch.float32)) for rows in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (path,) = folder.iterdir()
    assert json.loads(path.read_text())["seconds"]


def test_without_a_folder_to_write_to(
    measured: list[Any], set_environment: Callable[..., None], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    set_environment(SKINK_CACHE=str(tmp_path / "file" / "below"))
    for _ in range(2):
        assert measured_seconds(*SHAPE, 3, torch.float32) == 1.0
