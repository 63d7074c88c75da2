"""Checks on what a graph file says."""

import operator
from typing import Any

import pytest
import torch
from torch import fx

from skink.errors import GraphError
from skink.graph.file_checks import (
    as_keyword,
    as_list,
    as_text,
    as_weight_name,
    check_arguments,
    is_name,
    unique_keys,
)

aten = torch.ops.aten


@pytest.mark.parametrize("name", ["x", "linear_1", "_to_copy", "input"])
def test_names_of_variables(name: str) -> None:
    assert is_name(name)


@pytest.mark.parametrize("name", ["", "1x", "a.b", "a b", "lambda", "None", "\ufb01", "\uff58", "x\n", None, 3, ["x"]])
def test_what_names_no_variable(name: Any) -> None:
    assert not is_name(name)


def test_text_is_of_one_printable_line() -> None:
    assert as_text("model.py:41") == "model.py:41"
    for value in ("a\nb", "\x1b[2J", "\u202e", None, 3):
        with pytest.raises(ValueError, match="is not text of one line"):
            as_text(value)


def test_lists_are_lists() -> None:
    assert as_list([1]) == [1]
    for value in ("ab", {"a": 1}, None):
        with pytest.raises(ValueError, match="stands where a list belongs"):
            as_list(value)


def test_a_key_is_there_once() -> None:
    assert unique_keys([("a", 1), ("b", 2)]) == {"a": 1, "b": 2}
    with pytest.raises(ValueError, match="twice"):
        unique_keys([("a", 1), ("a", 1)])


@pytest.mark.parametrize("name", ["0.weight", "model.layers.0.q_proj.weight", "a-b.c", "_w"])
def test_names_of_weights(name: str) -> None:
    assert as_weight_name(name) == name


@pytest.mark.parametrize(
    "name",
    ["", "a..b", ".a", "a.", "__class__.a", "a.__dict__", "a b", "a\n", "forward", "graph.a", "_modules.a", "\u00e9"],
)
def test_what_names_no_weight(name: str) -> None:
    with pytest.raises(GraphError, match=r"\[GRAPH-001\] .* is not a weight's name"):
        as_weight_name(name)


def test_keywords_are_those_of_the_operator() -> None:
    assert as_keyword(aten.add.Tensor, "alpha") == "alpha"
    for target, name in ((aten.add.Tensor, "beta"), (operator.add, "a")):
        with pytest.raises(GraphError, match="has no argument"):
            as_keyword(target, name)


def test_arguments_fit_the_operator() -> None:
    node = fx.Graph().placeholder("x")
    check_arguments(aten.linear.default, (node, node), {})
    check_arguments(aten.linear.default, (node, node), {"bias": node})
    check_arguments(operator.mul, (node, 2), {})
    check_arguments(torch.sym_sum, ([node, 2],), {})
    wrong: list[tuple[Any, Any, Any, str]] = [
        (aten.linear.default, (node,), {}, "lacks an argument"),
        (aten.linear.default, (node,) * 4, {}, "takes 3 arguments"),
        (aten.linear.default, (node, node), {"weight": node}, "given twice"),
        (aten.arange.default, (3, torch.int64), {}, "takes 1 arguments"),
        (operator.mul, ("x", 10**9), {}, "is for numbers"),
        (operator.mul, (), {}, "is for numbers"),
    ]
    for target, args, kwargs, message in wrong:
        with pytest.raises(ValueError, match=message):
            check_arguments(target, args, kwargs)
