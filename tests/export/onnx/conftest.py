from collections.abc import Iterator

import pytest

from tests.export.onnx.exported import remove_all


@pytest.fixture(scope="session", autouse=True)
def _exported_folders() -> Iterator[None]:
    yield
    remove_all()
