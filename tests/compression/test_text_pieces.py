"""Pieces of text: every character once, whatever the order, and no more read than is asked for."""

import json
from pathlib import Path

import pytest
import torch

from skink.compression import text_pieces
from skink.compression.text_pieces import DocumentShelf, FileShelf, Piece, file_shelves, row_piece, rows, shuffled
from skink.errors import InputError, RecoveryError
from skink.evaluation import Documents


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_pieces, "_BLOCK", 64)


def in_order(shelf: text_pieces.Shelf) -> list[Piece]:
    return [piece for place in range(len(shelf)) for piece in shelf.read(place)]


def contents(pieces: list[Piece]) -> list[str]:
    return [str(piece.content) for piece in pieces]


TEXTS = {
    "lines": "".join(f"line {number}\n" for number in range(200)),
    "one line": "a" * 1000,
    "wide characters": "äöü€𝄞" * 100,
    "some of both": ("x" * 70 + "\n") * 20 + "y" * 300,
    "empty lines": "\n" * 500,
}


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("kind", ["documents", "file"])
def test_the_pieces_of_a_text_are_the_text(name: str, kind: str, tmp_path: Path) -> None:
    text = "begin\n" + TEXTS[name]
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    shelf = DocumentShelf(Documents("d", (text,))) if kind == "documents" else FileShelf(tmp_path / "text.txt")
    pieces = in_order(shelf)
    assert "".join(contents(pieces)) == text
    assert [piece.begins for piece in pieces] == [True] + [False] * (len(pieces) - 1)
    assert [piece.ends for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert max(len(content) for content in contents(pieces)) <= 64 + 71


@pytest.mark.parametrize("kind", ["documents", "file"])
def test_pieces_end_where_lines_do(kind: str, tmp_path: Path) -> None:
    text = "ab\n" * 400
    (tmp_path / "text.txt").write_text(text)
    shelf = DocumentShelf(Documents("d", (text,))) if kind == "documents" else FileShelf(tmp_path / "text.txt")
    pieces = contents(in_order(shelf))
    assert len(pieces) == 19
    assert all(piece.endswith("\n") for piece in pieces)


def test_blank_documents_are_left_out() -> None:
    assert contents(in_order(DocumentShelf(Documents("d", ("a", " \n", "", "b"))))) == ["a", "b"]


def test_line_ends_and_a_byte_order_mark_are_read_as_text_is(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    assert contents(in_order(FileShelf(tmp_path / "text.txt"))) == ["one\ntwo\nthree\n"]


@pytest.mark.parametrize("lengths", [[5], [63, 64, 65], [1, 400, 3, 3, 3, 80], [200, 200], list(range(1, 60))])
def test_each_line_of_a_jsonl_file_is_read_once(lengths: list[int], tmp_path: Path) -> None:
    texts = [str(number) + "é" * length for number, length in enumerate(lengths)]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    (tmp_path / "text.jsonl").write_text("\n".join(lines), encoding="utf-8")
    pieces = in_order(FileShelf(tmp_path / "text.jsonl"))
    assert contents(pieces) == texts
    assert all(piece.begins and piece.ends for piece in pieces)
    (tmp_path / "text.jsonl").write_text("\n\n".join(lines) + "\n\n", encoding="utf-8")
    assert contents(in_order(FileShelf(tmp_path / "text.jsonl"))) == texts


def test_the_order_follows_from_the_seed_and_takes_all() -> None:
    shelves = [DocumentShelf(Documents("a", tuple("abc"))), DocumentShelf(Documents("b", tuple("defgh")))]
    first, again, other = (contents(list(shuffled(shelves, seed))) for seed in (0, 0, 1))
    assert first == again != other
    assert sorted(first) == sorted(other) == list("abcdefgh")
    assert list(shuffled([], 0)) == []


def test_files_are_read_when_they_are_wanted(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("fine")
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9 au lait")
    shelves = [FileShelf(tmp_path / "good.txt"), FileShelf(tmp_path / "bad.txt")]
    seed = next(seed for seed in range(20) if torch.randperm(2, generator=torch.Generator().manual_seed(seed))[0] == 0)
    pieces = shuffled(shelves, seed)
    assert next(pieces).content == "fine"
    with pytest.raises(InputError, match=r"\[INPUT-001\] .* cannot be read as text") as caught:
        next(pieces)
    assert "0xe9" in caught.value.why


def test_of_a_folder_the_text_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "a.txt").write_text("one")
    (tmp_path / "b.py").write_text("two")
    (tmp_path / "c.jsonl").write_text('{"text": "three"}\n')
    (tmp_path / "d.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    (tmp_path / "e.txt").write_bytes(b"caf\xe9 au lait")
    (tmp_path / "f.dat").write_bytes(b"one\0two")
    (tmp_path / ".hidden").write_text("four")
    (tmp_path / "empty.txt").write_text("")
    pieces = [piece for shelf in file_shelves(tmp_path, None) for piece in in_order(shelf)]
    assert contents(pieces) == ["two", "one", "three"]


@pytest.mark.parametrize(
    ("line", "code", "what"),
    [
        ('{"text": "fine"}\n{"text": ', "INPUT-001", "line at byte 17 is not JSON"),
        ('{"words": "x"}', "RECOVER-008", "no field 'text' or 'input_ids': it has 'words'"),
        ('{"text": 5.5}', "RECOVER-008", "neither text nor a list of token ids: it is float64[]"),
        ('["a"]', "RECOVER-008", "neither text nor a list of token ids: it is list"),
        ("x" * 300, "INPUT-001", "not JSON"),
    ],
)
def test_lines_that_cannot_be_used(line: str, code: str, what: str, tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text(line)
    with pytest.raises((InputError, RecoveryError)) as caught:
        in_order(FileShelf(tmp_path / "text.jsonl"))
    assert caught.value.code == code
    assert what in caught.value.what + caught.value.why


def test_a_line_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_pieces, "_LONGEST_LINE", 1 << 20)
    (tmp_path / "text.jsonl").write_text("[" + "1," * (1 << 20))
    with pytest.raises(InputError, match="cannot be read") as caught:
        in_order(FileShelf(tmp_path / "text.jsonl"))
    assert "a line of more than 1 MiB" in caught.value.why


@pytest.mark.parametrize("name", ["data.parquet", "data.jsonl.gz"])
def test_packed_files_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"PAR1")
    with pytest.raises(RecoveryError, match=r"\[RECOVER-008\] .* is packed") as caught:
        file_shelves(tmp_path / name, None)
    assert "load_dataset" in caught.value.fix


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"\[INPUT-001\]"):
        file_shelves(tmp_path / "none.txt", None)


def test_rows_are_text_token_ids_or_mappings_with_one() -> None:
    given = ["a", {"text": "b", "input_ids": [9]}, {"text": None}, {"text": " "}, [1, 2], {"input_ids": [3], "x": 1}]
    pieces = list(rows(given, None))
    assert [piece.content if isinstance(piece.content, str) else piece.content.tolist() for piece in pieces] == (
        ["a", "b", [1, 2], [3]]
    )
    (named,) = row_piece({"body": "c", "text": "d"}, "body", "row 0")
    assert named.content == "c"


def test_padding_beside_token_ids_is_left_out() -> None:
    (piece,) = row_piece({"input_ids": [0, 0, 5, 6], "attention_mask": [0, 0, 1, 1]}, None, "row 0")
    assert not isinstance(piece.content, str)
    assert piece.content.tolist() == [5, 6]


@pytest.mark.parametrize("value", [1.5, [1.5, 2.0], [[1, 2]], [True, False], ["a"]])
def test_rows_that_are_neither_are_refused(value: object) -> None:
    with pytest.raises(RecoveryError, match=r"neither text nor a list of token ids") as caught:
        list(rows(["fine", {"text": value}], None))
    assert caught.value.where == "row 1"
