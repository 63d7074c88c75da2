"""Text to train on: every form gives windows, equal arguments equal ones, and no more is read than is wanted."""

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import skink
from skink.compression import TrainingTextOptions
from skink.compression.training_texts import check_readable, training_windows
from skink.errors import CalibrationError, InputError, OptionError, RecoveryError
from skink.evaluation import Documents, standard_library
from skink.evaluation.corpus import token_stream
from skink.graph.windows import Windows

BEGIN, END, PAD = 1, 2, 3


class Letters:
    """One token per character between marks; knows how many texts it was given."""

    def __init__(self, bos: int | None = BEGIN, eos: int | None = END, **others: int | None) -> None:
        self.bos_token_id, self.eos_token_id, self.pad_token_id, self.texts = bos, eos, PAD, 0
        self.__dict__.update(others)

    def __len__(self) -> int:
        return 200

    def __call__(self, text: list[str], **options: bool) -> dict[str, list[list[int]]]:
        assert options["add_special_tokens"] is False
        self.texts += len(text)
        return {"input_ids": [[ord(letter) for letter in document] for document in text]}


class Columns:
    """What is used of `datasets.Dataset`."""

    def __init__(self, **columns: list[Any]) -> None:
        self.columns = columns

    @property
    def column_names(self) -> list[str]:
        return list(self.columns)

    def select_columns(self, names: list[str]) -> "Columns":
        return Columns(**{name: self.columns[name] for name in names})

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: int) -> dict[str, Any]:
        assert isinstance(index, int)
        return {name: column[index] for name, column in self.columns.items()}


class Streaming:
    """What is used of `datasets.IterableDataset`; knows how many rows it gave."""

    column_names = None

    def __init__(self, rows: Iterator[Any]) -> None:
        self.rows, self.given = rows, 0

    def __iter__(self) -> Iterator[Any]:
        for row in self.rows:
            self.given += 1
            yield row


TEXTS = tuple(f"text {number} " * 3 for number in range(40))


def stream_of(windows: Windows) -> str:
    """The windows as one string, marks as brackets."""
    letters = {BEGIN: "[", END: "]", PAD: "_"}
    return "".join(letters.get(token) or chr(token) for token in windows.tokens.reshape(-1).tolist())


def read(text: Any, *, length: int = 10, tokenizer: Any = None, **options: Any) -> Windows:
    return training_windows(tokenizer or Letters(), text, length=length, **options)


