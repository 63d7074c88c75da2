"""Values of the nodes that a mask rests on."""

from typing import Any

import pytest
import torch
from torch import Tensor, fx

from skink.graph.capture import capture
from skink.graph.mask_values import Evaluation, UnknownMaskError, Values, numbers_at, read_by, stored_tensor
from skink.graph.pattern import op_name
from skink.graph.program import Program
from tests.modules import One

LENGTH = 6


def program_of(body: Any, **parts: Any) -> tuple[Program, fx.Node]:
    """A program of one int64[B, T], and the node of its result."""
    program = capture(One(body, **parts), (torch.ones(2, 5, dtype=torch.int64),))
    return program, program.graph.output_node().args[0][0]


def value(body: Any, given: Values = "ones", turn: int = 0, **parts: Any) -> Tensor:
    program, node = program_of(body, **parts)
    (entry,) = program.graph.find_nodes(op="placeholder")
    batch, length = entry.meta["val"].shape
    sizes = {batch.node.expr: 3, length.node.expr: LENGTH}
    result: Tensor = Evaluation(sizes, {entry: given}, LENGTH, turn).value(node)
    return result


def test_what_inputs_hold() -> None:
    plain = lambda self, x: x + 0  # noqa: E731
    assert torch.equal(value(plain), torch.ones(3, LENGTH, dtype=torch.int64))
    assert value(plain, "counted")[1].tolist() == [0, 1, 2, 3, 4, 5]
    assert value(plain, "padded").tolist() == [[1] * 6, [0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]
    assert value(plain, "padded", turn=1).tolist() == [[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1] * 6]
    drawn = value(plain, "random")
    assert 0 <= int(drawn.min()) < int(drawn.max()) < LENGTH
    assert not torch.equal(drawn, value(plain, "random", turn=1))


def test_sizes_and_weights() -> None:
    found = value(lambda self, x: torch.arange(x.shape[1])[None] * self.scale + x.shape[0], scale=torch.tensor(2.0))
    assert found.tolist() == [[3.0, 5.0, 7.0, 9.0, 11.0, 13.0]]


def test_half_precision_is_kept_wide() -> None:
    found = value(lambda self, x: (x * 0.1).half() * self.third.half(), third=torch.tensor(1 / 3))
    assert found.dtype is torch.float32
    assert float(found[0, 0]) == pytest.approx(0.1 / 3, rel=1e-3)


def test_shapes_are_read_without_values() -> None:
    program, node = program_of(lambda self, x: self.embed(x).new_zeros(1) + x, embed=torch.nn.Embedding(5, 4))
    (called,) = (entry for entry in program.graph.nodes if op_name(entry) == "new_zeros")
    assert read_by(called) == []
    assert [entry.op for entry in read_by(node)] == ["call_function", "placeholder"]
    assert float(value(lambda self, x: torch.zeros_like(x.float() / 0).sum())) == 0.0


def test_numbers_that_could_be_a_window() -> None:
    def body(self: Any, x: Tensor) -> Tensor:
        seen = (x < 7.5) & (x - 9 > 0) & (x.reshape(-1, 1, x.shape[1])[:, 0] * 11 + self.small == 13)
        return seen & (self.wide[0, 3] > x)

    program, _ = program_of(body, small=torch.tensor([17]), wide=torch.ones(1, 19))
    found = {number for node in program.graph.nodes for number in numbers_at(node)}
    assert {8, 9, 13, 17, 19} <= found
    assert 11 not in found


def test_what_fails_says_where() -> None:
    program, node = program_of(lambda self, x: self.table[x], table=torch.ones(2))
    (entry,) = program.graph.find_nodes(op="placeholder")
    evaluation = Evaluation(
        dict.fromkeys((dim.node.expr for dim in entry.meta["val"].shape), 9), {entry: "counted"}, 9, 0
    )
    with pytest.raises(UnknownMaskError, match="could not be evaluated") as raised:
        evaluation.value(node)
    assert raised.value.reason.node is node


def test_stored_tensors() -> None:
    program, _ = program_of(lambda self, x: self.table + x[0, 0], table=torch.arange(3))
    (entry,) = program.graph.find_nodes(op="get_attr")
    assert stored_tensor(entry).tolist() == [0, 1, 2]
    entry.graph.owning_module = None
    with pytest.raises(TypeError, match="no module"):
        stored_tensor(entry)
