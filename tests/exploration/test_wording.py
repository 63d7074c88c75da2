import math
import statistics

import pytest

from skink.exploration.wording import (
    beside_dense,
    families,
    name,
    percent,
    question_difference,
    relative,
    series,
    shown,
    spoken,
)
from skink.export.report import formatting as fmt
from tests.exploration.samples import sample


def test_names_and_numbers():
    found = sample()
    assert families(found) == ["one", "other"]
    assert len({series(found, family) for family in ("one", "other", "")}) == 3
    assert name(found.dense) == "dense"
    assert name(found.points[0]) == "keep=0.9, layers=[0 2]"
    assert shown("perplexity", found.points[0]) == "8.100"
    assert shown("accuracy", found.points[1]) == "50.0%"
    assert beside_dense(found, "perplexity", found.points[0]) == f"{fmt.TIMES}1.0125"
    assert beside_dense(found, "perplexity", found.dense) == fmt.MISSING
    assert relative(found, found.points[1], "bytes") == pytest.approx(0.8)
    assert math.isnan(relative(found, found.points[-1], "bytes"))
    assert percent(math.nan) == fmt.MISSING


def test_differences_are_paired():
    found = sample()
    found_difference = question_difference(found.dense, found.points[2])
    # Right before: 1101; after: 1000.
    assert (found_difference.value, found_difference.gained, found_difference.lost) == (-0.5, 0, 2)
    error = statistics.stdev([0, -1, 0, -1]) / 2
    assert found_difference.standard_error == pytest.approx(error)
    assert beside_dense(found, "accuracy", found.points[2]) == f"{fmt.MINUS}50.0 ± {100 * error:.1f}"


def test_a_point_in_one_line():
    said = spoken(sample(), 1)
    for part in ("#1 one: keep=0.9", f"perplexity 8.100 ({fmt.TIMES}1.0125)", "bytes 90.0%", "time per token 95.0%"):
        assert part in said
    assert spoken(sample(), 0).startswith("the dense model; perplexity 8")
