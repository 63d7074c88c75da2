"""Shapes and dtypes of nodes."""

import torch
from torch import nn

from skink.graph.capture import capture
from skink.graph.pattern import op_name
from skink.graph.propagate import ShapeContext, dim_text, evaluate, prime_sizes, propagate, refresh, shape_context
from skink.graph.text import type_text
from tests.modules import One, Two
from tests.programs import captured


def types(subject: object, name: str) -> list[str]:
    context = subject.graph_module.meta["shapes"]
    return [type_text(node.meta["val"], context) for node in subject.graph.nodes if op_name(node) == name]


def test_dims_are_expressions_over_names() -> None:
    module = Two(lambda self, x, y: torch.cat([x, y], 1).reshape(x.shape[0], -1))
    subject = capture(
        module,
        (torch.zeros(2, 3, 4), torch.zeros(2, 5, 4)),
        dims={"x": {0: "B", 1: "T"}, "y": {0: "B", 1: "S"}},
    )
    assert types(subject, "cat") == ["f32[B,S+T,4]"]
    assert types(subject, "reshape") == ["f32[B,4*S+4*T]"]


def test_dims_of_equal_examples_stay_apart() -> None:
    module = Two(lambda self, x, y: x @ y)
    dims = {"x": {0: "N"}, "y": {1: "M"}}
    subject = capture(module, (torch.zeros(3, 3), torch.zeros(3, 3)), dims=dims)
    assert types(subject, "matmul") == ["f32[N,M]"]


def test_results_as_if_weights_had_another_dtype() -> None:
    subject = captured("llama")
    values = evaluate(subject, ShapeContext(subject), weights_as=torch.bfloat16)
    by_name = {node.name: value for node, value in values.items()}
    output = values[subject.graph.output_node()][0]
    assert output.dtype is torch.bfloat16
    cos = next(value for name, value in by_name.items() if name.startswith("cos"))
    assert cos.dtype is torch.float32  # rotary tables are made in float32 whatever the weights are
    assert subject.graph.output_node().meta["val"][0].dtype is torch.float32


def test_replaced_weights_are_noticed() -> None:
    subject = capture(One(lambda self, x: self.layer(x.to(self.layer.weight.dtype)), layer=nn.Linear(4, 4)), (
        torch.zeros(2, 4),
    ))  # fmt: skip
    context = shape_context(subject)
    refresh(subject)
    assert shape_context(subject) is context
    subject.set_weight("layer.weight", torch.zeros(6, 4))
    subject.set_weight("layer.bias", torch.zeros(6))
    refresh(subject)
    assert shape_context(subject) is not context
    assert types(subject, "linear") == ["f32[B,6]"]


def test_operators_that_need_concrete_sizes_in_cpp() -> None:
    module = Two(lambda self, x, y: torch.baddbmm(x[:, :1, :1], x, y))
    subject = capture(module, (torch.zeros(2, 3, 4), torch.zeros(2, 4, 5)), dims={"x": {0: "B", 1: "T"}, "y": {0: "B"}})
    propagate(subject)
    assert types(subject, "baddbmm") == ["f32[B,T,5]"]


def test_calls_alike_share_one_value_and_others_do_not() -> None:
    def body(self: One, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.relu(x) + 1, torch.relu(x * 2) + 1.5, torch.relu(x.double()), x.mT @ x, (x @ x.mT) * True

    subject = capture(One(body), (torch.zeros(2, 3, 4),))
    one, other, double, inner, outer = (node.meta["val"] for node in subject.graph.output_node().args[0])
    assert one is other
    assert double is not one
    assert (double.dtype, tuple(inner.shape)[1:]) == (torch.float64, (4, 4))
    context = shape_context(subject)
    assert [dim_text(context, size) for size in outer.shape] == ["B", "T", "T"]


def test_sizes_that_depend_on_values_are_new_at_every_call() -> None:
    subject = capture(One(lambda self, x: x), (torch.zeros(2, 3),), dims={"x": {0: "B"}})
    context = shape_context(subject)
    x = subject.graph.find_nodes(op="placeholder")[0].meta["val"]
    one, other = (context.call(torch.ops.aten.nonzero.default, (x,), {}) for _ in range(2))
    assert one.shape[0].node.expr != other.shape[0].node.expr


def test_prime_sizes() -> None:
    sizes = prime_sizes(["B", 3, "T", "B", "S", 7], first=3, apart=4)
    assert sizes == {"B": 3, "T": 7, "S": 11}
    assert prime_sizes([4, 5], first=3, apart=4) == {}


def test_dim_text_of_numbers() -> None:
    assert dim_text(None, 64) == "64"
