"""Attention on the CPU: the compiled kernel for few tokens, PyTorch's for many."""

import pytest
import torch

from skink.kernels import ATTENTION
from skink.kernels.cpp.library import library
from tests.kernels.attention.cases import Case, cases, formula
from tests.kernels.closeness import assert_close


@pytest.fixture(autouse=True)
def built() -> None:
    if not library().available:
        pytest.skip(library().reason)


@pytest.mark.parametrize("case", cases(), ids=str)
def test_the_formula(case: Case) -> None:
    from skink.kernels.attention.cpu import attention

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        tensors, options = case.arguments(dtype)
        exact = formula(*(t if t is None or t.dtype is torch.bool else t.double() for t in tensors), **options)
        found = attention(*tensors, **options)
        assert found.dtype is dtype
        assert_close(ATTENTION, found, exact)


@pytest.mark.parametrize(
    ("case", "streamed"),
    [
        (Case(tokens=(16, 40)), True),
        (Case(tokens=(17, 40)), False),
        (Case(tokens=(17, 40), softcap=2.0), True),
        (Case(tokens=(17, 40), sinks=True), True),
        (Case(tokens=(17, 40), alibi=True), False),
    ],
)
def test_which_kernel_serves(monkeypatch: pytest.MonkeyPatch, case: Case, streamed: bool) -> None:
    from skink.kernels.attention import cpu

    served = []
    for name in ("_streaming", "blocked"):
        kernel = getattr(cpu, name)
        monkeypatch.setattr(cpu, name, lambda *a, run=kernel, n=name, **k: served.append(n) or run(*a, **k))
    tensors, options = case.arguments(torch.float32)
    cpu.attention(*tensors, **options)
    assert served == ["_streaming" if streamed else "blocked"]
