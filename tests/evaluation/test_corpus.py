import hashlib
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from skink.errors import CalibrationError, InputError, OptionError
from skink.evaluation import Documents, corpus, standard_library, text_files, token_windows
from skink.evaluation.corpus import cut_windows, token_stream, window_stride

ASSET = Path(corpus.__file__).parents[1] / "assets" / "stdlib-llama"


class Letters:
    """One token per character; 1 and 2 mark the ends. Remembers how many characters it was given."""

    def __init__(self, bos: int | None = 1, eos: int | None = 2) -> None:
        self.bos_token_id, self.eos_token_id, self.seen = bos, eos, 0

    def __call__(self, text: list[str], **options: bool) -> dict[str, list[list[int]]]:
        assert options["add_special_tokens"] is False
        self.seen += sum(map(len, text))
        return {"input_ids": [[ord(letter) for letter in document] for document in text]}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ASSET)


def headers(split):
    return [text.split("\n", 1)[0].removeprefix("# file: ") for text in standard_library(split).texts]


def test_held_out_files_are_those_whose_path_hashes_to_a_multiple_of_twenty():
    held_out, calibration = headers("held-out"), headers("calibration")
    assert all(int(hashlib.sha1(name.encode()).hexdigest(), 16) % 20 == 0 for name in held_out)
    assert not any(int(hashlib.sha1(name.encode()).hexdigest(), 16) % 20 == 0 for name in calibration)
    assert {"argparse.py", "json/decoder.py"} <= {*held_out, *calibration}
    assert held_out == sorted(held_out, key=lambda name: name.split("/"))


@pytest.mark.parametrize("split", ["held-out", "calibration"])
def test_standard_library_leaves_out_what_the_model_was_not_trained_on(split):
    documents = standard_library(split)
    names = headers(split)
    assert not any(name.startswith(("site-packages/", "lib2to3/", "config-")) for name in names)
    assert not any("pydoc_data" in name or "bad" in name or name.startswith("encodings/cp") for name in names)
    bodies = [text.split("\n", 1)[1] for text in documents.texts]
    assert all(400 <= len(body) <= 400_000 for body in bodies)
    assert documents.name == f"{platform.python_implementation()} {platform.python_version()} standard library, {split}"


@pytest.mark.skipif(
    (platform.python_implementation(), platform.python_version()) != ("CPython", "3.11.7"),
    reason="the counts in the model's README are of CPython 3.11.7",
)
def test_the_split_is_the_one_the_model_was_trained_with(tokenizer):
    held_out = standard_library("held-out")
    assert len(held_out.texts) == 74
    assert len(standard_library("calibration").texts) == 1385
    assert len(token_stream(held_out, tokenizer)) == 528_160


def test_standard_library_without_sources_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(
        InputError, match=r"^\[INPUT-001\] the standard library of this Python has no source files"
    ) as caught:
        standard_library("held-out")
    assert caught.value.where == str(tmp_path)


def test_standard_library_skips_files_that_are_not_utf8(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: str(tmp_path))
    (tmp_path / "latin.py").write_bytes(b"\xe9" * 500)
    (tmp_path / "plain.py").write_text("x = 1\n" * 100)
    (tmp_path / "short.py").write_text("x = 1\n")
    split = "held-out" if int(hashlib.sha1(b"plain.py").hexdigest(), 16) % 20 == 0 else "calibration"
    assert standard_library(split).texts == ("# file: plain.py\n" + "x = 1\n" * 100,)


def test_hash_is_of_the_texts_alone_and_in_order():
    assert Documents("a", ("x", "yz")).sha256 == Documents("b", ("x", "yz")).sha256
    assert len({Documents("a", texts).sha256 for texts in (("x", "yz"), ("yz", "x"), ("xy", "z"), ("xyz",))}) == 4


def test_hash_is_the_same_in_another_process():
    code = "from skink.evaluation import Documents; import sys; sys.stdout.write(Documents('a', ('x', 'é')).sha256)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == Documents("a", ("x", "é")).sha256


def test_text_files_reads_text_jsonl_and_folders(tmp_path):
    (tmp_path / "one.txt").write_bytes("\ufeffwith a mark".encode())
    (tmp_path / "two.jsonl").write_text('{"text": "first"}\n\n{"text": "second", "id": 3}\n{"text": " "}\n')
    folder = tmp_path / "folder"
    (folder / "b").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "x.md").write_text("hidden")
    (folder / "b" / "x.py").write_text("in b")
    (folder / "c.md").write_text("in c")
    (folder / "picture.png").write_bytes(b"\x89PNG\xff")
    (folder / "zeros.bin").write_bytes(b"\0\0")
    documents = text_files([tmp_path / "one.txt", tmp_path / "two.jsonl", folder])
    assert documents.texts == ("with a mark", "first", "second", "in b", "in c")
    assert documents.name == "one.txt, two.jsonl, folder"


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(InputError, match=r"^\[INPUT-001\] '.*nowhere\.txt' cannot be read as text\.\n  No such file"):
        text_files([tmp_path / "nowhere.txt"])


