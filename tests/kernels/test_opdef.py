"""What every op promises: schema, reference, fake, tolerance, cost, gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from skink.kernels import ATTENTION, EXPERTS, LOW_RANK_LINEAR, OPS, RMS_NORM, ROTARY, OpCall, OpDef, find_op
from skink.kernels.cpp.library import Library
from skink.kernels.opdef import cpp_variant, nbytes

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def arguments(op: OpDef, dtype: torch.dtype = torch.float32) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call of every op."""

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64).to(dtype)

    mask = torch.tensor([[True] * 5, [False, False, True, True, True]])
    return {
        "rms_norm": ((random(2, 3, 6), random(6), 1e-5, 1.0), {}),
        "low_rank_linear": ((random(2, 3, 6), random(2, 6), random(5, 2), random(5)), {}),
        "pivoted_linear": (
            (random(2, 3, 6), random(2, 6), random(5, 2), random(2), random(5), torch.tensor([6, 0, 3, 1, 2, 5, 4])),
            {},
        ),
        "rotary": ((random(2, 2, 3, 6), random(2, 3, 4), random(2, 3, 4)), {}),
        "attention": (
            (random(2, 4, 3, 6), random(2, 2, 5, 6), random(2, 2, 5, 4), mask),
            {"scale": 0.4, "window": 4, "softcap": 3.0, "sinks": random(4), "alibi": random(4)},
        ),
        "experts": (
            (
                *(random(5, 6), torch.tensor([[0, 3], [2, 1], [3, 0], [0, 2], [3, 2]]), random(5, 2)),
                *(random(4, 8, 6), random(4, 6, 4), random(4, 8), random(4, 6)),
            ),
            {"activation": "silu", "limit": 2.0, "alpha": 1.7, "shift": 1.0},
        ),
    }[op.name]


@pytest.fixture(params=OPS, ids=lambda op: op.name)
def op(request: pytest.FixtureRequest) -> OpDef:
    found: OpDef = request.param
    return found


def test_ops_are_found_by_what_stands_in_graphs(op: OpDef) -> None:
    assert find_op(op.overload) is op
    assert str(op.overload) == f"skink.{op.name}.default"
    assert find_op(torch.relu) is None
    assert find_op(torch.ops.aten.relu.default) is None
    assert find_op("x") is None


def test_the_op_is_its_reference(op: OpDef) -> None:
    args, kwargs = arguments(op)
    assert torch.equal(op.overload(*args, **kwargs), op.reference(*args, **kwargs))


def test_reference_and_schema_have_the_same_arguments(op: OpDef) -> None:
    import inspect

    parameters = inspect.signature(op.reference).parameters.values()
    schema = op.overload._schema.arguments
    assert [p.name for p in parameters] == [a.name for a in schema]
    assert [p.kind is p.KEYWORD_ONLY for p in parameters] == [a.kwarg_only for a in schema]
    defaults = [a.default_value if a.has_default_value() else inspect.Parameter.empty for a in schema]
    assert [p.default for p in parameters] == defaults


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_fake_is_a_result_without_values(op: OpDef, dtype: torch.dtype) -> None:
    args, kwargs = arguments(op, dtype)
    result, fake = op.reference(*args, **kwargs), op.fake(*args, **kwargs)
    assert (fake.shape, fake.dtype) == (result.shape, result.dtype)
    assert fake.is_contiguous()
    assert result.dtype is dtype


def test_results_keep_the_inputs_dtype_where_others_differ() -> None:
    x = torch.randn(2, 3, 6).bfloat16()
    assert RMS_NORM.overload(x, torch.randn(6), 1e-5).dtype is torch.bfloat16
    heads, table = torch.randn(2, 2, 3, 6).half(), torch.randn(2, 3, 6)
    assert ROTARY.overload(heads, table, table).dtype is torch.float16


