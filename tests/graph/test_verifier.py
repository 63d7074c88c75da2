"""Verification: what a broken graph is caught by, and how results are compared."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from skink.errors import VerifyError
from skink.graph.capture import capture
from skink.graph.program import Edit, Program, Stage
from skink.graph.verifier import (
    EXACT_TOLERANCE,
    Numbers,
    check_exact,
    check_structure,
    difference,
    first_line,
    results_of,
    run_results,
    seeded_inputs,
    worst_edit,
)
from tests.modules import One, Two
from tests.programs import canonical

aten = torch.ops.aten
X = torch.randn(2, 3, 4)


def program() -> Program:
    return capture(One(lambda self, x: torch.relu(self.layer(x)), layer=nn.Linear(4, 6)), (X,))


def node_of(subject: Program, target: object) -> fx.Node:
    (node,) = subject.graph.find_nodes(op="call_function", target=target)
    return node


def swap(target: Any) -> Any:
    def change(subject: Program) -> None:
        node_of(subject, aten.relu.default).target = target

    return change


def use_before_definition(subject: Program) -> None:
    node_of(subject, aten.linear.default).prepend(node_of(subject, aten.relu.default))


def forget_weight(subject: Program) -> None:
    del subject.graph_module.layer.bias


def keep_unread_weight(subject: Program) -> None:
    subject.set_weight("layer.extra", torch.zeros(2))


def call_module(subject: Program) -> None:
    node = node_of(subject, aten.relu.default)
    with subject.graph.inserting_before(node):
        node.replace_all_uses_with(subject.graph.call_module("layer", (node.args[0],)))


def misfit(subject: Program) -> None:
    subject.set_weight("layer.weight", torch.zeros(6, 5))


def other_result(subject: Program) -> None:
    subject.set_weight("layer.weight", torch.zeros(7, 4))
    subject.set_weight("layer.bias", torch.zeros(7))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (use_before_definition, "the graph is not well formed"),
        (forget_weight, "the graph is not well formed"),
        (keep_unread_weight, "the weight 'layer.extra' is kept and never read"),
        (call_module, "a node of kind 'call_module' is not legal"),
        (swap(aten.relu_.default), "aten.relu_.default, which writes to its argument, is not legal at stage captured"),
        (swap(torch.ops.prims.sin.default), "prims.sin.default, an operator of prims, is not legal"),
        (swap(torch.relu), "the function relu is not legal"),
        (swap(setattr), "the function setattr is not legal"),
        (misfit, "shapes do not fit together"),
        (other_result, "results were f32[B,T,6] and became f32[B,T,7]"),
        (swap(aten.argmax.default), "results were f32[B,T,6] and became i64[]"),
    ],
)
def test_broken_graphs_are_caught(change: Any, message: str) -> None:
    subject = program()
    check_structure(subject, pass_name="fine")
    change(subject)
    with pytest.raises(VerifyError, match=r"\[VERIFY-001\] after pass broken: ") as caught:
        check_structure(subject, pass_name="broken")
    assert message in caught.value.what
    assert caught.value.fix.startswith("this is a defect of the pass: report it")


def test_the_message_names_node_module_and_line() -> None:
    subject = program()
    node = node_of(subject, aten.relu.default)
    node.meta["module"] = "layer.act"
    swap(aten.relu_.default)(subject)
    with pytest.raises(VerifyError) as caught:
        check_structure(subject, pass_name="broken")
    assert caught.value.where.startswith("%relu, layer.act (")
    assert "modules.py:" in caught.value.where


def edit(index: int, node: str, rule: str = "rule", error: float | None = None) -> Edit:
    return Edit(index, "broken", rule, node, "layer", source="model.py:3", error=error)


def caught_by(subject: Program, *edits: Edit) -> VerifyError:
    with pytest.raises(VerifyError) as caught:
        check_structure(subject, pass_name="broken", edits=edits)
    return caught.value


def test_the_message_names_the_rule_of_the_stage_and_the_edits_that_touched_the_node() -> None:
    subject = program()
    swap(aten.relu_.default)(subject)
    error = caught_by(subject, edit(0, "linear"), edit(1, "relu", "relu-in-place"))
    assert error.why == "rule of the stage: nothing-writes-to-its-argument.\ntouched by edit 1 (relu-in-place)."
    error = caught_by(subject, edit(0, "linear"), edit(1, "linear"), edit(2, "linear", "other"))
    assert error.why.endswith("the pass's edits: rule 2 times, other 1 times.")
    assert caught_by(subject).why.endswith("the pass logged no edit: it went past the rewriter.")


def test_a_new_node_is_traced_to_its_edit_by_rule_module_and_line() -> None:
    subject = program()
    node = node_of(subject, aten.relu.default)
    node.meta |= {"rule": "to-relu", "module": "layer", "source": "model.py:3"}
    swap(aten.relu_.default)(subject)
    error = caught_by(subject, edit(0, "other", "to-relu"), edit(1, "gone", "to-relu"), edit(2, "gone", "rule"))
    assert error.why.endswith("touched by edits 0 (to-relu), 1 (to-relu).")
    assert error.where == "%relu, layer (model.py:3), made by to-relu"


def test_the_node_where_shapes_do_not_fit_is_named() -> None:
    subject = program()
    misfit(subject)
    error = caught_by(subject, edit(0, "linear", "widen"))
    assert error.where.startswith("%linear, layer (")
    assert error.why.splitlines()[0].startswith("RuntimeError: ")
    assert error.why.endswith("touched by edit 0 (widen).")


def test_the_node_where_a_program_stops_is_named() -> None:
    subject = capture(One(lambda self, x: self.embed(x) * 2, embed=nn.Embedding(5, 2)), (torch.zeros(2, 3).long(),))
    good, bad = torch.tensor([[4]]), torch.tensor([[5]])
    assert torch.equal(run_results(subject, [good], pass_name="broken")[0], subject(good)[0])
    with pytest.raises(VerifyError, match=r"\[VERIFY-001\] after pass broken: the program does not run") as caught:
        run_results(subject, [bad], pass_name="broken")
    assert caught.value.where.startswith("%embedding, embed (")
    assert caught.value.why.startswith("IndexError: index out of range")


@pytest.mark.parametrize(
    ("errors", "worst"),
    [
        ([], None),
        ([None, None], None),
        ([0.1, 0.1, 0.4, 0.5], 2),
        ([0.5, 0.4], 0),
        ([0.1, math.nan, math.nan], 1),
        ([None, 0.3], 1),
    ],
)
def test_the_worst_edit_is_the_one_that_raised_the_error_most(errors: list[float | None], worst: int | None) -> None:
    found = worst_edit([edit(index, "node", error=error) for index, error in enumerate(errors)], before=0.1)
    assert (found.index if found is not None else None) == worst


def test_numbers_name_the_rules_and_where_it_is_known_the_edit() -> None:
    numbers = Numbers(0.0, 1.0, None)
    subject = program()
    with pytest.raises(VerifyError) as caught:
        check_exact(numbers, subject, pass_name="test", edits=[edit(0, "a"), edit(1, "b", "other"), edit(2, "c")])
    assert (caught.value.where, caught.value.why) == ("", "the pass's edits: rule 2 times, other 1 times.")
    measured = [edit(0, "a", error=0.0), edit(1, "b", "other", error=0.5)]
    with pytest.raises(VerifyError) as caught:
        check_exact(numbers, subject, pass_name="test", edits=measured)
    assert caught.value.where == "edit 1, other of %b, layer (model.py:3)"
    with pytest.raises(VerifyError) as caught:
        check_exact(numbers, subject, pass_name="test")
    assert caught.value.why == "the pass logged no edit: it went past the rewriter."


def test_errors_in_one_line() -> None:
    assert first_line(ValueError("one\ntwo")) == "ValueError: one"
    assert first_line(KeyError()) == "KeyError"


def test_leftovers_of_the_exporter_are_illegal_once_canonical() -> None:
    subject = program()
    swap(aten.lift_fresh_copy.default)(subject)
    check_structure(subject, pass_name="early")
    subject.stage = Stage.CANONICAL
    with pytest.raises(VerifyError, match=r"aten.lift_fresh_copy.default, which the exporter left behind, is not"):
        check_structure(subject, pass_name="late")


def test_arithmetic_on_sizes_is_legal() -> None:
    subject = capture(One(lambda self, x: x[:, : max(x.shape[1] // 2, 1)]), (X,))
    assert "torch.sym_max" in str(subject)
    check_structure(subject, pass_name="test")


def test_seeded_inputs_repeat_and_fit() -> None:
    subject = canonical("gpt2")
    tokens, mask, positions = seeded_inputs(subject, seed=3)
    assert torch.equal(tokens, seeded_inputs(subject, seed=3)[0])
    assert not torch.equal(tokens, seeded_inputs(subject, seed=4)[0])
    assert tokens.shape == mask.shape == positions.shape == (2, 17)
    assert mask.sum(1).tolist() == [14, 17]
    assert positions[0].tolist() == [0, 0, 0, *range(14)]
    assert 0 <= int(tokens.min()) <= int(tokens.max()) < 64  # the smaller of two tables, words and positions


def test_seeded_inputs_of_other_modules() -> None:
    module = Two(lambda self, x, y: x * y)
    examples = (torch.zeros(2, 3, dtype=torch.float64), torch.ones(2, 3) > 0)
    x, y = seeded_inputs(capture(module, examples, dims={"x": {0: "B"}, "y": {0: "B"}}), seed=0)
    assert (x.dtype, x.shape) == (torch.float64, (2, 3))
    assert (y.dtype, bool(y.all())) == (torch.bool, True)


def identity(*tensors: Tensor) -> Program:
    body = Two(lambda self, x, y: (x + 0, y + 0)) if len(tensors) == 2 else One(lambda self, x: x + 0)
    return capture(body, tuple(tensors), dims={})


def compare(program: Program, reference: list[Tensor], inputs: list[Tensor]) -> Numbers:
    return difference(results_of(program, inputs), reference)


def test_numbers_by_hand() -> None:
    reference = torch.tensor([3.0, 4.0, 0.0])
    numbers = compare(identity(reference), [torch.tensor([3.0, 4.0, -1.0])], [reference])
    assert numbers.relative == pytest.approx(1 / math.sqrt(26))
    assert numbers.largest == pytest.approx(1 / 4)
    assert numbers.divergence is None


def test_divergence_of_next_token_distributions() -> None:
    reference, result = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    p, q = reference.double().softmax(-1), result.double().softmax(-1)
    by_hand = float((p * (p / q).log()).sum(-1).mean())
    assert compare(identity(result), [reference], [result]).divergence == pytest.approx(by_hand)


def test_infinities_and_nan_are_met_by_the_same() -> None:
    x = torch.tensor([[[1.0, -math.inf, math.nan, 2.0]]])
    numbers = compare(identity(x), [x.clone()], [x])
    assert (numbers.relative, numbers.largest) == (0.0, 0.0)
    y = torch.tensor([[[1.0, -math.inf, 0.0]]])
    assert compare(identity(y), [y.clone()], [y]).divergence == 0.0


def test_results_at_padding_are_nobodys() -> None:
    class Shares(nn.Module):
        def forward(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
            return tokens[..., None] / attention_mask[..., None]

    tokens, mask = torch.ones(2, 3), torch.tensor([[0.0, 1, 1], [1, 1, 1]])
    program = capture(Shares(), {"tokens": tokens, "attention_mask": mask})
    (found,) = results_of(program, [tokens, mask])
    assert found.shape == (1, 5, 1)
    assert bool((found == 1).all())


@pytest.mark.parametrize("order", [1, -1])
def test_nan_in_any_result_is_a_difference(order: int) -> None:
    good, bad = torch.ones(2), torch.tensor([1.0, math.nan])
    inputs = [good, bad][::order]
    numbers = compare(identity(*inputs), [torch.ones(2), torch.ones(2)], inputs)
    assert math.isnan(numbers.largest)
    with pytest.raises(VerifyError, match="VERIFY-002"):
        check_exact(numbers, identity(good), pass_name="test")


def test_empty_results_and_tokens_can_be_compared() -> None:
    empty, tokens = torch.ones(0), torch.tensor([1, 2])
    assert compare(identity(empty, tokens), [empty, torch.tensor([1, 3])], [empty, tokens]).largest == pytest.approx(
        1 / 3
    )


@pytest.mark.parametrize("dtype", EXACT_TOLERANCE)
def test_exact_means_within_rounding_of_the_weights_dtype(dtype: torch.dtype) -> None:
    subject = capture(nn.Linear(2, 2).to(dtype), (torch.zeros(1, 2, dtype=dtype),))
    allowed = EXACT_TOLERANCE[dtype]
    check_exact(Numbers(0.0, allowed, None), subject, pass_name="test")
    with pytest.raises(VerifyError) as caught:
        check_exact(Numbers(0.0, allowed * 1.01, None), subject, pass_name="test")
    assert f"changed the results by {allowed * 1.01:.2e}" in caught.value.what
    assert torch.finfo(dtype).eps < allowed <= 1e5 * torch.finfo(dtype).eps