def test_documents_stand_one_after_another_between_marks() -> None:
    windows = read(Documents("numbers", TEXTS))
    total = sum(len(text) + 2 for text in TEXTS)
    assert windows.tokens.shape == (total // 10, 10)
    assert (windows.source, windows.padding) == ("numbers", None)
    documents = stream_of(windows).split("][")
    assert documents[0].startswith("[")
    assert set(documents[1:-1]) < set(TEXTS)
    assert len(documents) == len(TEXTS)


def test_documents_are_shuffled_by_the_seed() -> None:
    one, again, other = (read(Documents("numbers", TEXTS), seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.tokens, again.tokens)
    assert one.sha256 == again.sha256 != other.sha256
    whole = token_stream(Documents("", TEXTS), Letters())
    assert not torch.equal(one.tokens.view(-1), whole[: one.tokens.numel()])


def test_a_part_is_taken_from_all_over_the_text_and_no_more_is_tokenised() -> None:
    texts = tuple(chr(100 + number % 90) * 98 for number in range(3000))
    tokenizer = Letters()
    windows = read(Documents("many", texts), tokenizer=tokenizer, tokens=991, length=50)
    assert windows.tokens.shape == (20, 50)
    assert tokenizer.texts < 100
    whole = read(Documents("many", texts), length=50)
    assert torch.equal(whole.tokens[:20], windows.tokens)
    assert len(set(windows.tokens.view(-1).tolist())) > 6


def test_more_tokens_than_there_are_is_all() -> None:
    assert read(Documents("numbers", TEXTS), tokens=10**9).sha256 == read(Documents("numbers", TEXTS)).sha256


@pytest.mark.parametrize(
    ("marks", "expected"),
    [
        ({"bos": None}, "ab]ab]ab]"),
        ({"eos": None}, "[ab[ab[ab"),
        ({"eos": BEGIN}, "[ab[ab[ab"),
        ({"bos": None, "eos": None}, "ababab"),
        ({"bos": None, "eos": None, "cls_token_id": BEGIN, "sep_token_id": END}, "[ab][ab][ab]"),
    ],
)
def test_marks_are_those_that_the_tokenizer_has(marks: dict[str, int | None], expected: str) -> None:
    windows = read(Documents("x", ("ab",) * 3), tokenizer=Letters(**marks), length=len(expected))
    assert stream_of(windows) == expected


def test_marks_that_a_text_has_are_not_put_twice() -> None:
    text = chr(BEGIN) + "ab" + chr(END)
    assert stream_of(read(Documents("x", (text,) * 2), length=8)) == "[ab][ab]"


def test_a_long_document_is_one_document() -> None:
    text = "".join(f"{number}\n" for number in range(40_000))
    windows = read(Documents("long", (text,)), length=100)
    found = stream_of(windows)
    assert found.count("[") == 1
    assert found.count("]") <= 1
    assert windows.tokens.numel() == (len(text) + 2) // 100 * 100
    assert text[100_000:100_100] in found


def test_each_document_in_a_row_of_its_own() -> None:
    windows = read(Documents("x", ("abc", "defghijklmnop", "q", " ")), packing="document", length=6, seed=1)
    assert windows.padding is not None
    rows = {
        stream_of(Windows(row[None])): mask.tolist() for row, mask in zip(windows.tokens, windows.padding, strict=True)
    }
    assert rows == {
        "[abc]_": [1, 1, 1, 1, 1, 0],
        # Not ended, for its text goes on.
        "[defgh": [1] * 6,
        "[q]___": [1, 1, 1, 0, 0, 0],
    }
    assert read(Documents("x", ("abc", "def")), packing="document").tokens.shape == (2, 5)
    assert read(Documents("x", ("abc", "def")), packing="document").padding is None


def test_an_encoders_rows_end_with_its_separator() -> None:
    tokenizer = Letters(bos=None, eos=None, cls_token_id=BEGIN, sep_token_id=END)
    windows = read(Documents("x", ("abcdefgh",)), tokenizer=tokenizer, packing="document", length=5)
    assert stream_of(windows) == "[abc]"


def test_rows_with_one_mark_for_both_have_it_at_both_ends() -> None:
    windows = read(Documents("x", ("ab",)), tokenizer=Letters(eos=BEGIN), packing="document", length=5)
    assert stream_of(windows) == "[ab["


def test_tokens_of_rows_are_counted_without_padding() -> None:
    windows = read(Documents("x", ("abcdefgh", "a") * 50), packing="document", tokens=100)
    assert windows.padding is not None
    assert 100 <= int(windows.padding.sum()) < 110


def test_files_lines_and_folders(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.txt").write_text("aaaa")
    (tmp_path / "folder" / "b.jsonl").write_text('{"text": "bbbb"}\n{"text": "cccc"}\n')
    (tmp_path / "d.jsonl").write_text('{"body": "dddd", "text": "no"}\n')
    folder = read(tmp_path / "folder", length=6)
    assert folder.source == "folder"
    assert sorted(stream_of(folder)) == sorted("[aaaa][bbbb][cccc]")
    assert read(str(tmp_path / "folder"), length=6).sha256 == folder.sha256
    assert stream_of(read(tmp_path / "d.jsonl", length=6, field="body")) == "[dddd]"
    both = read([tmp_path / "folder" / "a.txt", str(tmp_path / "folder" / "b.jsonl")], length=6)
    assert sorted(stream_of(both)) == sorted("[aaaa][bbbb][cccc]")
    assert both.source == "a.txt, b.jsonl"


def test_names_of_many_files_are_cut_short(tmp_path: Path) -> None:
    paths = [tmp_path / f"{letter}.txt" for letter in "abcdef"]
    for path in paths:
        path.write_text("text")
    assert read(paths).source == "a.txt, b.txt, c.txt, d.txt and 2 more"


def test_a_data_set_is_read_like_its_texts() -> None:
    dataset = Columns(text=list(TEXTS), image=[None] * len(TEXTS))
    windows = read(dataset)
    assert torch.equal(windows.tokens, read(Documents("numbers", TEXTS)).tokens)
    assert windows.source == "a data set"
    assert read({"test": Columns(text=["no"]), "train": dataset}).sha256 == windows.sha256
    assert read(Columns(body=list(TEXTS)), field="body").sha256 == windows.sha256


def test_a_data_set_of_token_ids_needs_no_tokenizer() -> None:
    dataset = Columns(input_ids=[[5, 6, 7, 0], [8, 9, 0, 0]], attention_mask=[[1, 1, 1, 0], [1, 1, 0, 0]])
    windows = training_windows(None, dataset, length=5)
    assert sorted(windows.tokens.view(-1).tolist()) == [5, 6, 7, 8, 9]
    rows = training_windows(None, dataset, length=5, packing="document")
    assert rows.padding is not None
    assert sorted(rows.padding.sum(1).tolist()) == [2, 3]


@pytest.mark.parametrize("as_rows", [True, False])
def test_endless_text_is_read_no_further_than_needed(as_rows: bool) -> None:
    texts = (f"text {number} " for number in itertools.count())
    streaming = Streaming({"text": text} for text in texts) if as_rows else Streaming(texts)
    windows = read(streaming, tokens=200)
    assert windows.tokens.shape == (20, 10)
    assert streaming.given < 110
    assert stream_of(windows).startswith("[text 0 ][text 1 ]")


def test_an_iterator_of_token_ids() -> None:
    assert training_windows(
        None, iter([[5, 6, 7], torch.tensor([8]), np.array([9, 10])]), length=3
    ).tokens.tolist() == [
        [5, 6, 7],
        [8, 9, 10],
    ]


@pytest.mark.parametrize("kind", ["tensor", "array", ".npy", ".bin"])
def test_tokens_are_cut(kind: str, tmp_path: Path) -> None:
    ids = torch.arange(25)
    text: Any = ids if kind == "tensor" else ids.numpy() if kind == "array" else tmp_path / f"ids{kind}"
    if kind == ".npy":
        np.save(text, ids.numpy().astype(np.uint16))
    elif kind == ".bin":
        ids.numpy().astype(np.uint32).tofile(text)
        text.with_suffix(".json").write_text(json.dumps({"dtype": "uint32"}))
    windows = training_windows(None, text, length=10)
    assert torch.equal(windows.tokens, ids[:20].view(2, 10))
    assert windows.source == (f"ids{kind}" if kind[0] == "." else "tokens")
    assert windows.sha256 == training_windows(None, ids, length=10).sha256
    if kind == ".bin":
        (tmp_path / "ids.json").unlink()
        assert training_windows(None, str(text), length=10, dtype="uint32").sha256 == windows.sha256


def test_windows_are_taken_as_they_are() -> None:
    tokens = torch.arange(20).view(2, 10)
    given = Windows(tokens, "mine", padding=torch.ones_like(tokens))
    windows = training_windows(None, given, length=4, tokens=1)
    assert windows.tokens is tokens
    assert windows.padding is given.padding
    assert windows.source == "mine"
    assert len(windows.sha256) == 64


def test_windows_fit_the_model() -> None:
    assert read(Documents("numbers", TEXTS), longest=7).tokens.shape[1] == 7
    with pytest.raises(RecoveryError, match="windows of 10 tokens"):
        read(Windows(torch.arange(20).view(2, 10)), longest=7)


def test_the_standard_library_without_what_is_held_out() -> None:
    tokenizer = AutoTokenizer.from_pretrained(Path(skink.__file__).parent / "assets" / "stdlib-llama")
    windows = training_windows(tokenizer, "stdlib", length=256, tokens=30_000)
    assert windows.tokens.shape == (118, 256)
    assert windows.source.endswith("standard library, not held out")
    assert training_windows(tokenizer, ["stdlib"], length=256, tokens=30_000).sha256 == windows.sha256
    text = tokenizer.decode(windows.tokens.view(-1))
    names = set(re.findall(r"# file: (\S+)", text))
    files = {split: headers(split) for split in ("calibration", "held-out")}
    assert len(names & files["calibration"]) >= 2
    assert not names & files["held-out"]


def headers(split: Any) -> set[str]:
    return {text.split("\n", 1)[0].removeprefix("# file: ") for text in standard_library(split).texts}


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (Documents("short", ("abc",)), "too little training text: short gives 5 tokens, and one window needs 10"),
        (Documents("blank", (" ", "")), "blank gives 0 tokens"),
        ([], "the list is empty"),
        (["one\ntwo"], "names of files, and one was given that has line breaks"),
        (["a.npy", "b.txt"], "files of tokens and text together: 'b.txt' is text"),
        ({"test": Columns(text=["x"])}, "without a split 'train': it has 'test'"),
        (Columns(body=["x"]), "no column 'text' or 'input_ids': it has 'body'"),
        (5, "int is no form of text that is known"),
        (torch.ones(20), r"token ids are integers, and these are float32\[20\]"),
        (torch.ones(20, dtype=torch.bool), r"bool\[20\], which are no token ids"),
        (torch.full((20,), 200), "training tokens run from 200 to 200, and the model knows 0 to 199"),
        (torch.full((20,), -1), "training tokens run from -1 to -1"),
    ],
)
def test_text_that_cannot_be_used(text: Any, what: str) -> None:
    with pytest.raises(RecoveryError, match=what) as caught:
        read(text)
    assert caught.value.code == "RECOVER-008"
    assert caught.value.fix


def test_no_document_of_two_tokens() -> None:
    with pytest.raises(RecoveryError, match=r"\[RECOVER-008\] too little training text"):
        read(Documents("x", ("a",)), tokenizer=Letters(bos=None, eos=None), packing="document")


def test_what_the_model_knows_can_be_more_than_the_tokenizer_does() -> None:
    assert read(torch.full((20,), 200), vocabulary=201).tokens.shape == (2, 10)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"\[INPUT-001\]"):
        read(tmp_path / "none.txt")


