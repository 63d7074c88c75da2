"""`skink_cpp::pivoted_linear` against the formula in float64; its products are those of low_rank_linear."""

import pytest
import torch
from torch import Tensor

from tests.kernels.cpp.closeness import assert_right, perturbed
from tests.kernels.cpp.threads import same_bits
from tests.kernels.pivoted_linear.cases import exact, operands


def run(*given: Tensor | None) -> Tensor:
    result: Tensor = torch.ops.skink_cpp.pivoted_linear(*given)
    return result


@pytest.mark.parametrize("rows", [1, 3, 17])
@pytest.mark.parametrize(
    ("width", "rank", "others"), [(1, 1, 1), (63, 1, 65), (65, 17, 3), (128, 64, 257), (1021, 31, 40), (16, 33, 16)]
)
def test_odd_sizes(instruction_set: str, dtype: torch.dtype, rows: int, width: int, rank: int, others: int) -> None:
    given = operands((rows,), width, rank, others, dtype)
    for some in (given, given[:5], given[:3], (*given[:3], given[3], None, given[5]), (*given[:4], given[4])):
        assert_right(run(*some), exact(*some))


@pytest.mark.parametrize("rows", [1, 16])
def test_on_threads(instruction_set: str, dtype: torch.dtype, threads: int, rows: int) -> None:
    given = operands((rows,), 701, 257, 1043, dtype)
    found = run(*given)
    assert_right(found, exact(*given))
    assert all(torch.equal(run(*given), found) for _ in range(3))


def test_threads_that_wait_for_each_other_give_the_same_bits(instruction_set: str, dtype: torch.dtype) -> None:
    sizes = [(200, 150, 330), (513, 97, 40), (64, 300, 700)]
    assert same_bits(run, [operands((1,), width, rank, others, dtype) for width, rank, others in sizes])


def test_an_order_may_take_some_outputs_and_repeat_others(instruction_set: str, dtype: torch.dtype) -> None:
    given = operands((2, 3), 9, 4, 5, dtype)
    for order in ([8, 0, 0], [3], []):
        some = (*given[:5], torch.tensor(order, dtype=torch.int64))
        found = run(*some)
        assert found.shape == (2, 3, len(order))
        if order:
            assert_right(found, exact(*some))


def test_views(instruction_set: str, dtype: torch.dtype) -> None:
    _, kept, rest, kept_bias, rest_bias, order = operands((1,), 33, 6, 20, dtype)
    x = torch.randn(40, 66).to(dtype)
    wide = torch.randn(20, 50).to(dtype)
    for some in (
        (
            x[::2, 33:],
            kept.t().contiguous().t(),
            wide[:, 3:9],
            wide[:6, 0],
            wide[:, 0],
            order.repeat_interleave(2)[::2],
        ),
        (x.t()[:, :33], kept.flip(0), rest, kept_bias, rest_bias, order.flip(0)),
        (x.view(4, 10, 66).transpose(0, 1)[..., :33], kept, rest, kept_bias, rest_bias, None),
        (x[3, :33], kept, rest, None, None, order),
    ):
        found = run(*some)
        assert found.is_contiguous()
        assert_right(found, exact(*some))


def test_empty(built: None, dtype: torch.dtype) -> None:
    for lead, width, rank, others in (
        ((0,), 5, 2, 3),
        ((2, 0), 5, 2, 3),
        ((2,), 0, 2, 3),
        ((2,), 5, 0, 3),
        ((2,), 5, 2, 0),
    ):
        given = operands(lead, width, rank, others, dtype)
        found = run(*given)
        assert found.shape == (*lead, rank + others)
        if found.numel():
            assert_right(found, exact(*given))


def test_numbers_that_are_none_come_through(instruction_set: str, dtype: torch.dtype) -> None:
    x, *stored = operands((3,), 37, 4, 9, dtype)
    x[1, 36] = float("nan")
    found = run(x, *stored)
    assert bool(found[1].isnan().all())
    assert bool(found[::2].isfinite().all())


def test_what_the_second_product_reads_is_not_rounded(instruction_set: str) -> None:
    # 1 + 2^-8 needs more digits than bfloat16 has; the second product takes the 1 away again.
    x = torch.tensor([[1.0, 2.0**-8]], dtype=torch.bfloat16)
    kept = torch.tensor([[1.0, 1.0], [1.0, 0.0]], dtype=torch.bfloat16)
    rest = torch.tensor([[1.0, -1.0]], dtype=torch.bfloat16)
    assert run(x, kept, rest).tolist() == [[1.0, 1.0, 2.0**-8]]


def test_the_check_sees_a_wrong_element(instruction_set: str, dtype: torch.dtype) -> None:
    given = operands((2,), 65, 7, 33, dtype)
    with pytest.raises(AssertionError, match="off by"):
        assert_right(run(*given), perturbed(exact(*given), dtype))


ONES = torch.ones(2, 4), torch.ones(3, 4), torch.ones(6, 3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((*ONES[:1], torch.ones(3, 5), ONES[2]), r"kept must be \[R, 4\] and rest \[S, R\] for input"),
        ((*ONES[:2], torch.ones(6, 2)), r"got \[3, 4\] and \[6, 2\]"),
        ((*ONES, torch.ones(6)), r"kept_bias must be \[3\], got \[6\]"),
        ((*ONES, None, torch.ones(3)), r"rest_bias must be \[6\], got \[3\]"),
        ((*ONES[:2], torch.ones(6, 3).half()), "rest must be of the dtype of the first"),
        ((torch.ones(()), *ONES[1:]), "at least one dimension"),
        ((*ONES, None, None, torch.zeros(2, dtype=torch.int32)), r"order must be int64\[N\] on the cpu, got Int\[2\]"),
        ((*ONES, None, None, torch.zeros(2, 2, dtype=torch.int64)), r"got Long\[2, 2\]"),
        ((*ONES, None, None, torch.tensor([0, 9, 1])), "order must hold numbers from 0 to 8"),
        ((*ONES, None, None, torch.tensor([0, -1])), "order must hold numbers from 0 to 8"),
        ((*ONES, None, None, torch.tensor([0, -(2**63)])), "order must hold numbers from 0 to 8"),
    ],
)
def test_wrong_arguments(built: None, given: tuple[Tensor, ...], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        run(*given)


@pytest.mark.parametrize(("bias", "order"), [(True, True), (False, False)])
def test_traces(built: None, dtype: torch.dtype, bias: bool, order: bool) -> None:
    torch.library.opcheck(
        torch.ops.skink_cpp.pivoted_linear.default,
        operands((2, 3), 8, 3, 5, dtype, bias=bias, order=order),
        test_utils=("test_schema", "test_faketensor"),
    )
