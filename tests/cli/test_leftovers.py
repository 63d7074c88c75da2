"""What is left of idioms in a canonical program, each with the reason why."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from skink.cli.leftovers import Leftover, leftovers
from skink.graph.blocks import feed_forward_blocks
from skink.graph.capture import capture
from skink.graph.pipeline import Pipeline
from skink.graph.program import Program
from skink.passes.canonicalize import Canonicalize
from tests.graph.programs import canonical
from tests.modules import One


def _leftovers(program: Program) -> list[Leftover]:
    result = Pipeline((Canonicalize(),)).run(program, verify=0)
    refused = [entry for record in result.passes for entry in record.result.refused]
    return leftovers(program, feed_forward_blocks(program), refused)


def _of(body: Any, *shape: int, **parts: Any) -> list[Leftover]:
    return _leftovers(capture(One(body, **parts), (torch.zeros(*shape or (2, 5, 6)),)))


def test_decoders_leave_nothing_that_should_have_been_raised() -> None:
    for family in ("gpt2", "phi3", "mixtral"):
        program = canonical(family)
        assert leftovers(program, feed_forward_blocks(program), ()) == []


def test_a_routers_softmax_is_where_it_should_be() -> None:
    program = canonical("mixtral")
    softmax = [node for node in program.graph.nodes if node.target is torch.ops.aten.softmax.int]
    assert len(softmax) == 2
    assert [entry.operator for entry in leftovers(program, [], ())] == ["softmax", "softmax"]


def test_a_softmax_that_weighs_nothing() -> None:
    (found,) = _of(lambda m, x: x.softmax(-1))
    assert (found.what, found.operator) == ("attention", "softmax")
    assert found.reason == "nothing that could end its idiom reads it within 6 calls"
    assert found.source.startswith("tests/modules.py:")


def test_the_router_of_experts_that_were_not_raised() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        shares, _ = m.router(x).softmax(-1).topk(2)
        result: Tensor = shares
        return result

    (found,) = _of(body, router=nn.Linear(6, 4))
    assert found.reason == "it is a router's, and the experts behind it were not raised"


def test_a_softmax_over_another_axis() -> None:
    (found,) = _of(lambda m, x: (x @ x.transpose(1, 2)).softmax(1) @ x)
    assert found.what == "attention"
    assert found.reason.endswith("expected, found 1")


def test_a_norm_over_another_axis() -> None:
    found = _of(lambda m, x: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6))
    assert [(entry.what, entry.operator) for entry in found] == [("norm", "rsqrt")]
    assert "expected" in found[0].reason


def test_an_activation_says_why_it_is_in_no_block() -> None:
    (found,) = _of(lambda m, x: functional.silu(m.up(x)), up=nn.Linear(6, 8))
    assert (found.what, found.operator, found.reason) == ("activation", "silu", "no linear layer reads it")


def test_what_a_check_refused_is_told_once() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        # As RMS norm, but for a factor that is computed.
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * x.mean()

    found = _of(body)
    assert [(entry.what, entry.reason) for entry in found] == [("", "the factor is not a weight")]
