import io
import json
import math

import pytest
from pydantic import ValidationError
from rich.console import Console

from skink.export.report import Comparison, Report, render
from skink.export.report.html import page


def test_json_round_trip_keeps_everything_and_is_deterministic(report):
    text = report.to_json()
    again = Report.from_json(text)
    assert again == report
    assert again.to_json() == text


def test_json_has_the_schema_version_and_plain_names(report):
    data = json.loads(report.to_json())
    assert data["schema_version"] == 1
    assert data["forms"][2]["speed"]["decode"]["median"] == 287.1
    assert data["layers"][0]["shape"] == [256, 256]


def test_an_infinite_perplexity_survives_the_round_trip():
    row = Comparison(name="plain SVD", keep=0.2, perplexity=math.inf, ratio_to_dense=math.inf, settings={"windows": 1})
    assert json.loads(row.model_dump_json())["perplexity"] == "Infinity"
    assert Comparison.model_validate_json(row.model_dump_json()) == row


@pytest.mark.parametrize("path", [[], ["forms", 0], ["forms", 0, "speed", "prefill"], ["passes", 1, "rejections", 0]])
def test_unknown_fields_are_refused_at_every_depth(report, path):
    data = json.loads(report.to_json())
    inner = data
    for key in path:
        inner = inner[key]
    inner["surprise"] = 1
    with pytest.raises(ValidationError, match="surprise"):
        Report.from_json(json.dumps(data))


def test_records_are_frozen(report):
    with pytest.raises(ValidationError, match="frozen"):
        report.title = "other"


def test_a_newer_schema_is_refused(report):
    with pytest.raises(ValidationError, match="schema_version"):
        Report.from_json(report.to_json().replace('"schema_version": 1', '"schema_version": 2'))


def test_created_is_a_time(report):
    with pytest.raises(ValidationError, match="created"):
        Report.from_json(report.to_json().replace(report.created, "yesterday"))


@pytest.mark.parametrize("verified", [0, 1, 2, 3])
def test_every_level_of_verification_can_be_reported_and_shown(report, verified):
    passes = [entry.model_copy(update={"verified": verified}).model_dump() for entry in report.passes]
    changed = Report.model_validate({**report.model_dump(), "passes": passes})
    console = Console(file=io.StringIO(), width=140)
    console.print(render(changed))
    word = ("no", "structure", "numbers", "every edit")[verified]
    assert word in console.file.getvalue()
    assert word in page(changed)


def test_a_method_may_add_parameters():
    row = Comparison(name="tucker", keep=1.2, perplexity=3.0, ratio_to_dense=1.0, settings={"windows": 1})
    assert row.keep == 1.2
