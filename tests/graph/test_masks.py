"""Masks are classified by what they do, however they are written."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from skink.graph.capture import capture
from skink.graph.masks import MaskKind, Step, classify
from skink.graph.pattern import NoMatch
from skink.graph.program import Program
from tests.modules import One, Two

HEADS = 4


def positions(like: Tensor) -> tuple[Tensor, Tensor]:
    """Of queries, as a column, and of keys."""
    count = torch.arange(like.shape[1])
    return count[:, None], count[None]


def program_of(body: Callable[..., Tensor], *, padded: bool = True, longest: int = 0, **buffers: Any) -> Program:
    """A program whose one result is a mask, made of int64[B, T]."""
    example = torch.ones(2, 5, dtype=torch.int64)
    module = Two(body, **buffers) if padded else One(body, **buffers)
    return capture(module, (example, example.clone())[: 2 if padded else 1])


def asked(body: Callable[..., Tensor], kind: str = "fill", **options: Any) -> MaskKind | NoMatch:
    """What a mask is found to be, on scores [B, 4, T, T]."""
    program = program_of(body, **options)
    (node,) = program.graph.output_node().args[0]
    batch, length = program.graph.find_nodes(op="placeholder")[0].meta["val"].shape
    step = {"fill": Step("fill", node, -1e30), "keep": Step("keep", node, -1e30), "add": Step("add", node)}[kind]
    return classify((step,), (batch, HEADS, length, length), node)


def reason(body: Callable[..., Tensor], kind: str = "fill", **options: Any) -> str:
    found = asked(body, kind, **options)
    assert isinstance(found, NoMatch)
    return found.reason


def future(like: Tensor) -> Tensor:
    query, key = positions(like)
    return key > query


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (lambda self, x: future(x), "fill"),
        (lambda self, x: ~future(x), "keep"),
        (lambda self, x: torch.ones(x.shape[1], x.shape[1]).triu(1) * -1e9, "add"),
        (lambda self, x: torch.full((x.shape[1], x.shape[1]), -torch.inf).triu(1), "add"),
        (lambda self, x: torch.zeros(1, 1, x.shape[1], x.shape[1]).masked_fill(future(x), -1e4), "add"),
        (lambda self, x: torch.ones(x.shape[1], x.shape[1]).cumsum(0).cumsum(1).tril() == 0, "fill"),
    ],
)
def test_causal(body: Callable[..., Tensor], kind: str) -> None:
    assert asked(body, kind, padded=False) == MaskKind(causal=True)


@pytest.mark.parametrize("window", [1, 2, 33, 64, 1000])
def test_windows(window: int) -> None:
    def body(self: Any, x: Tensor) -> Tensor:
        query, key = positions(x)
        return (key <= query) & (key > query - window)

    assert asked(body, "keep", padded=False) == MaskKind(causal=True, window=window)


def test_a_window_that_is_stored() -> None:
    def body(self: Any, x: Tensor) -> Tensor:
        query, key = positions(x)
        return (key <= query) & (query - key < self.window)

    assert asked(body, "keep", padded=False, window=torch.tensor(700)) == MaskKind(causal=True, window=700)


def test_a_window_to_one_side_without_causality() -> None:
    def body(self: Any, x: Tensor) -> Tensor:
        query, key = positions(x)
        return key > query - 3

    assert asked(body, "keep", padded=False) == MaskKind(causal=False, window=3)


@pytest.mark.parametrize(
    ("body", "window"),
    [
        (lambda self, x: self.bias[:, :, : x.shape[1], : x.shape[1]] == 0, 0),
        (lambda self, x: self.local[:, :, : x.shape[1], : x.shape[1]] == 0, 5),
    ],
)
def test_stored_tables(body: Callable[..., Tensor], window: int) -> None:
    ones = torch.ones(1, 1, 48, 48)
    found = asked(body, padded=False, bias=ones.tril(), local=ones.tril() - ones.tril(-5))
    assert found == MaskKind(causal=True, window=window)


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (lambda self, x, m: m[:, None, None] == 0, "fill"),
        (lambda self, x, m: (m != 0).view(m.shape[0], 1, 1, -1), "keep"),
        (lambda self, x, m: (1.0 - m[:, None, None].float()) * torch.finfo(torch.float32).min, "add"),
        (lambda self, x, m: (m[:, None, None].expand(-1, 1, m.shape[1], -1) - 1) * 1e9, "add"),
    ],
)
def test_padding(body: Callable[..., Tensor], kind: str) -> None:
    assert asked(body, kind) == MaskKind(padding="y")


def test_causal_and_padding() -> None:
    found = asked(lambda self, x, m: ~future(x) & (m != 0)[:, None, None], "keep")
    assert found == MaskKind(causal=True, padding="y")


def test_an_input_that_is_read_and_does_not_matter() -> None:
    found = asked(lambda self, x, m: (~future(x) & (m != 0)[:, None, None]) | (x * 0 != 0)[:, None, None], "keep")
    assert found == MaskKind(causal=True, padding="y")


SLOPES = [2.0**-1, 2.0**-3, 0.3, -0.7]


def linear(self: Any, x: Tensor) -> Tensor:
    query, key = positions(x)
    return (torch.tensor(SLOPES)[:, None, None] * (key - query)).masked_fill(future(x), -torch.inf)


@pytest.mark.parametrize(
    "body",
    [
        linear,
        lambda self, x: torch.tensor(SLOPES)[:, None, None] * positions(x)[1] - 1e9 * future(x),
        lambda self, x: torch.where(future(x), -1e9, self.slopes * (positions(x)[1] - x.shape[1] + 1)),
    ],
)
def test_alibi(body: Callable[..., Tensor]) -> None:
    found = asked(body, "add", padded=False, slopes=torch.tensor(SLOPES).view(-1, 1, 1))
    assert isinstance(found, MaskKind)
    assert (found.causal, found.window) == (True, 0)
    assert found.slopes == pytest.approx(SLOPES, rel=1e-5)


def test_alibi_counted_along_the_tokens_that_are_there() -> None:
    def body(self: Any, x: Tensor, m: Tensor) -> Tensor:
        counted = ((m.cumsum(-1) - 1) * m)[:, None, None] * torch.tensor(SLOPES)[:, None, None]
        return torch.where(future(x) | (m == 0)[:, None, None], -1e30, counted)

    found = asked(body, "add")
    assert isinstance(found, MaskKind)
    assert (found.causal, found.padding) == (True, "y")
    assert found.slopes == pytest.approx(SLOPES)


def test_steps_one_after_the_other() -> None:
    program = program_of(lambda self, x, m: (future(x), (m[:, None, None] - 1.0) * 1e9))
    fill, added = program.graph.output_node().args[0]
    batch, length = program.graph.find_nodes(op="placeholder")[0].meta["val"].shape
    steps = (Step("scale", 0.1), Step("fill", fill, -1e9), Step("scale", 0.5), Step("add", added), Step("scale", 0.5))
    assert classify(steps, (batch, HEADS, length, length), fill) == MaskKind(causal=True, padding="y")
    # Less than that, and what is filled in is a score like others.
    assert isinstance(classify((*steps, Step("scale", 1e-6)), (batch, HEADS, length, length), fill), NoMatch)


def test_heads_folded_into_the_batch() -> None:
    program = program_of(lambda self, x: linear(self, x).repeat(x.shape[0], 1, 1), padded=False)
    (node,) = program.graph.output_node().args[0]
    batch, length = program.graph.find_nodes(op="placeholder")[0].meta["val"].shape
    found = classify((Step("add", node, flat=True),), (batch, HEADS, length, length), node)
    assert isinstance(found, MaskKind)
    assert found.slopes == pytest.approx(SLOPES)


def test_no_step_is_no_mask() -> None:
    program = program_of(lambda self, x: x + 1, padded=False)
    assert classify((Step("scale", 2.0),), (1, 2, 3, 3), program.graph.output_node()) == MaskKind()


def test_what_is_known_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from skink.graph import masks

    program = program_of(lambda self, x: (future(x), future(x) | (x < 0)[:, None]), padded=False)
    one, other = program.graph.output_node().args[0]
    batch, length = program.graph.find_nodes(op="placeholder")[0].meta["val"].shape
    shape = (batch, HEADS, length, length)
    assert classify((Step("fill", one, -1e9),), shape, one) == MaskKind(causal=True)
    monkeypatch.setattr(masks._Question, "answer", lambda self: pytest.fail("asked again"))
    assert classify((Step("fill", one, -1e9),), shape, one) == MaskKind(causal=True)
    with pytest.raises(pytest.fail.Exception):
        classify((Step("keep", one, -1e9),), shape, one)
    with pytest.raises(pytest.fail.Exception):
        classify((Step("fill", other, -1e9),), shape, other)


@pytest.mark.parametrize(
    ("body", "kind", "expected"),
    [
        (
            lambda self, x, m: self.bias[: x.shape[1]] + future(x) * -1e9,
            "add",
            "the mask rests on the trained weight bias",
        ),
        (lambda self, x, m: (x > 3)[:, None, None] | (m == 0)[:, None, None], "fill", "more than one input: x and y"),
        (
            lambda self, x, m: (m.sum() > 3) | future(x),
            "fill",
            "treats some heads, padding or lengths in a way of its own",
        ),
        (lambda self, x, m: ~future(x), "fill", "none of causal, causal with a window, and all"),
        (lambda self, x, m: positions(x)[0] // 4 != positions(x)[1] // 4, "fill", "none of causal"),
        (lambda self, x, m: future(x) & (positions(x)[1] > 2), "fill", "none of causal"),
        (lambda self, x, m: future(x) & (torch.arange(4) < 3)[:, None, None], "fill", "some heads"),
        (lambda self, x, m: (positions(x)[1] - positions(x)[0]).float() ** 2 - 1e9 * future(x), "add", "not ALiBi's"),
        (lambda self, x, m: (positions(x)[1] - positions(x)[0]).abs() * 0.1, "add", "not ALiBi's"),
        (
            lambda self, x, m: future(x) & (positions(x)[0] < 30000),
            "fill",
            "a window of 30000, and 8192 is the most tried",
        ),
        (lambda self, x, m: torch.zeros(x.shape[1], x.shape[1]) / 0, "add", "scores that are not numbers"),
    ],
)
def test_other_masks(body: Callable[..., Tensor], kind: str, expected: str) -> None:
    assert expected in reason(body, kind, bias=nn.Parameter(torch.randn(64, 1)))


def distance(like: Tensor) -> Tensor:
    query, key = positions(like)
    return query - key


@pytest.mark.parametrize(
    "far",
    [
        lambda self, x: distance(x) - 50.0 >= 0,
        lambda self, x: distance(x) / 50.0 >= 1,
        lambda self, x: distance(x) * 0.02 >= 1,
        lambda self, x: distance(x) >= self.fifty,
        lambda self, x: distance(x).float().sqrt() >= 7.05,
        lambda self, x: distance(x) >= 400.0 * 2 - 750,
    ],
)
def test_windows_however_their_number_is_written(far: Callable[..., Tensor]) -> None:
    body = lambda self, x, m: future(x) | far(self, x)  # noqa: E731
    assert asked(body, fifty=torch.tensor(50.0)) == MaskKind(causal=True, window=50)


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        # By the values of an input that is no padding mask.
        (lambda self, x, m: future(x) | (x[:, None, :, None] - x[:, None, None] >= 16), "fill"),
        (lambda self, x, m: x[:, None, :, None] // 16 != x[:, None, None] // 16, "fill"),
        (lambda self, x, m: (x == 5000).cumsum(1)[:, None, None] > 0, "fill"),
        # With the length.
        (lambda self, x, m: future(x) | (distance(x) >= 40 + x.shape[1] // 5), "fill"),
        # Only far away, or only in some heads.
        (lambda self, x, m: -0.25 * distance(x).abs().clamp(max=40) - 1e9 * future(x), "add"),
        (lambda self, x, m: -0.3 * (distance(x) - 40).clamp(min=0) - 1e9 * future(x), "add"),
        (lambda self, x, m: future(x) | (distance(x) >= torch.tensor([1000, 50, 50, 50])[:, None, None]), "fill"),
        (lambda self, x, m: future(x) | (positions(x)[0] >= positions(x)[1] + x.shape[1] - 45), "fill"),
    ],
)
def test_masks_that_look_like_others_on_few_tokens(body: Callable[..., Tensor], kind: str) -> None:
    assert reason(body, kind)


def test_scores_that_are_replaced_are_not_masked() -> None:
    program = program_of(lambda self, x: distance(x) > 4, padded=False)
    (node,) = program.graph.output_node().args[0]
    batch, length = program.graph.find_nodes(op="placeholder")[0].meta["val"].shape
    found = classify((Step("fill", node, 0.0),), (batch, HEADS, length, length), node)
    assert isinstance(found, NoMatch)
    assert found.reason == "some scores are replaced, and not masked"


def test_a_mask_given_from_outside() -> None:
    program = capture(One(lambda self, x: x.relu()), (torch.randn(2, 1, 5, 5),), dims={"x": {0: "B", 2: "T", 3: "T"}})
    (node,) = program.graph.output_node().args[0]
    batch, _, length, _ = node.meta["val"].shape
    found = classify((Step("add", node),), (batch, HEADS, length, length), node)
    assert isinstance(found, NoMatch)
    assert found.reason == "the mask depends on x, which is no padding mask [B, S]"


def test_a_table_whose_values_are_not_loaded() -> None:
    body = lambda self, x: self.bias[:, :, : x.shape[1], : x.shape[1]] == 0  # noqa: E731
    found = reason(body, padded=False, bias=torch.ones(1, 1, 48, 48, device="meta"))
    assert found == "the mask rests on bias, whose values are not loaded"
