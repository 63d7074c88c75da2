"""Processes that were started together, by `torchrun` or `accelerate launch`, and must meet."""

import torch

from skink.settings import settings
from skink.training.loop.processes import wait_patiently


def wait_for_all(device: str = "cpu") -> None:
    """Go on when all processes that were started together are here, at once where there is one.

    Args:
        device: where they work: who meets before they train is connected for that.
    """
    if settings().processes == 1:
        return
    if not torch.distributed.is_initialized():
        from accelerate import PartialState

        PartialState(cpu=torch.device(device).type == "cpu")
    # The first process measures while the others wait, which may take hours.
    wait_patiently()
