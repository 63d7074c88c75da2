"""Token mixing: whole decoders are proven fine, and state is refused where tokens are mixed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from skink.errors import StateError
from skink.graph.capture import capture
from skink.graph.mixing import token_mixing
from skink.graph.program import Program
from skink.graph.rewriter import Rewriter
from skink.graph.state import derive_step
from skink.graph.token_axis import TokenAxis
from tests.graph.tokens import check_by_execution
from tests.modules import One, Two, parameter
from tests.programs import batch, canonical, captured

aten = torch.ops.aten


@pytest.mark.parametrize("make", [captured, canonical])
def test_decoders_mix_tokens_in_attention_only(family: str, make: Callable[[str], Program]) -> None:
    program = make(family)
    mixing = check_by_execution(program, list(batch(2, 7)), length=7)
    assert (mixing.mixes, mixing.origins) == ({}, [])
    assert len(mixing.known) == 2
    (logits,) = program.graph.output_node().args[0]
    assert mixing.token_axis(logits) == TokenAxis(1)
    assert all(mixing.token_axis(node) == TokenAxis(2) for node in mixing.known)


@pytest.mark.parametrize("name", ["rms_norm", "rotary", "experts"])
def test_our_own_ops_are_looked_into(name: str) -> None:
    """An op without state needs no rule: its reference says what it does."""
    op = getattr(torch.ops.skink, name)
    bodies: dict[str, Any] = {
        "rms_norm": lambda m, x: op(x, m.scale, 1e-6),
        "rotary": lambda m, x: op(x[:, None].expand(-1, 2, -1, -1), x, x).transpose(1, 2),
        "experts": lambda m, x: op(
            x.flatten(0, 1),
            *reversed((x.flatten(0, 1) @ m.router).softmax(-1).topk(2)),
            m.up,
            m.down,
            activation="silu",
        ).unflatten(0, x.shape[:2]),
    }
    module = One(
        bodies[name], scale=parameter(8), router=parameter(8, 4), up=parameter(4, 12, 8), down=parameter(4, 8, 6)
    )
    program = capture(module, (torch.randn(2, 3, 8),))
    mixing = check_by_execution(program, [torch.randn(2, 6, 8)], length=6)
    assert program.graph.find_nodes(op="call_function", target=op.default)
    assert mixing.mixes == {}


def mixes(self: Any, x: Tensor) -> Tensor:
    return torch.relu(x - x.mean(1, keepdim=True)) + x.shape[0]


def test_what_reads_mixed_tokens_says_so() -> None:
    program = capture(One(mixes), (torch.randn(2, 3, 4),))
    mixing = token_mixing(program)
    names = {node.name: reason for node, reason in mixing.mixes.items()}
    assert names == {
        "mean": "it works along axis 1 of its argument, which holds the tokens.",
        "sub": "it reads %mean.",
        "relu": "it reads %sub.",
        "add": "it reads %relu.",
    }
    assert [node.name for node in mixing.origins] == ["mean"]


def test_a_program_without_a_dim_of_tokens_has_none() -> None:
    program = capture(One(mixes), (torch.randn(2, 3, 4),), dims={"x": {0: "B"}})
    mixing = token_mixing(program)
    assert mixing.mixes == {}
    assert not any(any(axes) for axes in mixing.axes.values())


def test_an_input_of_pairs_of_tokens_is_refused() -> None:
    examples = (torch.randn(2, 3, 4), torch.randn(2, 3, 3))
    dims = {"x": {0: "B", 1: "T"}, "y": {0: "B", 1: "T", 2: "T"}}
    program = capture(Two(lambda self, x, y: x + y.sum()), examples, dims=dims)
    mixing = token_mixing(program)
    assert [node.target for node in mixing.origins] == ["y"]
    with pytest.raises(StateError, match=r"\[STATE-002\] the input y mixes tokens"):
        derive_step(program)


def step(body: Callable[..., Any], dims: dict[str, dict[int, str]] | None = None, **parts: Any) -> Program:
    def forward(self: Any, x: Tensor) -> Tensor:
        query, key = body(self, x)
        mixed: Tensor = torch.ops.skink.attention(query, key, key, scale=1.0)
        return mixed

    return derive_step(capture(One(forward, **parts), (torch.randn(2, 1, 3, 4),), dims=dims or {"x": {0: "B", 2: "T"}}))


def test_random_numbers_differ_from_step_to_step() -> None:
    program = capture(One(lambda self, x: x * 2), (torch.randn(2, 3, 4),))
    rewriter = Rewriter(program, "test")
    (mul,) = program.graph.find_nodes(op="call_function", target=aten.mul.Tensor)
    with rewriter.before(program.graph.output_node()):
        rewriter.replace(mul, rewriter.call(aten.rand_like.default, mul), rule="test")
    mixing = token_mixing(program)
    assert ["random" in mixing.mixes[node] for node in mixing.origins] == [True]


def test_a_result_that_nobody_reads_may_mix() -> None:
    def body(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        x.cumsum(2)
        return x, x

    assert step(body).state


@pytest.mark.parametrize(
    ("body", "what", "why"),
    [
        (lambda self, x: (x.cumsum(2), x), "aten.cumsum mixes tokens", "it works along axis 2"),
        (lambda self, x: (x, x.flip(2)), "aten.flip mixes tokens", "it works along axis 2"),
        (lambda self, x: (x + torch.arange(x.shape[2])[:, None], x), "aten.arange", "positions are counted"),
        (
            lambda self, x: (x, self.memory.expand(x.shape[0], -1, -1, -1)),
            "skink.attention",
            "remembers axis 2 of its key",
        ),
        (lambda self, x: (x.transpose(1, 2), x.transpose(1, 2)), "skink.attention", "remembers axis 2 of its key"),
        (lambda self, x: (x.transpose(1, 2), x), "skink.attention", "tokens on different axes"),
    ],
    ids=["cumsum", "flip", "positions", "memory", "heads", "queries as heads"],
)
def test_state_is_refused_with_the_node_and_its_line(body: Any, what: str, why: str) -> None:
    with pytest.raises(StateError) as caught:
        step(body, memory=parameter(1, 1, 5, 4))
    assert caught.value.code == "STATE-002"
    assert caught.value.what.startswith(what)
    assert why in caught.value.why
    assert "test_mixing.py:" in caught.value.where
    assert caught.value.where.startswith("%")


def test_attention_over_a_dim_of_another_name_is_refused() -> None:
    with pytest.raises(StateError, match=r"\[STATE-002\] skink.attention"):
        step(lambda self, x: (x, x), dims={"x": {0: "B", 2: "L"}})


class Deep(nn.Module):
    """Mixes tokens in a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = One(lambda self, x: x.cumsum(2))

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = torch.ops.skink.attention(self.inner(x), x, x, scale=1.0)
        return mixed


def test_the_module_is_named() -> None:
    program = capture(Deep(), (torch.randn(2, 1, 3, 4),), dims={"x": {0: "B", 2: "T"}})
    with pytest.raises(StateError) as caught:
        derive_step(program)
    assert caught.value.where.startswith("%cumsum, inner (")