def test_a_file_that_is_not_text_is_an_error_when_it_is_named(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"ab\xff")
    with pytest.raises(
        InputError, match=r"\[INPUT-001\] .*\n  it is not UTF-8 text: byte 2 is 0xff\.\n  fix: give UTF-8"
    ):
        text_files([tmp_path / "x.txt"])


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", r"line 2 is not JSON: "),
        ('{"body": "x"}', r'line 2 is not an object with a string in its field "text"'),
        ('{"text": 3}', r'line 2 is not an object with a string in its field "text"'),
        ("[]", r'line 2 is not an object with a string in its field "text"'),
    ],
)
def test_a_bad_line_of_jsonl_is_an_error_that_names_it(tmp_path, line, why):
    (tmp_path / "x.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(InputError, match=rf"\[INPUT-001\] .*x\.jsonl' cannot be read as text\.\n  {why}"):
        text_files([tmp_path / "x.jsonl"])


def test_empty_text_is_an_error(tmp_path):
    (tmp_path / "x.txt").write_text(" \n")
    with pytest.raises(CalibrationError, match=r"^\[CALIBRATION-001\] no text in 'x\.txt': every document is empty"):
        text_files([tmp_path / "x.txt"])
    with pytest.raises(CalibrationError, match=r"^\[CALIBRATION-001\] no text files given"):
        text_files([])


@pytest.mark.parametrize(
    ("bos", "eos", "expected"),
    [
        (1, 2, [1, 97, 98, 2, 1, 99, 2]),
        (None, 2, [97, 98, 2, 99, 2]),
        (1, None, [1, 97, 98, 1, 99]),
        (None, None, [97, 98, 99]),
        (7, 7, [7, 97, 98, 7, 99]),
    ],
)
def test_marks_stand_around_each_document_where_the_tokenizer_has_them(bos, eos, expected):
    stream = token_stream(Documents("d", ("ab", "c")), Letters(bos, eos))
    assert stream.dtype == torch.int64
    assert stream.tolist() == expected


def test_all_windows_lie_end_to_end():
    windows = token_windows(Documents("d", ("abcdefgh", "i")), Letters(None, None), length=4, count=None)
    assert windows.tolist() == [[97, 98, 99, 100], [101, 102, 103, 104]]


@pytest.mark.parametrize(
    ("tokens", "length", "count"), [(100, 7, 5), (100, 9, 11), (35, 7, 4), (36, 7, 1), (1000, 2, 33)]
)
def test_windows_are_evenly_spaced_from_the_first_token_to_the_last_and_do_not_overlap(tokens, length, count):
    windows = cut_windows(torch.arange(tokens), length=length, count=count)
    starts = windows[:, 0]
    assert windows.shape == (count, length)
    assert torch.equal(windows, starts[:, None] + torch.arange(length))
    gaps = starts.diff()
    assert starts[0] == 0
    if count > 1:
        assert starts[-1] == tokens - length
        assert gaps.min() >= length
        assert gaps.max() - gaps.min() <= 1
        assert window_stride(tokens, length=length, count=count) == pytest.approx(gaps.double().mean().item())


def test_what_there_is_is_used_when_there_are_fewer_windows_than_wanted():
    windows = cut_windows(torch.arange(30), length=8, count=10)
    assert windows[:, 0].tolist() == [0, 8, 16]
    assert window_stride(30, length=8, count=10) == 8.0


@pytest.mark.parametrize("over", ["stream", "sample"])
def test_too_little_text_is_an_error_that_names_both_numbers(over):
    with pytest.raises(
        CalibrationError, match=r"^\[CALIBRATION-001\] too little text: 'd' gives 5 tokens, and one window needs 6"
    ):
        token_windows(Documents("d", ("abc",)), Letters(), length=6, count=3, over=over)
    with pytest.raises(CalibrationError, match=r"'none' gives 0 tokens"):
        token_windows(Documents("none", ()), Letters(), length=6, count=3, over=over)


@pytest.mark.parametrize(("length", "count", "name"), [(1, None, "length=1"), (8, 0, "count=0")])
def test_windows_out_of_range_are_errors(length, count, name):
    with pytest.raises(OptionError, match=rf"^\[OPTION-002\] {name} is out of range"):
        token_windows(Documents("d", ("abc",)), Letters(), length=length, count=count)


def test_a_sample_tokenises_only_some_documents_spread_over_all():
    texts = tuple(chr(1000 + index) * 50 for index in range(100))
    letters = Letters(None, None)
    windows = token_windows(Documents("d", texts), letters, length=10, count=20, over="sample")
    assert windows.shape == (20, 10)
    assert letters.seen == 20 * 50
    assert windows.min() == 1000
    assert windows.max() >= 1095
    assert torch.equal(windows, token_windows(Documents("d", texts), letters, length=10, count=20, over="sample"))


def test_a_sample_takes_more_documents_when_they_are_short():
    texts = tuple(chr(1000 + index) for index in range(64))
    windows = token_windows(Documents("d", texts), Letters(None, None), length=8, count=4, over="sample")
    assert windows.shape == (4, 8)
    everything = token_windows(Documents("d", texts), Letters(None, None), length=8, count=8, over="sample")
    assert everything.flatten().tolist() == list(range(1000, 1064))


def test_a_sample_takes_only_parts_of_long_documents():
    letters = Letters()
    windows = token_windows(Documents("d", ("a" * 10_000_000,)), letters, length=16, count=4, over="sample")
    assert windows.shape == (4, 16)
    assert letters.seen < 200_000


def test_windows_of_the_real_tokenizer_are_deterministic(tokenizer):
    documents = Documents("some", standard_library("held-out").texts[:6])
    first = token_windows(documents, tokenizer, length=64, count=5)
    assert torch.equal(first, token_windows(documents, AutoTokenizer.from_pretrained(ASSET), length=64, count=5))
    assert tokenizer.decode(first[0]).startswith("<s># file: ")
