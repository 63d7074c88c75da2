"""The only way to edit: shapes, provenance, the log, and what it refuses."""

import pytest
import torch
from torch import nn

from skink.errors import VerifyError
from skink.graph.capture import capture
from skink.graph.program import Edit, Program
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


def test_edits_past_the_limit_are_refused_and_leave_nothing_behind() -> None:
    subject = program()
    before = str(subject)
    rewriter = Rewriter(subject, "test", limit=0)
    relu = node_of(subject, aten.relu.default)
    with rewriter.before(relu):
        new = rewriter.call(aten.tanh.default, relu.args[0])
    assert rewriter.exhausted
    assert not rewriter.replace(relu, new, rule="relu-to-tanh")
    assert not rewriter.update(relu, target=aten.neg.default, rule="relu-to-neg")
    rewriter.finish()
    assert (str(subject), subject.edits, rewriter.count) == (before, [], 0)


def test_the_limit_counts_all_edits_of_the_program() -> None:
    subject = program()
    relu = node_of(subject, aten.relu.default)
    assert Rewriter(subject, "one", limit=1).update(relu, target=aten.tanh.default, rule="relu-to-tanh")
    assert not Rewriter(subject, "two", limit=1).update(relu, target=aten.neg.default, rule="tanh-to-neg")


def test_an_update_changes_a_call_in_its_place() -> None:
    subject = program()
    product = node_of(subject, aten.mul.Tensor)
    rewriter = Rewriter(subject, "test")
    assert rewriter.update(product, target=aten.sum.dim_IntList, args=(product.args[0], [-1]), rule="mul-to-sum")
    rewriter.finish()
    assert type_text(product.meta["val"], subject.graph_module.meta["shapes"]) == "f32[B,T]"
    assert [edit.rule for edit in subject.edits] == ["mul-to-sum"]
    with torch.no_grad():
        hidden = torch.relu(X @ subject.weight("layer.weight").t() + subject.weight("layer.bias"))
    torch.testing.assert_close(subject(X)[0], hidden.sum(-1))


def test_a_size_is_replaced_by_a_number() -> None:
    subject = capture(One(lambda self, x: x * x.shape[2]), (X,), dims={"x": {2: "E"}})
    size = node_of(subject, aten.sym_size.int)
    rewriter = Rewriter(subject, "test")
    assert rewriter.replace(size, 5, rule="size-to-number")
    rewriter.finish()
    torch.testing.assert_close(subject(X)[0], X * 5)


def test_whoever_watches_is_called_after_each_edit_with_the_graph_whole() -> None:
    subject = program()
    seen: list[tuple[int, str]] = []

    def on_edit(edit: Edit) -> None:
        subject.graph.lint()
        seen.append((edit.index, edit.rule))

    rewriter = Rewriter(subject, "test", on_edit=on_edit)
    relu = node_of(subject, aten.relu.default)
    for target in (aten.tanh.default, aten.neg.default):
        rewriter.update(relu, target=target, rule=str(target))
    assert seen == [(0, "aten.tanh.default"), (1, "aten.neg.default")]
    assert subject.edits[0].source.startswith("tests/modules.py:")


def test_what_only_a_dead_node_used_goes_with_it() -> None:
    subject = program()
    rewriter = Rewriter(subject, "test")
    product, relu = node_of(subject, aten.mul.Tensor), node_of(subject, aten.relu.default)
    with rewriter.before(product), rewriter.watching() as made:
        new = rewriter.call(aten.neg.default, relu.args[0])
    assert made == [new]
    rewriter.replace(product, new, rule="test")
    assert rewriter.erase_dead(product) == [product, relu]
    assert rewriter.erase_dead(new) == []
