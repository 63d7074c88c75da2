"""Passes and their options."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from skink.errors import CalibrationError, OptionError
from skink.graph.capture import capture
from skink.graph.passes import Context, linear_weight
from skink.graph.rewriter import Rewriter
from tests.modules import One
from tests.sample_pass import Sample


def test_options_in_order_with_their_values() -> None:
    assert Sample(keep=0.25).options() == {
        "keep": 0.25,
        "rounds": 3,
        "method": "whitened",
        "exact": True,
        "layers": (),
        "ranks": (1,),
        "limit": None,
        "note": "",
    }


def test_the_one_line_form_holds_what_differs_from_the_defaults() -> None:
    assert str(Sample()) == "sample"
    assert str(Sample(keep=0.25, exact=False, layers=("a.*", "b"))) == "sample{keep=0.25,exact=false,layers=[a.*,b]}"
    assert str(Sample(note="a, {b}")) == 'sample{note="a, {b}"}'


@pytest.mark.parametrize(
    ("given_options", "expected"),
    [
        ({"keep": 1}, Sample(keep=1.0)),
        ({"keep": "1e-6"}, Sample(keep=1e-6)),  # YAML takes 1e-6 for text
        ({"layers": "one"}, Sample(layers=("one",))),
        ({"layers": ["one", "two"]}, Sample(layers=("one", "two"))),
        ({"limit": None}, Sample()),
        ({"limit": 2}, Sample(limit=2.0)),
    ],
)
def test_values_are_brought_to_their_types(given_options: dict[str, Any], expected: Sample) -> None:
    assert Sample.from_options(given_options) == expected


@pytest.mark.parametrize(
    ("given_options", "code", "message", "fix"),
    [
        ({"kep": 0.5}, "OPTION-001", "sample has no option 'kep'", "did you mean 'keep'? valid: keep, rounds, method"),
        ({7: 0.5}, "OPTION-001", "sample has no option 7", "valid: keep"),
        ({"keep": 1.5}, "OPTION-002", "keep=1.5 is out of range (0, 1]", "choose keep in (0, 1]"),
        ({"keep": 0}, "OPTION-002", "keep=0.0 is out of range (0, 1]", "choose keep"),
        ({"keep": float("nan")}, "OPTION-002", "keep=nan is out of range", "choose keep"),
        ({"keep": "much"}, "OPTION-003", "sample.keep='much' is a str, not a float", "give a float"),
        ({"keep": True}, "OPTION-003", "sample.keep=True is a bool, not a float", "give a float"),
        ({"rounds": 2.0}, "OPTION-003", "sample.rounds=2.0 is a float, not a int", "give a int"),
        ({"rounds": True}, "OPTION-003", "sample.rounds=True is a bool", "give a int"),
        ({"exact": 1}, "OPTION-003", "sample.exact=1 is a int, not a bool", "give a bool"),
        ({"method": "white"}, "OPTION-003", "sample.method='white' is none of its choices", "did you mean 'whitened'?"),
        ({"ranks": [1, "b"]}, "OPTION-003", "sample.ranks='b' is a str, not a int", "give a int"),
        ({"limit": "x"}, "OPTION-003", "sample.limit='x' is a str, not a float", "give a float"),
    ],
)
def test_wrong_options_are_refused(given_options: dict[Any, Any], code: str, message: str, fix: str) -> None:
    with pytest.raises(OptionError) as caught:
        Sample.from_options(given_options)
    assert caught.value.code == code
    assert message in caught.value.what
    assert fix in caught.value.fix
    assert isinstance(caught.value, ValueError)


@dataclass(frozen=True)
class Mixed(Sample):
    """Options of types that Sample lacks."""

    pair: tuple[int, float] = (1, 0.5)
    some: int | float | str = 0


@pytest.mark.parametrize(
    ("given_options", "expected"),
    [
        ({"pair": [3, 2]}, Mixed(pair=(3, 2.0))),
        ({"some": 3}, Mixed(some=3)),
        ({"some": 0.25}, Mixed(some=0.25)),
        ({"some": "text"}, Mixed(some="text")),
        ({"limit": "-inf"}, Mixed(limit=float("-inf"))),
    ],
)
def test_pairs_and_choices_between_types(given_options: dict[str, Any], expected: Mixed) -> None:
    found = Mixed.from_options(given_options)
    assert found == expected
    assert type(found.some) is type(expected.some)


def test_a_pair_has_two_entries() -> None:
    with pytest.raises(OptionError, match=r"\[OPTION-003\] sample.pair=\[1\] has 1 entries") as caught:
        Mixed.from_options({"pair": [1]})
    assert caught.value.fix == "give 2 of them."


def test_the_form_with_every_option_leaves_out_only_empty_defaults() -> None:
    assert Sample(ranks=()).describe() == 'sample{keep=0.5,rounds=3,method=whitened,exact=true,ranks=[],note=""}'


def test_a_pass_needs_a_body_and_no_calibration_by_default() -> None:
    program = capture(nn.ReLU(), (torch.zeros(2),))
    assert not Sample().needs_calibration
    with pytest.raises(NotImplementedError):
        super(Sample, Sample()).run(program, Rewriter(program, "sample"), Context())


def test_text_to_calibrate_on_or_who_wanted_it() -> None:
    windows = torch.zeros(2, 3, dtype=torch.int64)
    assert Context(windows).calibration_for("sample") is windows
    with pytest.raises(CalibrationError, match=r"\[CALIBRATION-002\] sample needs calibration text"):
        Context().calibration_for("sample")


def test_weights_of_linear_layers() -> None:
    module = One(lambda self, x: self.layer(x) + x @ self.layer.weight.t(), layer=nn.Linear(4, 4))
    program = capture(module, (torch.zeros(2, 4),))
    names = [linear_weight(program, node) for node in program.graph.nodes]
    assert [name for name in names if name] == ["layer.weight"]
