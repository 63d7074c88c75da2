import os

import pytest

from skink.errors import InputError, OutputError
from skink.export.report import files, read_report, write_report


def test_both_files_are_written_and_read_back(report, tmp_path):
    assert write_report(report, tmp_path) == (tmp_path / "report.json", tmp_path / "report.html")
    assert sorted(os.listdir(tmp_path)) == ["report.html", "report.json"]
    assert read_report(tmp_path) == report
    assert "stdlib-llama at keep 0.8" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_writing_again_replaces_the_files(report, bare, tmp_path):
    write_report(report, tmp_path)
    write_report(bare, str(tmp_path))
    assert read_report(str(tmp_path)) == bare
    assert len(os.listdir(tmp_path)) == 2


@pytest.mark.parametrize("failing", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_nothing(report, tmp_path, monkeypatch, failing, error):
    real, calls = getattr(os, failing), []

    def second_call_fails(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise error
        return real(*arguments)

    monkeypatch.setattr(files.os, failing, second_call_fails)
    with pytest.raises((OutputError, KeyboardInterrupt)):
        write_report(report, tmp_path)
    assert len(calls) == 2
    assert os.listdir(tmp_path) == []


def test_a_failure_leaves_what_was_there(report, bare, tmp_path, monkeypatch):
    write_report(bare, tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}

    def fails(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", fails)
    with pytest.raises(OutputError, match="No space left"):
        write_report(report, tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before


def test_a_target_that_is_a_folder_is_found_before_anything_is_renamed(report, bare, tmp_path):
    write_report(bare, tmp_path)
    (tmp_path / "report.json").unlink()
    (tmp_path / "report.json").mkdir()
    page = (tmp_path / "report.html").read_bytes()
    with pytest.raises(OutputError, match="is a folder"):
        write_report(report, tmp_path)
    assert (tmp_path / "report.html").read_bytes() == page
    assert sorted(os.listdir(tmp_path)) == ["report.html", "report.json"]


def test_a_folder_that_is_not_there(report, tmp_path):
    with pytest.raises(OutputError, match=r"\[OUTPUT-002\] The report could not be written") as caught:
        write_report(report, tmp_path / "missing")
    assert "fix: choose a folder that exists" in str(caught.value)


def test_no_report_there(tmp_path):
    with pytest.raises(InputError, match=r"\[INPUT-001\].*report\.json"):
        read_report(tmp_path)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"{", "the text: Invalid JSON"),
        (b"{}", "skink_version: Field required"),
        (b'{"schema_version": 99}', "schema_version: Input should be less than or equal to 1"),
        (b'{"a": 1}', "and 3 more"),
        (b"\xff\xfe", "codec can't decode"),
    ],
)
def test_a_damaged_report(tmp_path, text, why):
    (tmp_path / "report.json").write_bytes(text)
    with pytest.raises(InputError) as caught:
        read_report(tmp_path)
    assert caught.value.code == "INPUT-001"
    assert why in str(caught.value)


def test_a_damaged_report_cannot_drive_the_terminal(report, tmp_path):
    (tmp_path / "report.json").write_text('{"\\u001b[31m": 1,' + report.to_json()[1:], encoding="utf-8")
    with pytest.raises(InputError, match="\ufffd\\[31m: Extra inputs are not permitted"):
        read_report(tmp_path)
