"""Gradients of every op, with regard to every floating tensor, against those of an independent formula in float64."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from skink.kernels import OPS, OpCall, OpDef
from skink.kernels.cpp.library import library
from tests.kernels.calls import BY_NAME, CALLS, Call, random
from tests.kernels.formulas import FORMULAS, in_float64

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def kernels(op: OpDef, arguments: dict[str, Any]) -> Iterator[Callable[..., Tensor]]:
    """The op itself, and every kernel that is to pass gradients on and serves this call."""
    yield op.overload
    for variant in op.variants:
        if variant.differentiable and variant.supports(OpCall(arguments, torch.device("cpu"))) is None:
            yield variant.load()


def invoke(op: OpDef, kernel: Callable[..., Tensor], arguments: dict[str, Any]) -> Tensor:
    schema = op.overload._schema.arguments
    positional = [arguments[a.name] for a in schema if not a.kwarg_only]
    return kernel(*positional, **{a.name: arguments[a.name] for a in schema if a.kwarg_only})


def leaves(arguments: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in arguments.items() if isinstance(value, Tensor) and value.is_floating_point()}


def gradients(
    op: OpDef, kernel: Callable[..., Tensor], arguments: dict[str, Any], upstream: Tensor | None = None
) -> tuple[dict[str, Tensor], Tensor]:
    """Gradients by the names of the arguments, of the sum of the results times `upstream`; and that."""
    moving = {name: value.detach().requires_grad_() for name, value in leaves(arguments).items()}
    result = invoke(op, kernel, {**arguments, **moving})
    if upstream is None:
        upstream = random(9, *result.shape, dtype=result.dtype)
    found = torch.autograd.grad(result, list(moving.values()), upstream.to(result.dtype))
    return dict(zip(moving, found, strict=True)), upstream


def assert_near(op: OpDef, name: str, found: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Within the op's tolerance, relative to the largest entry: a gradient is a sum of many terms."""
    assert found.shape == exact.shape
    assert found.dtype is dtype
    assert bool(found.isfinite().all()), name
    if not exact.numel():
        return
    allowed = op.tolerance[dtype]
    off = (found.double() - exact).abs().max()
    assert off <= 2 * (allowed.absolute + allowed.relative * exact.abs().max()), (name, float(off))


def scattered(value: Any) -> Any:
    """The same tensor, laid out with gaps and its last two dims the other way round."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() == 0:
        return value
    turned = value.mT if value.dim() > 1 else value
    holder = torch.full((*turned.shape, 2), torch.nan, dtype=value.dtype)
    holder[..., 0] = turned
    return holder[..., 0].mT if value.dim() > 1 else holder[..., 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_gradients_are_those_of_the_formula(call: Call, dtype: torch.dtype) -> None:
    op, arguments = BY_NAME[call.op], call.make(dtype)
    _, upstream = gradients(op, op.overload, arguments)
    exact, _ = gradients(op, FORMULAS[op.name], in_float64(arguments), upstream)
    for kernel in kernels(op, arguments):
        found, _ = gradients(op, kernel, arguments, upstream)
        assert found.keys() == exact.keys()
        for name in exact:
            assert_near(op, name, found[name], exact[name], dtype)


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_gradients_do_not_depend_on_the_layout(call: Call) -> None:
    op, arguments = BY_NAME[call.op], call.make(torch.float32)
    spread = {name: scattered(value) for name, value in arguments.items()}
    _, upstream = gradients(op, op.overload, arguments)
    exact, _ = gradients(op, FORMULAS[op.name], in_float64(arguments), upstream)
    for kernel in kernels(op, arguments):
        found, _ = gradients(op, kernel, spread, scattered(upstream))
        for name in exact:
            assert_near(op, name, found[name], exact[name], torch.float32)


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_gradients_are_those_of_finite_differences(call: Call) -> None:
    op, arguments = BY_NAME[call.op], call.make(torch.float64)
    moving = leaves(arguments)
    if not invoke(op, op.overload, arguments).numel():
        return
    for kernel in kernels(op, arguments):

        def run(*values: Tensor, kernel: Callable[..., Tensor] = kernel) -> Tensor:
            return invoke(op, kernel, {**arguments, **dict(zip(moving, values, strict=True))})

        inputs = [value.clone().requires_grad_() for value in moving.values()]
        assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_every_option_of_an_op_is_among_the_calls(op: OpDef) -> None:
    calls = [call.make(torch.float32) for call in CALLS if call.op == op.name]
    for argument in op.overload._schema.arguments:
        given = [calls_arguments[argument.name] for calls_arguments in calls]
        if argument.name == "eps":
            continue
        if any(isinstance(value, Tensor) for value in given):
            assert not argument.has_default_value() or any(value is None for value in given), argument.name
        else:
            assert len(set(given)) > 1, argument.name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BY_NAME)
def test_the_comparison_catches_a_wrong_gradient(name: str, dtype: torch.dtype) -> None:
    op = BY_NAME[name]
    arguments = next(call for call in CALLS if call.op == name).make(dtype)
    exact, _ = gradients(op, FORMULAS[name], in_float64(arguments))
    for entry, gradient in exact.items():
        wrong = gradient.contiguous().clone()
        allowed = op.tolerance[dtype]
        wrong.view(-1)[gradient.numel() // 2] += 5 * (allowed.absolute + allowed.relative * gradient.abs().max())
        with pytest.raises(AssertionError):
            assert_near(op, entry, wrong.to(dtype), gradient, dtype)


@pytest.mark.parametrize("call", CALLS, ids=str)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_training_takes_no_kernel_without_gradients(call: Call, device: str) -> None:
    op = BY_NAME[call.op]
    chosen, refused = op.choose(OpCall(call.make(torch.float32), torch.device(device)), training=True)
    assert chosen is None or chosen.differentiable
    passing = {variant.name: variant.differentiable for variant in op.variants}
    assert all(reason == "has no gradient" for name, reason in refused if not passing[name])


@pytest.mark.parametrize("op", [op for op in OPS if not op.variants[0].differentiable], ids=lambda op: op.name)
def test_inference_takes_compiled_kernels_where_training_does_not(op: OpDef) -> None:
    if not library().available:
        pytest.skip(library().reason)
    call = next(call for call in CALLS if call.op == op.name)
    request = OpCall(call.make(torch.float32), torch.device("cpu"))
    chosen, _ = op.choose(request)
    assert chosen is not None
    assert chosen.name == "cpp"
    trained, _ = op.choose(request, training=True)
    assert trained is None or trained.name == "torch"
