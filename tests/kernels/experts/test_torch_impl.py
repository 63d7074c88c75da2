"""Experts with tokens sorted by expert, against the formula and the reference."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from skink.kernels import EXPERTS
from skink.kernels.experts.reference import experts as reference
from skink.kernels.experts.torch_impl import experts
from tests.kernels.closeness import assert_close
from tests.kernels.experts.cases import Case, cases, formula


@pytest.mark.parametrize("case", cases(), ids=str)
def test_the_formula(case: Case) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        tensors, options = case.arguments(dtype)
        found = experts(*tensors, **options)
        assert found.dtype is dtype
        assert_close(EXPERTS, found, formula(case, tensors))


def test_strided_inputs() -> None:
    tensors, options = Case(biases=True).arguments(torch.float32)
    strided = [t if t is None else t.repeat_interleave(2, -1)[..., ::2] for t in tensors]
    assert not strided[3].is_contiguous()
    torch.testing.assert_close(experts(*strided, **options), experts(*tensors, **options))


def test_a_number_that_is_no_expert_chooses_none() -> None:
    (tokens, chosen, *rest), options = Case().arguments(torch.float64)
    chosen[:, 0], chosen[3, 1] = 4, -1
    torch.testing.assert_close(
        experts(tokens, chosen, *rest, **options), reference(tokens, chosen, *rest, **options), rtol=1e-12, atol=1e-12
    )


class _Products(TorchDispatchMode):
    """Sizes of the weights that products read."""

    def __init__(self) -> None:
        super().__init__()
        self.read: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "mm" in func.__name__:
            self.read.append(tuple(args[1].shape))
        return func(*args, **(kwargs or {}))


def test_one_token_reads_the_weights_of_its_experts_alone() -> None:
    case = Case(tokens=1, experts=9, choices=2)
    tensors, options = case.arguments(torch.float32)
    with _Products() as products:
        experts(*tensors, **options)
    width, inner = case.widths
    assert products.read == [(width, 2 * inner), (inner, width)] * 2


def test_gradients_are_those_of_the_reference() -> None:
    tensors, options = Case(biases=True, tokens=5).arguments(torch.float64)

    def gradients(function: Any) -> tuple[Tensor, ...]:
        inputs = [t.clone().requires_grad_() if t is not None and t.is_floating_point() else t for t in tensors]
        moving = [t for t in inputs if t is not None and t.requires_grad]
        found: tuple[Tensor, ...] = torch.autograd.grad(function(*inputs, **options).square().sum(), moving)
        return found

    for one, other in zip(gradients(experts), gradients(reference), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("training", [False, True])
def test_a_compiled_graph_is_whole(training: bool) -> None:
    tensors, options = Case(biases=True).arguments(torch.float32)
    seen: list[str] = []

    def backend(module: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.extend(str(node.target) for node in module.graph.nodes)
        return module

    tensors[0].requires_grad_(training)
    compiled = torch.compile(lambda *given: experts(*given, **options), fullgraph=True, backend=backend)
    with torch.set_grad_enabled(training):
        found = compiled(*tensors)
    torch.testing.assert_close(found, experts(*tensors, **options))
    assert any("skink_torch" in name for name in seen) is not training
    assert found.requires_grad is training
