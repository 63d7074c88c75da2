"""Tokens as people keep them become windows, without needless copies; what cannot be tokens is refused."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from skink.compression.token_arrays import array_windows, checked, read_tokens
from skink.errors import InputError, RecoveryError
from skink.graph.windows import Windows


def cut(*arrays: np.ndarray, length: int = 4, tokens: int | None = None, longest: int | None = None, seed: int = 0):
    return array_windows(arrays, "ids", length=length, tokens=tokens, longest=longest, seed=seed)


def test_one_text_is_cut_and_its_end_left_out() -> None:
    windows = cut(np.arange(11))
    assert windows.tokens.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert windows.source == "ids"


def test_windows_keep_their_width() -> None:
    assert cut(np.arange(12).reshape(2, 6)).tokens.tolist() == [[*range(6)], [*range(6, 12)]]


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", ">u2", "int32", "uint32", ">i8", "uint64"])
def test_integers_of_any_width_become_int64(dtype: str) -> None:
    windows = cut(np.arange(8).astype(dtype))
    assert windows.tokens.dtype == torch.int64
    assert windows.tokens.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_a_part_is_a_sample_of_whole_windows_by_the_seed() -> None:
    array = np.arange(400)
    one, again, other = (cut(array, tokens=37, seed=seed).tokens for seed in (0, 0, 1))
    assert one.shape == (10, 4)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    starts = one[:, 0]
    assert (starts % 4 == 0).all()
    assert (starts.diff() > 0).all()
    assert int(starts[-1]) > 200
    assert torch.equal(one, starts[:, None] + torch.arange(4))
    assert cut(array, tokens=1000).tokens.shape == (100, 4)


def test_several_arrays_are_one_after_another_and_sampled_together() -> None:
    arrays = np.arange(10), np.arange(100, 109)
    assert cut(*arrays).tokens[:, 0].tolist() == [0, 4, 100, 104]
    seen = {tuple(cut(*arrays, tokens=8, seed=seed).tokens[:, 0].tolist()) for seed in range(40)}
    assert {(0, 100), (4, 104), (0, 4), (100, 104)} <= seen


@pytest.mark.parametrize("name", ["tokens.npy", "tokens.bin"])
def test_files_of_int64_stay_where_they_are(name: str, tmp_path: Path) -> None:
    array = np.arange(64)
    if name == "tokens.npy":
        np.save(tmp_path / name, array)
    else:
        array.tofile(tmp_path / name)
    mapped = read_tokens(tmp_path / name, "int64")
    windows = cut(mapped)
    assert windows.tokens.shape == (16, 4)
    assert isinstance(mapped, np.memmap)
    assert np.shares_memory(windows.tokens.numpy(), mapped)


def test_a_file_of_integers_is_told_its_dtype_or_has_it_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "tokens.bin"
    np.arange(6, dtype=np.uint16).tofile(path)
    assert read_tokens(path, "uint16").tolist() == [*range(6)]
    with pytest.raises(RecoveryError, match=r"\[RECOVER-008\] 'tokens.bin' .* nothing says of which dtype") as caught:
        read_tokens(path, None)
    assert 'tokens.json with {"dtype": "uint16"}' in caught.value.fix
    (tmp_path / "tokens.json").write_text(json.dumps({"dtype": "uint16"}))
    assert read_tokens(path, None).tolist() == [*range(6)]
    with pytest.raises(RecoveryError, match="'float32' is none that is read"):
        read_tokens(path, "float32")


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "odd.bin").write_bytes(b"123")
    with pytest.raises(RecoveryError, match="3 bytes, which are no whole number of uint16"):
        read_tokens(tmp_path / "odd.bin", "uint16")
    (tmp_path / "odd.json").write_text("{")
    (tmp_path / "text.npy").write_text("text")
    np.save(tmp_path / "objects.npy", np.array([{}]))
    for name in ("odd.bin", "text.npy", "objects.npy", "none.npy", "none.bin"):
        with pytest.raises((InputError, RecoveryError)) as caught:
            read_tokens(tmp_path / name, None)
        assert caught.value.code == ("RECOVER-008" if name == "none.bin" else "INPUT-001")
    with pytest.raises(InputError, match=r"\[INPUT-001\] .*none.bin' cannot be read as token ids"):
        read_tokens(tmp_path / "none.bin", "uint16")


@pytest.mark.parametrize(
    ("array", "what"),
    [
        (np.ones(20), r"float64\[20\], which are no token ids"),
        (np.ones(20, dtype=bool), r"bool\[20\], which are no token ids"),
        (np.ones((2, 2, 4), dtype=int), r"int64\[2, 2, 4\], which are no token ids"),
        (np.array(["a", "b"]), r"\[2\], which are no token ids"),
        (np.arange(3), "ids gives 3 tokens, and one window needs 4"),
        (np.empty((0, 4), dtype=int), "ids gives 0 tokens"),
        (np.ones((9, 1), dtype=int), "ids gives 9 tokens"),
        (np.ones((2, 9), dtype=int), "windows of 9 tokens in ids, and the model reads 8 at most"),
    ],
)
def test_what_is_no_text_is_refused(array: np.ndarray, what: str) -> None:
    with pytest.raises(RecoveryError, match=what) as caught:
        cut(array, longest=8)
    assert caught.value.code == "RECOVER-008"


def test_windows_of_two_widths_are_refused() -> None:
    with pytest.raises(RecoveryError, match="windows of 4 and of 5 tokens"):
        cut(np.arange(8), np.ones((2, 5), dtype=int))


def test_the_hash_is_of_shape_tokens_and_padding() -> None:
    tokens = torch.arange(12).view(3, 4)
    padding = torch.ones_like(tokens)
    padding[0, 3] = 0
    digest = checked(Windows(tokens), longest=None, vocabulary=None).sha256
    assert digest == hashlib.sha256(b"[3, 4]" + tokens.numpy().tobytes()).hexdigest()
    others = [Windows(tokens.view(4, 3)), Windows(tokens + 1), Windows(tokens, padding=padding)]
    assert len({digest, *(checked(windows, longest=None, vocabulary=None).sha256 for windows in others)}) == 4
    assert checked(Windows(tokens, "s", "known"), longest=None, vocabulary=None).sha256 == "known"


@pytest.mark.parametrize(
    ("windows", "what"),
    [
        (Windows(torch.ones(2, 4)), r"these are float32\[2, 4\]"),
        (Windows(torch.ones(4, dtype=torch.int64)), r"these are int64\[4\]"),
        (Windows(torch.ones(2, 4, dtype=torch.int32)), r"these are int32\[2, 4\]"),
        (Windows(torch.ones(0, 4, dtype=torch.int64)), r"these are int64\[0, 4\]"),
        (Windows(torch.ones(2, 1, dtype=torch.int64)), r"these are int64\[2, 1\]"),
        (Windows(torch.ones(2, 9, dtype=torch.int64)), "windows of 9 tokens, and the model reads 8 at most"),
        (Windows(torch.ones(2, 4, dtype=torch.int64), padding=torch.ones(2, 3)), r"padding of shape \[2, 3\]"),
        (Windows(torch.full((2, 4), 50)), "training tokens run from 50 to 50, and the model knows 0 to 49"),
        (Windows(torch.tensor([[1, 2], [3, -1]])), "training tokens run from -1 to 3, and the model knows 0 to 49"),
    ],
)
def test_windows_that_cannot_be_trained_on_are_refused(windows: Windows, what: str) -> None:
    with pytest.raises(RecoveryError, match=what) as caught:
        checked(windows, longest=8, vocabulary=50)
    assert caught.value.code == "RECOVER-008"


def test_the_place_of_an_unknown_token_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skink.compression.token_arrays._ROWS", 8)
    tokens = torch.zeros(9, 4, dtype=torch.int64)
    tokens[7, 2] = 60
    with pytest.raises(RecoveryError) as caught:
        checked(Windows(tokens), longest=None, vocabulary=50)
    assert caught.value.where == "window 7, token 2: 60"