def test_text_without_a_tokenizer_is_refused() -> None:
    with pytest.raises(CalibrationError, match=r"\[CALIBRATION-002\] training text was given"):
        training_windows(None, Documents("numbers", TEXTS), length=4)


@pytest.mark.parametrize("options", [{"length": 1}, {"tokens": 0}, {"packing": "dense"}])
def test_options_have_ranges(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=rf"\[OPTION-002\] (training )?{next(iter(options))}="):
        read(Documents("numbers", TEXTS), **options)


@pytest.mark.parametrize(
    ("text", "options", "why"),
    [
        (Documents("numbers", TEXTS), {"field": "answer"}, "it has no rows"),
        ("stdlib", {"field": "answer"}, "it has no rows"),
        (["notes.txt"], {"field": "answer"}, "it has no rows"),
        (Documents("numbers", TEXTS), {"dtype": "uint16"}, "it is of token ids in a .bin file"),
        (torch.ones(20, dtype=torch.int64), {"packing": "document"}, "it is token ids already"),
        (torch.ones(20, dtype=torch.int64), {"dtype": "int64"}, "only a .bin file"),
        (Windows(torch.ones(2, 10, dtype=torch.int64)), {"packing": "document"}, "it is windows of tokens already"),
    ],
)
def test_what_would_change_nothing_about_a_text_is_refused(text: Any, options: dict[str, Any], why: str) -> None:
    (name,) = options
    with pytest.raises(OptionError, match=rf"\[OPTION-002\] training {name}='.*' does not go with this text.\n  {why}"):
        read(text, **options)


def test_that_files_can_be_read_is_seen_without_reading_them(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("abc")
    check_readable(tmp_path, TrainingTextOptions(field="answer"))
    # What is read only once is left alone.
    texts = iter(TEXTS)
    check_readable(texts, TrainingTextOptions())
    assert next(texts) == TEXTS[0]
    with pytest.raises(InputError, match=r"\[INPUT-001\] .*none.txt"):
        check_readable([tmp_path, tmp_path / "none.txt"], TrainingTextOptions())
