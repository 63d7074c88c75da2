"""How well a model predicts text.

    perplexity = exp(-1/N sum log p(token | the tokens before it in its window))

Every window is scored on its own, from its second token on: N = windows * (length - 1) predictions, each from at most
length - 1 tokens. A perplexity means nothing without its text, windows and dtype: `Perplexity` carries and prints them.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from skink.errors import OptionError, check_range
from skink.evaluation.calling import Model, accepted_arguments, device_of, eval_mode, read_whole, weights_dtype
from skink.evaluation.corpus import Documents, Tokenizer, cut_windows, standard_library, token_stream, window_stride

# Logits turned to float32 at once: 32 MiB, and as much again for their logarithms.
_SLICE = 2**23


@dataclass(frozen=True)
class Perplexity:
    """A perplexity and all that it depends on.

    Args:
        value: exp(nats_per_token); infinite or NaN where the model's logits are.
        nats_per_token: mean negative log-likelihood.
        tokens: predictions scored.
        source: name of the text.
        data_hash: SHA-256 of the documents, or of the windows' ids (int64, little endian) when only these were given.
        length: tokens per window.
        windows: number of windows.
        stride: tokens from the start of one window to the next; None when not known.
        dtype: of the model's weights, or of the logits of a callable without weights.
        device: where the model ran.
        batch: windows per forward.
    """

    value: float
    nats_per_token: float
    tokens: int
    source: str
    data_hash: str
    length: int
    windows: int
    stride: float | None
    dtype: str
    device: str
    batch: int

    def __str__(self) -> str:
        step = "" if self.stride is None else f", one every {self.stride:,.0f} tokens"
        return (
            f"{self.value:.3f} ({self.nats_per_token:.4f} nats per token over {self.tokens:,} tokens; "
            f"{self.source}, sha256 {self.data_hash[:12]}; {self.windows} windows of {self.length}{step}; "
            f"{self.dtype} on {self.device}, batch {self.batch})"
        )


def perplexity(
    model: Model,
    windows: Tensor,
    *,
    documents: Documents | None = None,
    stride: float | None = None,
    batch: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """The perplexity of a causal language model on windows of tokens.

    Args:
        model: called as Hugging Face models are, with those of input_ids, attention_mask, position_ids and
            use_cache=False that its signature names; or any callable from ids [B, T] to logits [B, T, V]. A module
            runs on its own device, in eval mode.
        windows: int64 [windows, length], length at least 2.
        documents: what the windows were cut from, for the record.
        stride: tokens from the start of one window to the next, for the record.
        batch: windows per forward; the last may be smaller.
        progress: called with (windows scored, windows) after each batch.

    Raises: OPTION-002 for windows of the wrong shape or dtype, or a batch out of range.
    """
    check_range("batch", batch, low=1, high=2**31)
    if windows.dim() != 2 or windows.shape[0] < 1 or windows.shape[1] < 2 or windows.dtype != torch.int64:
        given = f"{str(windows.dtype).removeprefix('torch.')}{list(windows.shape)}"
        raise OptionError(
            "OPTION-002",
            f"windows={given} is out of range: int64 [1 or more, 2 or more] is expected.",
            fix="cut them with skink.evaluation.token_windows.",
        )
    count, length = windows.shape
    accepted = accepted_arguments(model)
    device = device_of(model) or windows.device
    total, done, dtype = 0.0, 0, weights_dtype(model)
    with torch.no_grad(), eval_mode(model):
        for start in range(0, count, batch):
            ids = windows[start : start + batch].to(device)
            logits = read_whole(model, accepted, ids)
            total += _negative_log_likelihood(logits, ids)
            dtype = dtype or str(logits.dtype).removeprefix("torch.")
            done += len(ids)
            if progress is not None:
                progress(done, count)
    tokens = count * (length - 1)
    nats = total / tokens
    return Perplexity(
        value=math.inf if nats > 700.0 else math.exp(nats),
        nats_per_token=nats,
        tokens=tokens,
        source="tokens as given" if documents is None else documents.name,
        data_hash=_hash(windows) if documents is None else documents.sha256,
        length=length,
        windows=count,
        stride=stride,
        dtype=dtype,
        device=str(device),
        batch=batch,
    )


def held_out_perplexity(
    model: Model,
    tokenizer: Tokenizer,
    *,
    documents: Documents | None = None,
    length: int = 512,
    count: int | None = 64,
    batch: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """The perplexity on windows evenly spaced over text that the model was not trained or calibrated on.

    Args:
        model: see `perplexity`.
        tokenizer: the model's.
        documents: the text; by default the held-out part of the standard library, which the model that ships has never
            seen (others may have).
        length: tokens per window.
        count: windows, evenly spaced over all tokens; None for all that fit.
        batch: windows per forward.
        progress: called with (windows scored, windows) after each batch.

    Raises: CALIBRATION-001 for too little text; OPTION-002 for an option out of range.
    """
    documents = standard_library("held-out") if documents is None else documents
    stream = token_stream(documents, tokenizer)
    windows = cut_windows(stream, length=length, count=count, name=documents.name)
    step = window_stride(len(stream), length=length, count=count)
    return perplexity(model, windows, documents=documents, stride=step, batch=batch, progress=progress)


def _negative_log_likelihood(logits: Tensor, ids: Tensor) -> float:
    """The sum of -log p of each window's tokens but the first; logits [B, T, V], ids [B, T]."""
    rows = max(1, _SLICE // logits.shape[-1])
    total = 0.0
    for window, targets in zip(logits[:, :-1], ids[:, 1:].to(logits.device), strict=True):
        for start in range(0, len(targets), rows):
            stop = start + rows
            losses = cross_entropy(window[start:stop].float(), targets[start:stop], reduction="none")
            # Added up in float64, so that neither slices nor batches change the result.
            total += losses.double().sum().item()
    return total


def _hash(windows: Tensor) -> str:
    return hashlib.sha256(windows.cpu().contiguous().numpy().astype("<i8").tobytes()).hexdigest()
