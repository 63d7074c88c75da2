"""From the exporter's graph to a program: names, ties, regions, and what cannot be represented."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from skink.errors import CaptureError
from skink.graph.capture import capture
from skink.graph.pattern import op_name
from tests.modules import One, Two, parameter, results
from tests.programs import captured

X = torch.randn(2, 3, 4)


def targets(module: nn.Module, *examples: Tensor) -> list[str]:
    return [op_name(node) for node in capture(module, examples).graph.nodes if node.op == "call_function"]


def test_assertions_of_the_exporter_are_dropped() -> None:
    def body(self: Any, x: Tensor) -> Tensor:
        torch._check(x.shape[1] > 0)
        return x.to(torch.float64).to(torch.float32) + 1

    assert not [name for name in targets(One(body), X) if "assert" in name or "constrain" in name]


def test_tied_weights_stand_once_under_their_first_name() -> None:
    linear = nn.Linear(4, 4)
    module = One(lambda self, x: self.head(self.first(x)), first=linear, head=nn.Linear(4, 4, bias=False))
    module.head.weight = linear.weight
    program = capture(module, (X,))
    assert [name for name, _ in program.weights()] == ["first.weight", "first.bias"]
    assert program.aliases == {"head.weight": "first.weight"}
    assert program.weight("head.weight").data_ptr() == linear.weight.data_ptr()
    torch.testing.assert_close(program(X)[0], results(module, X)[0])


def test_tied_embeddings_of_a_decoder() -> None:
    assert captured("gpt2").aliases == {"lm_head.weight": "transformer.wte.weight"}


def test_weights_that_nothing_reads_are_dropped() -> None:
    module = One(lambda self, x: x * self.used, used=parameter(4), unused=parameter(4), table=torch.ones(3))
    program = capture(module, (X,))
    assert [name for name, _ in program.weights()] == program.stored_weights() == ["used"]
    assert program.buffers == frozenset()


def test_buffers_and_integer_tensors_are_not_trained() -> None:
    module = One(lambda self, x: x[..., self.order] * self.scale, order=torch.tensor([3, 1, 0, 2]), scale=torch.ones(4))
    program = capture(module, (X,))
    assert program.buffers == {"order", "scale"}
    assert torch.equal(program(X)[0], results(module, X)[0])


def test_nested_regions_run_in_place() -> None:
    def body(self: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            a = torch.sin(x)
            with torch.enable_grad():
                b = a * self.w
            c = a + b
        return b * c

    module = One(body, w=parameter(4))
    assert targets(module, X) == ["sin", "mul", "add", "mul"]
    assert torch.equal(capture(module, (X,))(X)[0], results(module, X)[0])


def test_provenance_is_kept() -> None:
    program = captured("llama")
    node = next(node for node in program.graph.nodes if op_name(node) == "silu")
    assert node.meta["module"] == "model.layers.0.mlp.act_fn"
    assert "transformers/activations.py:" in node.meta["source"]
    assert node.meta["source"].rpartition(":")[2].isdigit()


def autocast_on(self: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return self.layer(x)


def branch(self: Any, x: Tensor) -> Tensor:
    return torch.cond(x.sum() > 0, lambda t: t + 1, lambda t: t - 1, (x,))


def counts_calls(self: Any, x: Tensor) -> Tensor:
    self.calls.add_(1)
    return x + self.calls


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (autocast_on, "turns autocast on inside forward"),
        (branch, "calls cond, a region of its own"),
        (counts_calls, "forward writes to its own 'calls', and a program remembers nothing"),
        (lambda self, x: (x, x.shape[1]), "which is not a tensor"),
    ],
    ids=["autocast", "cond", "state", "size"],
)
def test_what_a_graph_cannot_hold_is_refused(body: Any, message: str) -> None:
    module = One(body, layer=nn.Linear(4, 4), calls=torch.zeros(1))
    with pytest.raises(CaptureError, match=r"\[CAPTURE-002\]") as caught:
        capture(module, (X,))
    assert message in caught.value.what
    assert caught.value.fix


@pytest.mark.parametrize("name", ["graph", "code", "meta"])
def test_names_that_torch_keeps_for_itself_are_refused(name: str) -> None:
    with pytest.raises(CaptureError, match=rf"CAPTURE-002.*'{name}.weight' lies in a module whose name"):
        capture(One(lambda self, x: getattr(self, name)(x), **{name: nn.Linear(4, 4)}), (X,))


def test_a_weight_used_by_two_modules_and_a_module_used_twice() -> None:
    layer = nn.Linear(4, 4)
    module = Two(lambda self, x, y: self.one(x) + self.two(self.one(y)), one=layer, two=layer)
    program = capture(module, (X, X.clone()))
    assert [name for name, _ in program.weights()] == ["one.weight", "one.bias"]
    torch.testing.assert_close(program(X, 2 * X)[0], results(module, X, 2 * X)[0])


def in_parts(self: Any, x: Tensor) -> Tensor:
    result = torch.empty_like(x, memory_format=torch.contiguous_format)
    result.copy_(x.new_empty(x.shape) * 0 + torch.empty(4))
    result[..., :2] = x[..., 2:]
    return result


def test_values_that_are_yet_to_be_written_begin_as_zeros() -> None:
    program = capture(One(in_parts, layer=nn.Linear(4, 4)), (X,))
    assert not [node for node in program.graph.nodes if "empty" in str(node.target)]
    assert torch.equal(program(X)[0], torch.cat([X[..., 2:], torch.zeros_like(X[..., 2:])], -1))
