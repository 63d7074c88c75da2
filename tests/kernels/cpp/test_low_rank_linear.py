"""`skink_cpp::low_rank_linear` against the formula in float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.kernels.cpp.closeness import assert_right, perturbed
from tests.kernels.cpp.threads import same_bits
from tests.kernels.low_rank_linear.cases import exact, operands


def run(*given: Tensor) -> Tensor:
    result: Tensor = torch.ops.skink_cpp.low_rank_linear(*given)
    return result


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 17])
@pytest.mark.parametrize(
    ("width", "rank", "outputs"), [(1, 1, 1), (63, 1, 65), (65, 17, 3), (128, 64, 257), (1021, 31, 40), (16, 33, 16)]
)
def test_odd_sizes(instruction_set: str, dtype: torch.dtype, rows: int, width: int, rank: int, outputs: int) -> None:
    given = operands((rows,), width, rank, outputs, dtype)
    assert_right(run(*given), exact(*given))
    assert_right(run(*given[:3]), exact(*given[:3]))


@pytest.mark.parametrize("rows", [1, 2, 6])
def test_wide_inputs_go_by_in_blocks(instruction_set: str, dtype: torch.dtype, rows: int) -> None:
    given = operands((rows,), 4999, 21, 70, dtype)
    assert_right(run(*given), exact(*given))


@pytest.mark.parametrize("rows", [1, 4])
def test_on_threads(instruction_set: str, dtype: torch.dtype, threads: int, rows: int) -> None:
    given = operands((rows,), 701, 257, 1300, dtype)
    found = run(*given)
    assert_right(found, exact(*given))
    assert all(torch.equal(run(*given), found) for _ in range(3))


def test_threads_that_wait_for_each_other_give_the_same_bits(instruction_set: str, dtype: torch.dtype) -> None:
    sizes = [(200, 150, 330), (513, 97, 40), (64, 300, 700)]
    assert same_bits(run, [operands((1,), width, rank, outputs, dtype) for width, rank, outputs in sizes])


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, :33],
        lambda x: x[::2, 33:],
        lambda x: x.t()[:, :33],
        lambda x: x[:, ::2],
        lambda x: x.view(4, 10, 66).transpose(0, 1)[..., :33],
        lambda x: x[:1, :33].expand(9, 33),
        lambda x: x[3, :33],
    ],
)
def test_views(instruction_set: str, dtype: torch.dtype, view: Callable[[Tensor], Tensor]) -> None:
    x = view(torch.randn(40, 66).to(dtype))
    _, down, up, bias = operands((1,), 33, 5, 20, dtype)
    found = run(x, down, up, bias)
    assert found.is_contiguous()
    assert_right(found, exact(x, down, up, bias))


def test_weights_that_are_views(instruction_set: str, dtype: torch.dtype) -> None:
    x, down, up, bias = operands((2,), 33, 6, 20, dtype)
    wide = torch.randn(20, 50).to(dtype)
    for d, u, b in ((down.t().contiguous().t(), wide[:, 3:9], bias), (down, up.flip(0), wide[:, 0])):
        assert_right(run(x, d, u, b), exact(x, d, u, b))


def test_empty(built: None, dtype: torch.dtype) -> None:
    for lead, width, rank, outputs in (
        ((0,), 5, 2, 3),
        ((2, 0), 5, 2, 3),
        ((2,), 0, 2, 3),
        ((2,), 5, 0, 3),
        ((2,), 5, 2, 0),
    ):
        given = operands(lead, width, rank, outputs, dtype)
        assert_right(run(*given), exact(*given))


def test_numbers_that_are_none_come_through(instruction_set: str, dtype: torch.dtype) -> None:
    x, down, up, bias = operands((3,), 37, 4, 9, dtype)
    x[1, 36] = float("nan")
    found = run(x, down, up, bias)
    assert bool(found[1].isnan().all())
    assert bool(found[::2].isfinite().all())


def test_the_vector_between_is_not_rounded(instruction_set: str) -> None:
    # 1 + 2^-8 needs more digits than bfloat16 has; the second product takes the 1 away again.
    x = torch.tensor([[1.0, 2.0**-8]], dtype=torch.bfloat16)
    down = torch.tensor([[1.0, 1.0], [1.0, 0.0]], dtype=torch.bfloat16)
    up = torch.tensor([[1.0, -1.0]], dtype=torch.bfloat16)
    assert run(x, down, up).item() == 2.0**-8


def test_the_check_sees_a_wrong_element(instruction_set: str, dtype: torch.dtype) -> None:
    given = operands((2,), 65, 7, 33, dtype)
    with pytest.raises(AssertionError, match="off by"):
        assert_right(run(*given), perturbed(exact(*given), dtype))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((torch.ones(2, 4), torch.ones(3, 5), torch.ones(6, 3)), r"down must be \[R, 4\] and up \[O, R\] for input"),
        ((torch.ones(2, 4), torch.ones(3, 4), torch.ones(6, 2)), r"got \[3, 4\] and \[6, 2\]"),
        ((torch.ones(2, 4), torch.ones(4), torch.ones(6, 2)), r"got \[4\] and \[6, 2\]"),
        ((torch.ones(2, 4), torch.ones(3, 4), torch.ones(6, 3), torch.ones(5)), r"bias must be \[6\], got \[5\]"),
        ((torch.ones(2, 4), torch.ones(3, 4).half(), torch.ones(6, 3)), "down must be of the dtype of the first"),
        ((torch.ones(()), torch.ones(3, 4), torch.ones(6, 3)), "at least one dimension"),
        (tuple(torch.ones(2, 2).double() for _ in range(3)), "dtype must be float32, bfloat16 or float16, got Double"),
    ],
)
def test_wrong_arguments(built: None, given: tuple[Tensor, ...], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        run(*given)


def test_traces(built: None, dtype: torch.dtype) -> None:
    torch.library.opcheck(
        torch.ops.skink_cpp.low_rank_linear.default,
        operands((2, 3), 8, 3, 5, dtype),
        test_utils=("test_schema", "test_faketensor"),
    )
