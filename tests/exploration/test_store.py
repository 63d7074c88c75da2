import json
import math
import os

import pytest

from skink.errors import OutputError, SpaceError
from skink.exploration.store import POINTS_FILE, Store


def store(folder, fingerprint="a" * 64):
    return Store(folder, model="tiny", fingerprint=fingerprint)


def test_records_are_there_again(tmp_path):
    first = store(tmp_path / "new" / "map")
    assert first.get("point", "k") is None
    first.add("point", "k", {"metrics": {"perplexity": math.inf, "bytes": 3}})
    first.add("latency", "k", {"x": 1})
    first.add("point", "k", {"metrics": {"perplexity": 2.5}})
    for each in (first, store(tmp_path / "new" / "map")):
        assert each.get("point", "k")["metrics"] == {"perplexity": 2.5}
        assert each.get("latency", "k")["x"] == 1
        assert each.get("latency", "other") is None


@pytest.mark.parametrize("cut", [1, 10, 30])
def test_a_half_written_line_is_passed_over_and_cut_off(tmp_path, cut):
    first = store(tmp_path)
    first.add("point", "one", {"x": 1})
    first.add("point", "two", {"x": 2})
    data = first.path.read_bytes()
    first.path.write_bytes(data[:-cut])
    again = store(tmp_path)
    assert again.get("point", "one")["x"] == 1
    assert again.get("point", "two") is None
    again.add("point", "two", {"x": 3})
    assert store(tmp_path).get("point", "two")["x"] == 3
    assert all(json.loads(line) for line in first.path.read_text().splitlines())


def test_a_file_cut_within_its_first_line_begins_anew(tmp_path):
    first = store(tmp_path)
    first.path.write_bytes(first.path.read_bytes()[:7])
    assert store(tmp_path).get("point", "k") is None


def test_damaged_lines_are_points_to_do_again(tmp_path):
    first = store(tmp_path)
    first.add("point", "one", {"x": 1})
    with first.path.open("ab") as file:
        file.write(b"\xff\x00 no JSON\n[1]\n" + json.dumps({"kind": "point", "key": "two", "x": 2}).encode() + b"\n")
    again = store(tmp_path)
    assert again.get("point", "one")["x"] == 1
    assert again.get("point", "two")["x"] == 2


def test_another_model_is_refused(tmp_path):
    store(tmp_path)
    with pytest.raises(SpaceError, match="another model, 'tiny'") as caught:
        store(tmp_path, "b" * 64)
    assert caught.value.code == "SPACE-005"
    (tmp_path / POINTS_FILE).write_text('{"hello": 1}\n')
    with pytest.raises(SpaceError, match="SPACE-005"):
        store(tmp_path)


def test_a_place_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write") as caught:
        store(tmp_path / "file" / "below")
    assert caught.value.code == "OUTPUT-002"
    gone = store(tmp_path / "gone")
    os.remove(gone.path)
    (tmp_path / "gone" / POINTS_FILE).mkdir()
    with pytest.raises(OutputError, match="cannot write"):
        gone.add("point", "k", {})
