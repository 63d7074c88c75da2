"""Calls of every op with every option: odd sizes, one token and none, empty batches, rows that see nothing."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from skink.kernels import OPS
from tests.kernels.attention import cases as attention_cases
from tests.kernels.experts import cases as experts_cases

BY_NAME = {op.name: op for op in OPS}


@dataclass(frozen=True)
class Call:
    """One call of an op: `make(dtype)` gives its arguments, all by name."""

    op: str
    name: str
    make: Callable[[torch.dtype], dict[str, Any]]

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"


def random(seed: int, *shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Normal numbers, the same for the same seed in every dtype but for rounding."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def of_cases(op: str, cases: list[Any]) -> Iterator[Call]:
    for case in cases:

        def make(dtype: torch.dtype, case: Any = case) -> dict[str, Any]:
            args, kwargs = case.arguments(dtype)
            return BY_NAME[op].bind(args, kwargs)

        yield Call(op, str(case), make)


def attention_calls() -> Iterator[Call]:
    Case = attention_cases.Case
    blind = [Case(tokens=(3, 4), padding=True, window=1), Case(tokens=(1, 1), padding=True, sinks=True)]
    yield from of_cases("attention", [*attention_cases.cases(), *blind])

    def make(dtype: torch.dtype, batch: int = 2, tokens: int = 3, *, masked: bool = False) -> dict[str, Any]:
        arguments = BY_NAME["attention"].bind(
            tuple(random(n, batch, 2, tokens, 4, dtype=dtype) for n in range(3)), {"scale": 0.5}
        )
        if masked:
            # One sequence that is padding from end to end.
            arguments["key_mask"] = torch.tensor([[False], [True]]).expand(batch, tokens)
        return arguments

    yield Call("attention", "no-sequences", lambda dtype: make(dtype, batch=0))
    yield Call("attention", "no-tokens", lambda dtype: make(dtype, tokens=0))
    yield Call("attention", "all-padding", lambda dtype: make(dtype, masked=True))
    for name in ("softcap", "alibi", "sinks"):
        value: Any = 2.0 if name == "softcap" else torch.tensor([0.5, -0.25])

        def with_option(dtype: torch.dtype, name: str = name, value: Any = value) -> dict[str, Any]:
            given = value.to(dtype) if isinstance(value, Tensor) else value
            return {**make(dtype, masked=True), name: given}

        yield Call("attention", f"all-padding-{name}", with_option)


def rms_norm_calls() -> Iterator[Call]:
    for shape in ((2, 3, 8), (1, 1), (7,), (0, 5), (2, 65)):
        for weight in (True, False):
            for offset in (0.0, 1.0) if weight else (0.0,):

                def make(
                    dtype: torch.dtype, shape: tuple[int, ...] = shape, weight: bool = weight, offset: float = offset
                ) -> dict[str, Any]:
                    scaling = random(1, shape[-1], dtype=dtype) if weight else None
                    return {"input": random(0, *shape, dtype=dtype), "weight": scaling, "eps": 1e-5, "offset": offset}

                yield Call("rms_norm", f"{shape}-{'weight' if weight else 'bare'}-{offset:g}", make)
    # What a padded row may be: the root of nothing but eps.
    zeros = random(1, 6, dtype=torch.float64)
    yield Call(
        "rms_norm",
        "zeros",
        lambda dtype: {
            "input": torch.zeros(2, 6, dtype=dtype),
            "weight": zeros.to(dtype),
            "eps": 0.01,
            "offset": 0.0,
        },
    )


def rotary_calls() -> Iterator[Call]:
    for shape, width in (
        ((2, 3, 5, 8), 8),
        ((2, 1, 5, 8), 4),
        ((1, 2, 1, 6), 2),
        ((0, 2, 3, 4), 4),
        ((3, 2, 7, 34), 34),
    ):
        for batch in {1, shape[0]}:
            for interleaved in (False, True):

                def make(
                    dtype: torch.dtype,
                    shape: tuple[int, ...] = shape,
                    table: tuple[int, ...] = (batch, shape[2], width),
                    interleaved: bool = interleaved,
                ) -> dict[str, Any]:
                    cos, sin = (random(n, *table, dtype=dtype) for n in (1, 2))
                    return {"input": random(0, *shape, dtype=dtype), "cos": cos, "sin": sin, "interleaved": interleaved}

                yield Call("rotary", f"{shape}-{width}-{batch}-{'pairs' if interleaved else 'halves'}", make)


def low_rank_calls() -> Iterator[Call]:
    for lead, width, rank, outputs in (
        ((2, 3), 8, 3, 5),
        ((1,), 1, 1, 1),
        ((0, 4), 6, 2, 3),
        ((5,), 13, 7, 11),
        ((2,), 4, 0, 3),
    ):
        for bias in (True, False):

            def make(
                dtype: torch.dtype,
                sizes: tuple[tuple[int, ...], int, int, int] = (lead, width, rank, outputs),
                bias: bool = bias,
            ) -> dict[str, Any]:
                lead, width, rank, outputs = sizes
                return {
                    "input": random(0, *lead, width, dtype=dtype),
                    "down": random(1, rank, width, dtype=dtype, scale=width**-0.5),
                    "up": random(2, outputs, rank, dtype=dtype, scale=max(rank, 1) ** -0.5),
                    "bias": random(3, outputs, dtype=dtype) if bias else None,
                }

            yield Call("low_rank_linear", f"{lead}-{width}x{rank}x{outputs}-{'bias' if bias else 'bare'}", make)


def pivoted_calls() -> Iterator[Call]:
    orders = (None, "shuffled", "some-twice")
    for lead, width, rank, others in (((2, 3), 8, 3, 5), ((1,), 2, 1, 1), ((0, 4), 6, 2, 3), ((5,), 13, 7, 11)):
        for index, order in enumerate(orders):

            def make(
                dtype: torch.dtype,
                sizes: tuple[tuple[int, ...], int, int, int] = (lead, width, rank, others),
                order: str | None = order,
                biases: tuple[bool, bool] = ((True, True), (False, False), (True, False))[index],
            ) -> dict[str, Any]:
                lead, width, rank, others = sizes
                wanted = torch.randperm(rank + others, generator=torch.Generator().manual_seed(4))
                if order == "some-twice":
                    wanted = torch.cat([wanted[:2], wanted[:1]])
                return {
                    "input": random(0, *lead, width, dtype=dtype),
                    "kept": random(1, rank, width, dtype=dtype, scale=width**-0.5),
                    "rest": random(2, others, rank, dtype=dtype, scale=rank**-0.5),
                    "kept_bias": random(3, rank, dtype=dtype) if biases[0] else None,
                    "rest_bias": random(4, others, dtype=dtype) if biases[1] else None,
                    "order": None if order is None else wanted,
                }

            yield Call("pivoted_linear", f"{lead}-{width}x{rank}x{others}-{order}", make)


def expert_calls() -> Iterator[Call]:
    yield from of_cases("experts", experts_cases.cases())

    def none_chosen(dtype: torch.dtype) -> dict[str, Any]:
        args, kwargs = experts_cases.Case(biases=True).arguments(dtype)
        chosen = args[1].clone()
        chosen[0], chosen[1, 0] = -1, 99
        return BY_NAME["experts"].bind((args[0], chosen, *args[2:]), kwargs)

    yield Call("experts", "some-choose-none", none_chosen)


CALLS = [
    *attention_calls(),
    *rms_norm_calls(),
    *rotary_calls(),
    *low_rank_calls(),
    *pivoted_calls(),
    *expert_calls(),
]
