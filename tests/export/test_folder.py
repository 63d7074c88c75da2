import errno
import os
import subprocess
import sys

import pytest

from skink.errors import OutputError
from skink.export.folder import output_folder


def test_the_folder_is_there_whole(tmp_path):
    target = tmp_path / "new" / "deep" / "out"
    with output_folder(target) as partial:
        (partial / "a").write_text("1")
        assert not target.exists()
    assert [path.name for path in target.parent.iterdir()] == ["out"]
    assert (target / "a").read_text() == "1"


def test_others_may_read_it_as_the_umask_says(tmp_path):
    before = os.umask(0o027)
    try:
        with output_folder(tmp_path / "out"):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750


@pytest.mark.parametrize("error", [ValueError("bad"), KeyboardInterrupt(), SystemExit(3)])
def test_a_failure_leaves_nothing(tmp_path, error):
    def fail(partial):
        (partial / "a").write_text("1")
        raise error

    with pytest.raises(type(error)), output_folder(tmp_path / "new" / "out") as partial:
        fail(partial)
    assert list(tmp_path.iterdir()) == []


def test_a_parent_that_others_use_meanwhile_stays(tmp_path):
    def fail():
        (tmp_path / "new" / "theirs").write_text("")
        raise ValueError("bad")

    with pytest.raises(ValueError, match="bad"), output_folder(tmp_path / "new" / "out"):
        fail()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["theirs"]


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path):
    code = (
        "import os, sys; from skink.export.folder import output_folder\n"
        "with output_folder(sys.argv[1]) as folder:\n    (folder / 'a').touch(); os.kill(os.getpid(), 9)"
    )
    for name in ("out", "out.2"):
        subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], check=False)
    assert len(list(tmp_path.glob(".out.*.partial/a"))) == 2
    with output_folder(tmp_path / "out"):
        # That of another output is not looked at.
        assert [len(list(tmp_path.glob(pattern))) for pattern in (".out.*.partial", ".out.2.*.partial")] == [2, 1]
    assert len(list(tmp_path.glob(".*.partial"))) == 1


def test_what_another_process_writes_to_is_left_alone(tmp_path):
    elsewhere = tmp_path / ".out.000000.abcdefgh.partial"
    elsewhere.mkdir()
    with output_folder(tmp_path / "out", overwrite=True) as first:
        (first / "a").touch()
        with output_folder(tmp_path / "out", overwrite=True) as second:
            assert (first / "a").exists()
            assert second != first
    assert sorted(path.name for path in tmp_path.iterdir()) == [elsewhere.name, "out"]
    assert (tmp_path / "out" / "a").exists()


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_what_exists_is_refused_before_any_work(tmp_path, kind):
    target = tmp_path / "out"
    if kind == "folder":
        target.mkdir()
    elif kind == "file":
        target.write_text("")
    else:
        target.symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputError) as caught, output_folder(target):
        pytest.fail("the block must not run")
    assert caught.value.code == "OUTPUT-001"
    assert str(target) in caught.value.what
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_appears_meanwhile_is_left_alone(tmp_path):
    target = tmp_path / "out"
    with pytest.raises(OutputError) as caught, output_folder(target):
        target.mkdir()
    assert caught.value.code == "OUTPUT-001"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_overwrite_replaces_a_folder_only_once_the_new_one_is_whole(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("")
    with pytest.raises(ValueError, match="bad"), output_folder(target, overwrite=True):
        raise ValueError("bad")
    assert (target / "old").exists()
    with output_folder(target, overwrite=True) as partial:
        (partial / "new").write_text("")
        assert (target / "old").exists()
    assert [path.name for path in target.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_overwrite_never_replaces_a_file(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputError) as caught, output_folder(tmp_path / "out", overwrite=True):
        pytest.fail("the block must not run")
    assert caught.value.code == "OUTPUT-001"
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk(tmp_path, error):
    with pytest.raises(OutputError) as caught, output_folder(tmp_path / "out"):
        raise error
    assert caught.value.code == "OUTPUT-002"
    assert "no space left" in caught.value.what
    assert list(tmp_path.iterdir()) == []


def test_no_right_to_write(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "x"))

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    with pytest.raises(OutputError) as caught, output_folder(tmp_path / "out"):
        pytest.fail("the block must not run")
    assert caught.value.code == "OUTPUT-002"
    assert "right" in caught.value.what


def test_a_parent_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError) as caught, output_folder(tmp_path / "file" / "out"):
        pytest.fail("the block must not run")
    assert caught.value.code == "OUTPUT-002"


def test_an_error_about_another_file_keeps_its_own_words(tmp_path):
    with pytest.raises(PermissionError), output_folder(tmp_path / "a" / "out"):
        raise PermissionError(errno.EACCES, "Permission denied", "/elsewhere/model.safetensors")
    with pytest.raises(FileNotFoundError), output_folder(tmp_path / "a" / "out"):
        raise FileNotFoundError(errno.ENOENT, "No such file", str(tmp_path / "input"))
