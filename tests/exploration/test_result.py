import json
import math
import os

import pytest

from skink.exploration.result import COSTS, HTML_FILE, JSON_FILE, QUALITIES
from tests.exploration.samples import sample


def test_fronts_are_of_what_was_measured():
    found = sample()
    assert found.measured == (
        *("perplexity", "accuracy", "parameters", "linear_parameters"),
        *("bytes", "macs_per_token", "latency"),
    )
    fronts = found.fronts()
    assert set(fronts) == {"perplexity", "accuracy"}
    # The lost model has no perplexity to speak of; the dense one is on the front.
    assert fronts["perplexity"]["linear_parameters"] == (2, 1, 0)
    assert fronts["perplexity"]["latency"] == (2, 1, 0)
    # More is better: number 1 beats the dense model in both.
    assert fronts["accuracy"]["bytes"] == (4, 2, 1)


@pytest.mark.parametrize("quality", ["perplexity", "accuracy"])
def test_no_point_beats_one_on_the_front(quality):
    found = sample()
    sign = 1 if QUALITIES[quality].low else -1
    for cost in COSTS:
        for number in found.front(quality, cost):
            mine = found.everything[number].metrics
            for other in found.everything:
                if math.isfinite(other.metrics.get(quality, math.inf)) and other.metrics[cost] < mine[cost]:
                    assert sign * other.metrics[quality] > sign * mine[quality]


def test_json_is_json():
    content = json.loads(sample().to_json(), parse_constant=lambda name: pytest.fail(name))
    assert content["points"][3]["metrics"]["perplexity"] == "Infinity"
    assert [point["number"] for point in (content["dense"], *content["points"])] == list(range(6))
    assert content["fronts"]["perplexity"]["bytes"] == [2, 1, 0]
    assert content["points"][4]["error"]["code"] == "DEFECT-001"


def test_both_files_are_written_and_nothing_else(tmp_path):
    sample().write(tmp_path)
    sample().write(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [HTML_FILE, JSON_FILE]
