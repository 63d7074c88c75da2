"""Windows hold what they are given."""

import dataclasses

import pytest
import torch

from skink.graph.windows import Windows


def test_tokens_alone_are_windows_without_a_name_or_padding() -> None:
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    windows = Windows(tokens)
    assert windows.tokens is tokens
    assert (windows.source, windows.sha256, windows.padding) == ("", "", None)


def test_windows_do_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Windows(torch.zeros(1, 1)).source = "other"  # type: ignore[misc]
