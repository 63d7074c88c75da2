"""Fixtures: each instruction set in turn, each dtype, and memory that is filled with junk before it is used."""

import ctypes
import sys
from collections.abc import Iterator

import pytest
import torch

from skink.kernels.cpp import library, use_instruction_set


@pytest.fixture
def built() -> None:
    if not library().available:
        pytest.skip(library().reason)


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def instruction_set(request: pytest.FixtureRequest, built: None) -> Iterator[str]:
    if request.param not in library().instruction_sets:
        pytest.skip(f"this processor does not run {request.param}")
    with use_instruction_set(request.param):
        yield request.param


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=[1, 3], ids=["1-thread", "3-threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def junk_in_new_memory() -> Iterator[None]:
    """New tensors and new heap memory hold NaN, so that an element nobody wrote shows."""
    torch.manual_seed(0)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    mallopt = ctypes.CDLL(None).mallopt if sys.platform == "linux" else lambda *_: None
    perturb = -6  # M_PERTURB of malloc.h: fills with the complement of the low byte, where the value is not 0
    mallopt(perturb, 0x100)
    yield
    mallopt(perturb, 0)
    torch.use_deterministic_algorithms(before)
