"""`skink_cpp::attention` against softmax attention written query by query in float64."""

import math

import pytest
import torch
from torch import Tensor

from tests.kernels.cpp.closeness import assert_right, perturbed


def expected(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None = None,
    *,
    causal: bool = True,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi: Tensor | None = None,
) -> Tensor:
    batch, heads, tokens, _ = query.shape
    keys = key.shape[2]
    group = heads // key.shape[1]
    result = torch.empty(batch, heads, tokens, value.shape[3], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            k, v = key[b, h // group].double(), value[b, h // group].double()
            for i in range(tokens):
                scores = k @ query[b, h, i].double() * scale
                if softcap:
                    scores = softcap * (scores / softcap).tanh()
                at = keys - tokens + i
                j = torch.arange(keys)
                if alibi is not None:
                    scores = scores + alibi[h].double() * (j - at)
                allowed = torch.ones(keys, dtype=torch.bool)
                if causal:
                    allowed &= j <= at
                if window:
                    allowed &= j > at - window
                if key_mask is not None:
                    allowed &= key_mask[b, -keys:]
                if not allowed.any():
                    result[b, h, i] = v.mean(0) if sinks is None else 0.0
                    continue
                weights = scores.masked_fill(~allowed, -math.inf)
                if sinks is not None:
                    weights = torch.cat((weights, sinks[h : h + 1].double()))
                result[b, h, i] = weights.softmax(0)[:keys] @ v
    return result


def operands(
    shape: tuple[int, int, int, int, int, int, int], dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, key_heads, tokens, keys, width, value_width = shape
    return (
        torch.randn(batch, heads, tokens, width).to(dtype),
        torch.randn(batch, key_heads, keys, width).to(dtype),
        torch.randn(batch, key_heads, keys, value_width).to(dtype),
    )


# B, H, Hk, T, S, D, Dv
SHAPES = [
    (1, 1, 1, 1, 1, 1, 1),
    (2, 4, 4, 1, 63, 64, 64),
    (1, 8, 2, 1, 129, 65, 63),
    (2, 6, 3, 3, 31, 17, 33),
    (1, 7, 1, 5, 130, 80, 16),
    (1, 3, 1, 13, 13, 31, 130),
    (1, 71, 1, 2, 67, 64, 64),
    (3, 2, 2, 16, 257, 128, 128),
    (1, 2, 1, 97, 101, 32, 32),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(instruction_set: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    q, k, v = operands(shape, dtype)
    actual = torch.ops.skink_cpp.attention(q, k, v, scale=shape[5] ** -0.5)
    assert actual.dtype == dtype
    assert_right(actual, expected(q, k, v, scale=shape[5] ** -0.5))


@pytest.mark.parametrize(
    "options",
    [
        {"causal": False},
        {"window": 1},
        {"window": 7},
        {"window": 1000},
        {"window": 7, "causal": False},
        {"softcap": 2.0},
        {"softcap": 50.0, "window": 40},
        {"scale": -0.5},
    ],
)
@pytest.mark.parametrize("shape", [(2, 4, 2, 1, 150, 16, 24), (1, 6, 2, 9, 150, 33, 17)])
def test_options(
    instruction_set: str, dtype: torch.dtype, shape: tuple[int, ...], options: dict[str, float | bool]
) -> None:
    q, k, v = operands(shape, dtype)
    arguments = {"scale": 0.2} | options
    assert_right(torch.ops.skink_cpp.attention(q, k, v, **arguments), expected(q, k, v, **arguments))


@pytest.mark.parametrize("window", [0, 9])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_padding(instruction_set: str, dtype: torch.dtype, window: int, with_sinks: bool) -> None:
    q, k, v = operands((4, 4, 2, 6, 300, 16, 24), dtype)
    mask = torch.ones(4, 311, dtype=torch.bool)
    mask[1, : 11 + 140] = False  # left padding, past a whole block of keys
    mask[2, : 11 + 297] = False  # the first queries see nothing
    mask[3] = torch.rand(311) > 0.5
    sinks = torch.randn(4) if with_sinks else None
    arguments = {"scale": 0.3, "window": window, "sinks": sinks}
    actual = torch.ops.skink_cpp.attention(q, k, v, mask, **arguments)
    assert actual.isfinite().all()
    assert_right(actual, expected(q, k, v, mask, **arguments))


def test_nothing_to_see_at_all(instruction_set: str, dtype: torch.dtype, threads: int) -> None:
    q, k, v = operands((2, 4, 1, 3, 2000, 64, 65), dtype)
    mask = torch.zeros(2, 2000, dtype=torch.bool)
    mean = v.double().mean(2, keepdim=True).expand(2, 4, 3, 65)
    assert_right(torch.ops.skink_cpp.attention(q, k, v, mask, scale=0.1), mean)
    sinks = torch.zeros(4)
    assert torch.ops.skink_cpp.attention(q, k, v, mask, scale=0.1, sinks=sinks).count_nonzero() == 0


@pytest.mark.parametrize("sink", [-100.0, 0.0, 100.0])
def test_sinks(instruction_set: str, dtype: torch.dtype, sink: float) -> None:
    q, k, v = operands((2, 6, 3, 4, 40, 16, 16), dtype)
    sinks = (torch.randn(6) + sink).to(dtype)
    actual = torch.ops.skink_cpp.attention(q, k, v, scale=0.5, sinks=sinks)
    assert_right(actual, expected(q, k, v, scale=0.5, sinks=sinks))


@pytest.mark.parametrize("options", [{}, {"window": 40}, {"causal": False}, {"softcap": 2.0, "window": 90}])
def test_alibi(instruction_set: str, dtype: torch.dtype, options: dict[str, float]) -> None:
    q, k, v = operands((2, 6, 3, 5, 300, 16, 16), dtype)
    mask = torch.ones(2, 300, dtype=torch.bool)
    mask[0, :170] = False
    mask[1, :298] = False  # the first queries see nothing
    arguments = {"scale": 0.5, "alibi": (torch.tensor([2.0**-i for i in range(1, 7)]) / 8).to(dtype), **options}
    actual = torch.ops.skink_cpp.attention(q, k, v, mask, **arguments)
    assert_right(actual, expected(q, k, v, mask, **arguments))


def test_alibi_over_keys_split_over_threads(instruction_set: str, threads: int) -> None:
    q, k, v = operands((1, 4, 1, 1, 5000, 64, 64))
    alibi = torch.tensor([0.5, 0.01, 0.0, -0.002])
    actual = torch.ops.skink_cpp.attention(q, k, v, scale=0.2, alibi=alibi)
    assert_right(actual, expected(q, k, v, scale=0.2, alibi=alibi))


@pytest.mark.parametrize("shape", [(1, 4, 1, 1, 5000, 64, 64), (1, 2, 1, 40, 1500, 32, 40), (5, 2, 2, 1, 1111, 32, 32)])
@pytest.mark.parametrize("options", [{}, {"window": 900}])
def test_many_keys_split_over_threads(
    instruction_set: str, threads: int, shape: tuple[int, ...], options: dict[str, int]
) -> None:
    q, k, v = operands(shape)
    mask = torch.rand(shape[0], shape[4]) > 0.2
    mask[:, :300] = False
    actual = torch.ops.skink_cpp.attention(q, k, v, mask, scale=0.4, **options)
    assert_right(actual, expected(q, k, v, mask, scale=0.4, **options))


def test_large_scores_do_not_overflow(instruction_set: str, dtype: torch.dtype) -> None:
    q, k, v = operands((1, 2, 1, 2, 200, 16, 16), dtype)
    q, k = q.sign(), k.sign()  # whole numbers, so that the scores are exact
    assert_right(torch.ops.skink_cpp.attention(q, k, v, scale=1000.0), expected(q, k, v, scale=1000.0))


def test_a_broken_query_shows(instruction_set: str, dtype: torch.dtype) -> None:
    q, k, v = operands((1, 2, 1, 2, 200, 16, 16), dtype)
    q[0, 1, 0, 3] = math.nan
    actual = torch.ops.skink_cpp.attention(q, k, v, scale=0.1)
    assert actual[0, 1, 0].isnan().all()
    assert actual[0, 0].isfinite().all()


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(1, 2),
        lambda x: x[:, :, :, : x.shape[3] // 2],
        lambda x: x.transpose(2, 3),
        lambda x: x[:, :, ::2],
        lambda x: x[:1].expand(x.shape),
    ],
)
def test_views(instruction_set: str, dtype: torch.dtype, view: object) -> None:
    q, k, v = (view(x) for x in operands((2, 20, 20, 20, 20, 20, 20), dtype))
    mask = (torch.rand(40, 2) > 0.3).t()[:, ::2]
    mask = None if mask.shape[1] < k.shape[2] else mask
    actual = torch.ops.skink_cpp.attention(q, k, v, mask, scale=0.3)
    assert actual.is_contiguous()
    assert_right(actual, expected(q, k, v, mask, scale=0.3))


@pytest.mark.parametrize(
    "shape",
    [(0, 4, 2, 1, 5, 8, 8), (1, 4, 2, 0, 5, 8, 8), (1, 4, 2, 0, 0, 8, 8), (1, 0, 0, 1, 5, 8, 8), (1, 2, 2, 1, 5, 8, 0)],
)
def test_empty(built: None, shape: tuple[int, ...]) -> None:
    q, k, v = operands(shape)
    result = torch.ops.skink_cpp.attention(q, k, v, scale=1.0)
    assert result.shape == (*q.shape[:3], v.shape[3])


def test_no_features(instruction_set: str) -> None:
    q, k, v = operands((1, 2, 1, 3, 5, 0, 4))
    assert_right(torch.ops.skink_cpp.attention(q, k, v, scale=1.0), expected(q, k, v, scale=1.0))


def test_the_check_sees_a_wrong_element(instruction_set: str, dtype: torch.dtype) -> None:
    q, k, v = operands((1, 2, 1, 3, 50, 16, 16), dtype)
    actual = torch.ops.skink_cpp.attention(q, k, v, scale=0.3)
    with pytest.raises(AssertionError, match="off by"):
        assert_right(actual, perturbed(expected(q, k, v, scale=0.3), dtype))


Q, K = torch.ones(2, 4, 3, 8), torch.ones(2, 2, 5, 8)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((Q[0], K, K), {}, r"must be \[B, H, T, D\]"),
        ((Q, K[:1], K), {}, r"key must be \[B, Hk, S, D\]"),
        ((Q, K[..., :4], K), {}, r"key must be \[B, Hk, S, D\]"),
        ((Q, K, K[:, :, :4]), {}, r"value \[B, Hk, S, Dv\]"),
        ((Q, torch.ones(2, 3, 5, 8), torch.ones(2, 3, 5, 8)), {}, "the 3 key heads must divide the 4 query heads"),
        ((Q, K[:, :, :2], K[:, :, :2]), {}, "at least 3 keys, got 2"),
        ((Q, K.bfloat16(), K), {}, "key must be of the dtype of the first argument, Float, got BFloat16"),
        ((Q.double(), K.double(), K.double()), {}, "dtype must be float32, bfloat16 or float16"),
        ((Q, K, K, torch.ones(2, 4, dtype=torch.bool)), {}, r"key_mask must be bool\[B, M\] with B = 2 and M >= 5"),
        ((Q, K, K, torch.ones(1, 5, dtype=torch.bool)), {}, r"key_mask must be bool\[B, M\]"),
        ((Q, K, K, torch.ones(2, 5)), {}, "key_mask must be bool"),
        ((Q, K, K), {"window": -1}, "window must be 0"),
        ((Q, K, K), {"softcap": -1.0}, "softcap must be 0"),
        ((Q, K, K), {"sinks": torch.ones(2)}, r"sinks must be \[4\], got \[2\]"),
        ((Q, K, K), {"alibi": torch.ones(3)}, r"alibi must be \[4\], got \[3\]"),
    ],
)
def test_wrong_arguments(built: None, arguments: tuple[Tensor, ...], options: dict[str, object], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.skink_cpp.attention(*arguments, scale=1.0, **options)


def test_traces(built: None, dtype: torch.dtype) -> None:
    mask, sinks = torch.ones(2, 9, dtype=torch.bool), torch.ones(4)
    torch.library.opcheck(
        torch.ops.skink_cpp.attention.default,
        (*operands((2, 4, 2, 3, 9, 8, 6), dtype), mask),
        {"scale": 0.5, "window": 4, "softcap": 3.0, "sinks": sinks, "alibi": sinks},
        test_utils=("test_schema", "test_faketensor"),
    )
