"""The only way to edit: shapes, provenance, the log, and what it refuses."""

import pytest
import torch
from torch import nn

from skink.errors import VerifyError
from skink.graph.capture import capture
from skink.graph.program import Program
from skink.graph.rewriter import Rewriter, describe
from skink.graph.text import type_text
from tests.modules import One

aten = torch.ops.aten
X = torch.randn(2, 3, 4)


def program() -> Program:
    return capture(One(lambda self, x: torch.relu(self.layer(x)) * 2, layer=nn.Linear(4, 6)), (X,))


def node_of(subject: Program, target: object) -> torch.fx.Node:
    (node,) = subject.graph.find_nodes(op="call_function", target=target)
    return node


def test_new_nodes_have_shapes_and_inherit_where_they_came_from() -> None:
    subject = program()
    relu = node_of(subject, aten.relu.default)
    relu.meta["module"] = "layer.act"
    rewriter = Rewriter(subject, "test")
    with rewriter.before(relu):
        new = rewriter.call(aten.tanh.default, relu.args[0], rule="relu-to-tanh")
    rewriter.replace(relu, new, rule="relu-to-tanh", detail="for a test")
    rewriter.finish()
    assert type_text(new.meta["val"], subject.graph_module.meta["shapes"]) == "f32[B,T,6]"
    assert (new.meta["module"], new.meta["source"]) == ("layer.act", relu.meta["source"])
    assert describe(new).startswith("%tanh_default, layer.act (")
    assert describe(new).endswith("), made by relu-to-tanh")
    (edit,) = subject.edits
    assert (edit.index, edit.pass_name, edit.rule, edit.node) == (0, "test", "relu-to-tanh", "relu")
    assert (edit.qualified_name, edit.detail) == ("layer.act", "for a test")
    assert rewriter.count == 1
    assert aten.relu.default not in {node.target for node in subject.graph.nodes}
    with torch.no_grad():
        wanted = torch.tanh(X @ subject.weight("layer.weight").t() + subject.weight("layer.bias")) * 2
    torch.testing.assert_close(subject(X)[0], wanted)


def test_new_weights_are_added_and_dead_ones_go() -> None:
    subject = program()
    linear = node_of(subject, aten.linear.default)
    rewriter = Rewriter(subject, "test")
    with rewriter.before(linear):
        down = rewriter.call(aten.linear.default, linear.args[0], rewriter.weight("layer.down", torch.ones(2, 4)))
        up = rewriter.call(aten.linear.default, down, rewriter.weight("layer.up", torch.ones(6, 2)))
    rewriter.replace(linear, up, rule="factor")
    rewriter.finish()
    assert subject.stored_weights() == ["layer.down", "layer.up"]
    torch.testing.assert_close(subject(X)[0], torch.relu(2 * X.sum(-1, keepdim=True)).expand(2, 3, 6) * 2)


def test_a_node_may_be_replaced_by_one_that_wraps_it() -> None:
    subject = program()
    relu = node_of(subject, aten.relu.default)
    before = subject(X)[0]
    rewriter = Rewriter(subject, "test")
    with subject.graph.inserting_after(relu):
        wrapped = rewriter.call(aten.neg.default, relu)
    rewriter.replace(relu, wrapped, rule="wrap")
    rewriter.finish()
    assert torch.equal(subject(X)[0], -before)


def test_edits_are_counted_over_passes() -> None:
    subject = program()
    for index, name in enumerate(["one", "two"]):
        Rewriter(subject, name).record(node_of(subject, aten.relu.default), rule="look")
        assert (subject.edits[-1].index, subject.edits[-1].pass_name) == (index, name)


def test_the_anchor_is_given_back_after_an_error() -> None:
    subject = program()
    rewriter = Rewriter(subject, "test")
    relu = node_of(subject, aten.relu.default)
    with pytest.raises(KeyError), rewriter.before(relu):
        raise KeyError
    new = rewriter.call(aten.neg.default, relu)
    assert "source" not in new.meta


def test_a_node_before_what_it_uses_is_refused() -> None:
    subject = program()
    linear, relu = node_of(subject, aten.linear.default), node_of(subject, aten.relu.default)
    linear.prepend(relu)
    with pytest.raises(VerifyError, match=r"\[VERIFY-001\] after pass test: the graph is not well formed") as caught:
        Rewriter(subject, "test").finish()
    assert "relu" in caught.value.why
    assert "linear" in caught.value.why
