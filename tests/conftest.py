"""What all tests share: a seed, one thread for each worker, and an environment to set."""

import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

# PyTorch's cache of calls on fake tensors costs more than it saves in models as small as those of the tests. It is read
# when torch is imported.
os.environ.setdefault("TORCH_FAKE_TENSOR_DISPATCH_CACHE", "0")

import pytest
import torch
from hypothesis import settings as hypothesis_settings

from skink.kernels.cpp.library import library
from skink.settings import settings
from tests.scheduling import FAMILIES, TogetherScheduling

# The same examples everywhere, however slow the machine is.
hypothesis_settings.register_profile("skink", derandomize=True, deadline=None, max_examples=30)
hypothesis_settings.load_profile("skink")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `--dist loadscope`: what shares a family, or else a file, runs in one process, which makes it only once."""
    if config.getoption("dist") != "loadscope":
        return None
    return TogetherScheduling(config, log)


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        torch.set_num_threads(1)
    # No test depends on how quick this machine is.
    os.environ.setdefault("SKINK_BREAK_EVEN", "off")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def temporary_files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What failures leave in the system's folder for temporary files, and measured times, go where pytest clears up."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("temporary")))
        patch.setenv("SKINK_CACHE", str(tmp_path_factory.mktemp("cache")))
        settings.cache_clear()
        yield


@pytest.fixture(scope="session", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Each family in turn; of session scope, so that all tests of a family run together and capture it once."""
    name: str = request.param
    return name


@pytest.fixture
def set_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Sets `SKINK_...` variables as if the process had begun with them."""

    def forget() -> None:
        settings.cache_clear()
        library.cache_clear()

    def set_variables(**variables: str) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        forget()

    yield set_variables
    monkeypatch.undo()
    forget()
