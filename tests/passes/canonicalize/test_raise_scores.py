"""Reading what a model does to its scores."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from skink.graph.capture import capture
from skink.graph.pattern import NoMatch, op_name
from skink.graph.program import Program
from skink.passes.canonicalize.raise_scores import Scores, letters, number, read_scores
from tests.modules import One, Three, parameter

Q = torch.randn(2, 4, 5, 8)
DIMS = {"x": {0: "B", 2: "T"}, "y": {0: "B", 2: "T"}, "z": {2: "T", 3: "T"}}


def program_of(body: Callable[..., Tensor], **parts: Tensor | nn.Parameter) -> Program:
    return capture(Three(body, **parts), (Q, Q.clone(), torch.zeros(1, 1, 5, 5)), dims=DIMS)


def read(body: Callable[..., Tensor], **parts: Tensor | nn.Parameter) -> Scores | NoMatch:
    """What is read of scores made of queries, keys and a mask."""
    return read_scores(program_of(body, **parts).graph.output_node().args[0][0])


def product(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-1, -2)


def without_largest(scores: Tensor) -> Tensor:
    return scores - scores.amax(-1, True)


@pytest.mark.parametrize(
    ("body", "scale", "softcap", "kinds"),
    [
        (lambda self, q, k, m: product(q, k), 1.0, 0.0, []),
        (lambda self, q, k, m: 0.5 * product(q, k) / 4, 0.125, 0.0, ["scale", "scale"]),
        (lambda self, q, k, m: product(q, k) * self.two / math.sqrt(16), 0.5, 0.0, ["scale", "scale"]),
        (lambda self, q, k, m: product(q, k) + m, 1.0, 0.0, ["add"]),
        (lambda self, q, k, m: m + product(q, k) * 2.0, 2.0, 0.0, ["scale", "add"]),
        (lambda self, q, k, m: product(q, k) - 1.0, 1.0, 0.0, ["add"]),
        (lambda self, q, k, m: product(q, k) - m, 1.0, 0.0, ["scale", "add", "scale"]),
        (lambda self, q, k, m: (product(q, k) + m) * 3.0, 3.0, 0.0, ["add", "scale"]),
        (lambda self, q, k, m: product(q, k).masked_fill(m > 0, -1e9), 1.0, 0.0, ["fill"]),
        (lambda self, q, k, m: torch.where(m > 0, -1e9, product(q, k)), 1.0, 0.0, ["fill"]),
        (lambda self, q, k, m: torch.where(m > 0, product(q, k), m), 1.0, 0.0, ["keep"]),
        (lambda self, q, k, m: torch.tanh(product(q, k) / 8.0) * 2.0, 0.25, 2.0, ["scale", "scale"]),
        (lambda self, q, k, m: torch.tanh(product(q, k) / 8.0) * 2.0 / 4.0, 0.0625, 0.5, ["scale", "scale", "scale"]),
        (lambda self, q, k, m: product(q, k).double().float(), 1.0, 0.0, []),
        (lambda self, q, k, m: product(q, k).clamp(min=-1e38), 1.0, 0.0, []),
        (lambda self, q, k, m: torch.maximum(product(q, k), self.least), 1.0, 0.0, []),
        (lambda self, q, k, m: without_largest(product(q, k)), 1.0, 0.0, []),
    ],
)
def test_what_is_read(body: Callable[..., Tensor], scale: float, softcap: float, kinds: list[str]) -> None:
    found = read(body, two=torch.tensor([[2.0]]), least=torch.tensor(-1e38))
    assert isinstance(found, Scores)
    assert op_name(found.product) == "matmul"
    assert found.scale == pytest.approx(scale)
    assert found.softcap == pytest.approx(softcap)
    assert [step.kind for step in found.steps] == kinds


def test_a_sum_with_a_factor_on_what_is_added() -> None:
    found = read(
        lambda self, q, k, m: torch.baddbmm(
            m[0], q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2), beta=2.0, alpha=0.5
        ).view(-1, 4, q.shape[2], q.shape[2])
    )
    assert isinstance(found, Scores)
    assert found.scale == 0.5
    assert found.heads is not None
    assert found.heads[1] == 4
    assert [(step.kind, step.flat) for step in found.steps] == [("scale", False), ("add", True), ("scale", False)]


@pytest.mark.parametrize(
    ("body", "reason", "op"),
    [
        (
            lambda self, q, k, m: product(q, k).relu(),
            "relu on the scores' way to the softmax is not understood",
            "relu",
        ),
        (lambda self, q, k, m: product(q, k) * m, "scores are multiplied by something that is no number", "mul"),
        (lambda self, q, k, m: product(q, k) / self.w, "scores are divided by something that is no number", "div"),
        (lambda self, q, k, m: product(q, k).half().long(), "scores are cast to torch.int64", "to"),
        (lambda self, q, k, m: torch.sub(product(q, k), m, alpha=2), "what is taken from the scores is", "sub"),
        (lambda self, q, k, m: product(q, k).clamp(-1e38, 5.0), "scores are bounded", "clamp"),
        (lambda self, q, k, m: product(q, k).tanh().tanh(), "the soft cap comes after a mask or another cap", "tanh"),
        (lambda self, q, k, m: without_largest(product(q, k)).tanh(), "is taken from it before the soft cap", "sub"),
        (lambda self, q, k, m: product(q, k).reshape(-1, q.shape[2]), "scores are reshaped to something", "reshape"),
        (lambda self, q, k, m: m + 1, "placeholder on the scores' way", ""),
        (lambda self, q, k, m: m + self.w, "placeholder on the scores' way", ""),
        (lambda self, q, k, m: torch.einsum("bhtd,bhsd->bhst", q, k), "is not one of [..., T, D]", "einsum"),
        (lambda self, q, k, m: torch.einsum("bhtd,bhsd", q, k), "is not understood", "einsum"),
    ],
)
def test_what_is_not_read_says_where(body: Callable[..., Tensor], reason: str, op: str) -> None:
    found = read(body, w=parameter(1))
    assert isinstance(found, NoMatch)
    assert reason in found.reason
    assert op_name(found.node) == op


def test_numbers() -> None:
    def body(self: One, x: Tensor) -> tuple[Tensor, ...]:
        full = torch.full([], 4.0)
        whole = torch.full([], 1.9).to(torch.int64)
        known = (
            x * whole,
            x * self.one.half(),
            x * full,
            x * full.sqrt(),
            x * self.one[None],
            x * full.half().float().reshape(1, 1),
        )
        return (*known, x * self.two, x * self.weight)

    parts = {"one": torch.tensor([3.0]), "two": torch.tensor([3.0, 4.0]), "weight": parameter(1)}
    program = capture(One(body, **parts), (torch.randn(3, 2),))
    factors = [node.args[1] for node in program.graph.output_node().args[0]]
    assert [number(factor) for factor in factors] == [1.0, 3.0, 4.0, 2.0, 3.0, 4.0, None, None]
    assert (number(2), number(True), number(None)) == (2.0, None, None)


def test_letters() -> None:
    assert letters("bhtd, bhsd -> bhts") == ["bhtd", "bhsd", "bhts"]
    for equation in ("bhtd,bhsd", "bbtd,bhsd->bhts", "b...d,b...d->b..."):
        assert letters(equation) is None
