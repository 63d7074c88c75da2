"""A pipeline that fails, and the folder that it leaves."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from skink.errors import VerifyError
from skink.graph.pipeline import Pipeline
from skink.graph.program import Program
from skink.passes.canonicalize import Canonicalize
from skink.passes.decompose import LowRank
from tests.graph.scaling import Scale

WINDOWS = torch.arange(24).reshape(3, 8)
PADDING = torch.ones_like(WINDOWS).tril(3)
PASSES = (Canonicalize(), LowRank(keep=0.5, targets=("*.mlp.*",)), Scale(factors=(1.0, 3.0)))


def fail(pipeline: Pipeline, program: Program, folder: Path, set_environment: Callable[..., None]) -> Path:
    """The folder that a failure leaves below `folder`."""
    set_environment(SKINK_DUMP=str(folder))
    with pytest.raises(VerifyError) as caught:
        pipeline.run(program, calibration=WINDOWS, padding=PADDING, seed=5)
    (left,) = (path for path in folder.iterdir() if path.is_dir())
    assert f"`skink bisect {left}`" in caught.value.fix
    return left