def passes_gradients(op: OpDef, kernel: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether gradients with regard to every floating tensor are those of finite differences."""
    bound = op.bind(args, kwargs)
    moving = [name for name, value in bound.items() if isinstance(value, Tensor) and value.is_floating_point()]
    assert len(moving) >= 2

    def call(*values: Tensor) -> Tensor:
        given = {**bound, **dict(zip(moving, values, strict=True))}
        positional = [given[a.name] for a in op.overload._schema.arguments if not a.kwarg_only]
        keywords = {a.name: given[a.name] for a in op.overload._schema.arguments if a.kwarg_only}
        return kernel(*positional, **keywords)

    return torch.autograd.gradcheck(call, [bound[name].clone().requires_grad_() for name in moving])


def test_gradients(op: OpDef) -> None:
    assert passes_gradients(op, op.overload, *arguments(op, torch.float64))


def test_variants_that_say_so_pass_gradients_on(op: OpDef) -> None:
    for variant in op.variants:
        if variant.differentiable:
            args, kwargs = arguments(op, torch.float64)
            if op is ATTENTION:
                kwargs = {"scale": 0.5, "window": 4}
            assert variant.supports(OpCall(op.bind(args, kwargs), torch.device("cpu"))) is None
            assert passes_gradients(op, variant.load(), args, kwargs)


def test_tolerances_are_some_rounding_errors_wide(op: OpDef) -> None:
    assert set(op.tolerance) == set(DTYPES)
    for dtype, allowed in op.tolerance.items():
        unit = torch.finfo(dtype).eps
        assert unit / 4 <= allowed.relative <= max(100 * unit, 1e-12)
        assert 0 < allowed.absolute <= max(100 * unit, 1e-12)


def test_binding_fills_in_defaults() -> None:
    bound = ATTENTION.bind((1, 2, 3), {"scale": 0.5})
    assert bound == {
        "query": 1,
        "key": 2,
        "value": 3,
        "key_mask": None,
        "causal": True,
        "scale": 0.5,
        "window": 0,
        "softcap": 0.0,
        "sinks": None,
        "alibi": None,
    }


def test_dtype_of_a_call() -> None:
    device = torch.device("cpu")
    assert OpCall({"eps": 1.0, "x": torch.zeros(1, dtype=torch.float16)}, device).dtype is torch.float16
    with pytest.raises(TypeError, match="a call without tensors has no dtype"):
        OpCall({"eps": 1.0}, device).dtype  # noqa: B018


def test_bytes() -> None:
    assert nbytes(torch.zeros(2, 3), None, torch.zeros(4, dtype=torch.bfloat16), 3) == 24 + 8


@pytest.mark.parametrize(
    ("op_", "macs", "size"),
    [
        (RMS_NORM, 2 * 36, 4 * (36 + 36 + 6)),
        (LOW_RANK_LINEAR, 6 * 2 * (6 + 5), 4 * (36 + 12 + 10 + 5 + 30)),
        (ROTARY, 2 * 2 * 2 * 3 * 4, 4 * (72 + 72 + 2 * 24)),
        # 2 sequences, 4 heads, 3 queries against 5 keys; 6 features in and 4 out.
        (ATTENTION, 2 * 4 * 3 * 5 * (6 + 4), 4 * (2 * 4 * 3 * 6 + 2 * 2 * 5 * 6 + 2 * 2 * 5 * 4 + 2 * 4 * 3 * 4)),
        # 5 tokens of 6 features choose 2 of 4 experts each; 8 features in between, 4 behind the gate.
        (EXPERTS, 10 * (6 * 8 + 4 * 6), 4 * (4 * (48 + 24 + 8 + 6) + 2 * 30 + 10) + 8 * 10),
    ],
)
def test_cost_by_hand(op_: OpDef, macs: int, size: int) -> None:
    cost = op_.cost(op_.bind(*arguments(op_)))
    assert (cost.macs, cost.bytes) == (macs, size)


def test_causal_prefill_costs_half() -> None:
    query = torch.zeros(1, 2, 8, 4)
    whole = ATTENTION.cost(ATTENTION.bind((query, query, query), {"scale": 1.0, "causal": False}))
    half = ATTENTION.cost(ATTENTION.bind((query, query, query), {"scale": 1.0}))
    assert (whole.macs, half.macs) == (2 * 64 * 8, 64 * 8)


@pytest.mark.parametrize(
    ("dtype", "device", "available", "reason"),
    [
        (torch.float32, "cpu", True, None),
        (torch.float16, "cpu", True, None),
        (torch.float64, "cpu", True, "reads float32, bfloat16 and float16, not float64"),
        (torch.float32, "cuda", True, "runs on cpu, not on cuda"),
        (torch.float32, "cpu", False, "not built"),
    ],
)
def test_what_the_compiled_kernels_refuse(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, device: str, available: bool, reason: str | None
) -> None:
    monkeypatch.setattr("skink.kernels.opdef.library", lambda: Library(available, "" if available else "not built"))
    supports: Callable[[OpCall], str | None] = cpp_variant("rms_norm", lambda call: None).supports
    assert supports(OpCall({"x": torch.zeros(1, dtype=dtype)}, torch.device(device))) == reason
    if reason is None:
        refusing = cpp_variant("rms_norm", lambda call: "is odd").supports
        assert refusing(OpCall({"x": torch.zeros(1, dtype=dtype)}, torch.device(device))) == "is odd"
