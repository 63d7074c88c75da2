"""What the options of training say about the steps of a run: how many windows, at what rate, by what optimizer."""

from collections.abc import Collection

import torch
from torch import nn

from skink.errors import RecoveryError
from skink.graph.windows import Windows
from skink.training.loop.options import TrainOptions
from skink.training.loop.order import Order, text_lengths
from skink.training.loop.schedule import learning_rate


def check_text(text: Windows, what: str = "training") -> None:
    """Refuse text in which there is nothing to read.

    Args:
        text: windows.
        what: it is for, in the message.

    Raises:
        RecoveryError: RECOVER-008.
    """
    if not text.tokens.numel():
        raise RecoveryError("RECOVER-008", f"the {what} text has no window.", fix="give more text.")
    if text.padding is not None and not bool(text.padding.any()):
        raise RecoveryError(
            "RECOVER-008",
            f"the {what} text is padding alone.",
            fix="give padding as an attention mask: 1 for text, 0 for padding.",
        )


def windows_read(text: Windows, order: Order, options: TrainOptions) -> int:
    """How many windows all steps of a run read, those that are read again counted again."""
    if options.steps is not None:
        return options.steps * options.batch
    if options.tokens is None:
        return len(text.tokens)
    return order.places_for(options.tokens, text_lengths(text), text.tokens.shape[1])


def rate_of(step: int, steps: int, options: TrainOptions) -> float:
    """The learning rate of a step; see `learning_rate`."""
    return learning_rate(
        step,
        steps,
        peak=options.learning_rate,
        schedule=options.schedule,
        warmup=options.warmup,
        final=options.final,
    )


def adamw(parameters: Collection[nn.Parameter], options: TrainOptions) -> torch.optim.AdamW:
    """AdamW whose rate each step sets; matrices decay, and norms and biases do not."""
    matrices = [entry for entry in parameters if entry.dim() >= 2]
    others = [entry for entry in parameters if entry.dim() < 2]
    groups = [{"params": matrices, "weight_decay": options.weight_decay}, {"params": others, "weight_decay": 0.0}]
    betas = (options.beta1, options.beta2)
    # The fused form needs no memory beside its state.
    return torch.optim.AdamW(
        [entry for entry in groups if entry["params"]], lr=0.0, betas=betas, eps=options.epsilon, fused=True
    )
