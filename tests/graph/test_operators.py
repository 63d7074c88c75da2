"""The allow-list of operators."""

import operator
from typing import Any

import pytest
import torch

from skink.errors import GraphError
from skink.graph.operators import SIZE_FUNCTIONS, draws_random_numbers, find_operator, operator_name
from skink.kernels import OPS

aten = torch.ops.aten


@pytest.mark.parametrize(
    "target",
    [
        aten.add.Tensor,
        aten.linear.default,
        aten.arange.start,
        aten._to_copy.default,
        aten.__and__.Tensor,
        aten.split.Tensor,
        operator.getitem,
    ]
    + [op.overload for op in OPS],
    ids=str,
)
def test_names_find_what_they_name(target: object) -> None:
    assert find_operator(operator_name(target)) is target


def test_functions_on_sizes_are_found_by_their_own_names() -> None:
    for name, function in SIZE_FUNCTIONS.items():
        module, _, leaf = name.partition(".")
        assert operator_name(function) == name
        assert function.__name__ == leaf
        assert module in ("operator", "torch", "math")


def test_no_operator_writes_or_reads_without_looking() -> None:
    """Every ATen operator that the list lets through is functional; those known to be unchecked are not among them."""
    allowed = []
    for name in torch._C._dispatch_get_all_op_names():
        if not name.startswith("aten::"):
            continue
        packet, _, overload = name.removeprefix("aten::").partition(".")
        try:
            allowed.append(find_operator(f"aten.{packet}.{overload or 'default'}"))
        except GraphError:
            continue
    assert len(allowed) > 1000
    schemas = [overload._schema for overload in allowed]
    assert not [str(schema) for schema in schemas if schema.is_mutable]
    assert not [str(schema) for schema in schemas if any(argument.is_out for argument in schema.arguments)]
    names = {schema.name.removeprefix("aten::") for schema in schemas}
    assert not names & {"from_file", "_reshape_alias", "set_", "_sparse_coo_tensor_unsafe", "_nested_view_from_buffer"}
    assert not {name for name in names if name.startswith(("cudnn", "mkldnn", "fbgemm", "quantized_"))}


def test_a_misspelt_op_is_suggested() -> None:
    with pytest.raises(
        GraphError, match=r"\[GRAPH-001\] the operator 'skink.atention.default' is not allowed"
    ) as caught:
        find_operator("skink.atention.default")
    assert "did you mean 'skink.attention.default'?" in caught.value.fix


@pytest.mark.parametrize(
    ("target", "arguments", "draws"),
    [
        (aten.add.Tensor, {}, False),
        (aten.rand_like.default, {}, True),
        (aten.bernoulli.p, {"p": 0.0}, True),
        (aten.dropout.default, {"p": 0.5, "train": True}, True),
        (aten.dropout.default, {"p": 0.5, "train": False}, False),
        (aten.dropout.default, {"p": 0.0, "train": True}, False),
        (aten.native_dropout.default, {"p": 0.5, "train": True}, True),
        (aten.scaled_dot_product_attention.default, {}, False),
        (aten.scaled_dot_product_attention.default, {"dropout_p": 0.5}, True),
        (aten.lstm.input, {"dropout": 0.5, "train": True}, True),
        (aten.lstm.input, {"dropout": 0.5, "train": False}, False),
        (aten.lstm.input, {"dropout": 0.0, "train": True}, False),
        (aten.gru.input, {"dropout": 0.0, "train": False}, False),
        (aten.rrelu.default, {}, False),
        (aten.rrelu.default, {"training": True}, True),
    ],
)
def test_what_draws_random_numbers(target: torch._ops.OpOverload, arguments: dict[str, Any], draws: bool) -> None:
    assert draws_random_numbers(target, arguments) is draws
