"""`Program`: weights, copies, and running it."""

import pytest
import torch
from torch import nn

from skink.errors import GraphError
from skink.graph.capture import capture
from skink.graph.program import Program, Stage, StateInput
from skink.graph.rewriter import Rewriter
from tests.modules import One, Two, parameter

aten = torch.ops.aten


def program() -> Program:
    module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2, bias=False))
    return capture(module, (torch.randn(2, 4),))


def test_weights_come_once_in_order_of_first_use() -> None:
    assert [(name, tuple(weight.shape)) for name, weight in program().weights()] == [
        ("0.weight", (8, 4)),
        ("0.bias", (8,)),
        ("2.weight", (2, 8)),
    ]


def test_set_weight_replaces_a_weight_and_writes_to_none() -> None:
    subject = program()
    old = subject.weight("2.weight")
    kept = old.clone()
    x = torch.randn(3, 4)
    before = subject(x)[0]
    subject.set_weight("2.weight", 2 * old)
    assert torch.equal(subject(x)[0], 2 * before)
    assert torch.equal(old, kept)


def test_a_weight_may_change_from_trained_to_buffer() -> None:
    subject = program()
    subject.set_weight("0.bias", torch.zeros(8), buffer=True)
    assert subject.buffers == {"0.bias"}
    assert subject.stored_weights() == ["0.weight", "2.weight", "0.bias"]


def test_a_tied_weight_goes_by_both_names() -> None:
    module = One(lambda self, x: self.b(self.a(x)), a=nn.Linear(4, 4, bias=False), b=nn.Linear(4, 4, bias=False))
    module.b.weight = module.a.weight
    subject = capture(module, (torch.randn(2, 4),))
    assert subject.weight("b.weight") is subject.weight("a.weight")


def test_a_clone_is_edited_on_its_own_and_shares_tensors() -> None:
    original = program()
    x = torch.randn(3, 4)
    before, text, edits = original(x)[0], str(original), len(original.edits)
    copy = original.clone()
    assert str(copy) == text
    node = next(node for node in copy.graph.nodes if node.target is aten.relu.default)
    rewriter = Rewriter(copy, "test")
    rewriter.replace(node, node.args[0], rule="drop-relu")
    rewriter.finish()
    copy.set_weight("2.weight", torch.zeros(2, 8))
    copy.origin["name"] = "copy"
    assert torch.equal(original(x)[0], before)
    assert (str(original), len(original.edits), original.origin.get("name")) == (text, edits, None)
    assert copy.weight("0.weight").data_ptr() == original.weight("0.weight").data_ptr()


def test_inputs_by_position_or_by_name() -> None:
    subject = capture(Two(lambda self, x, y: x - y), (torch.zeros(2), torch.zeros(2)))
    x, y = torch.ones(3), torch.full((3,), 5.0)
    assert subject(x, y)[0].tolist() == subject(x, y=y)[0].tolist() == subject(y=y, x=x)[0].tolist() == [-4.0] * 3


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        (1, {}, "'y' is missing"),
        (1, {"z": None}, "there is no input 'z'"),
        (2, {"x": None}, "'x' was given twice"),
        (3, {}, "3 inputs were given to a program that takes 2"),
        (0, {"y": None}, "'x' is missing"),
    ],
)
def test_inputs_that_are_not_its_own_are_refused(args: int, kwargs: dict[str, None], message: str) -> None:
    subject = capture(Two(lambda self, x, y: x * y), (torch.randn(2, 4), torch.randn(2, 4)))
    with pytest.raises(GraphError, match=rf"\[GRAPH-003\] .*{message}") as caught:
        subject(*[torch.ones(2, 4)] * args, **kwargs)  # type: ignore[arg-type]
    assert caught.value.fix == "its inputs, in order: x, y."


def test_running_records_no_gradients() -> None:
    subject = capture(One(lambda self, x: x * self.w, w=parameter(4)), (torch.zeros(2, 4),))
    assert not subject(torch.ones(2, 4, requires_grad=True))[0].requires_grad


def test_weights_without_values_cannot_run() -> None:
    with torch.device("meta"):
        module = nn.Linear(4, 4)
    subject = capture(module, (torch.zeros(2, 4),))
    with pytest.raises(GraphError, match=r"\[GRAPH-002\] this program's weights are on the meta device"):
        subject(torch.zeros(2, 4))


def test_unused_weights_and_their_ties_are_dropped() -> None:
    subject = program()
    subject.set_weight("extra.weight", torch.zeros(3))
    subject.aliases = {"other.weight": "extra.weight", "third.weight": "0.weight"}
    subject.drop_unused_weights()
    assert subject.stored_weights() == ["0.weight", "0.bias", "2.weight"]
    assert subject.aliases == {"third.weight": "0.weight"}


def test_names_of_stages_and_state() -> None:
    assert [str(stage) for stage in Stage] == ["captured", "canonical", "rewritten", "stepped", "lowered"]
    state = StateInput("past_key_values.3.key", 3, ("B", 2, "P", 8), "append", 2)
    assert state.output_name == "present.3.key"
