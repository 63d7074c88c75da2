"""How fast models generate, measured side by side.

Machines are noisy, and slow down while one measures. So the models take turns, round by round (A B C A B C ...), each
is compared with the first within the same round, and the medians of those ratios are what a comparison should quote.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from skink.errors import ModelError, OptionError, check_range
from skink.evaluation.calling import Model, accepted_arguments, call, device_of, logits_of

State = TypeVar("State")


class GenerationTarget(Protocol[State]):
    """What is measured: a model that reads a prompt, then one token at a time."""

    @property
    def vocabulary(self) -> int:
        """Number of token ids; prompts are drawn below it."""

    def prefill(self, ids: Tensor) -> tuple[Tensor, State]:
        """Read a prompt, int64 [B, T] on the CPU. Returns logits [B, 1 or T, V], and a fresh state."""

    def step(self, token: Tensor, state: State) -> tuple[Tensor, State]:
        """Read one more token, int64 [B, 1] on the logits' device. Returns logits [B, 1, V] and a state."""


@dataclass(frozen=True)
class HuggingFaceCache:
    """The state of a `HuggingFaceTarget`: the model's own cache, and the tokens in it."""

    cache: object
    length: int


class HuggingFaceTarget:
    """A Hugging Face causal language model with its own cache, stepped by `forward` without the overhead of `generate`.

    Args:
        model: in eval mode; gets those of input_ids, attention_mask, position_ids, past_key_values, use_cache and
            logits_to_keep that its signature names.
        vocabulary: number of token ids; by default the configuration's.

    Raises: MODEL-004 for a model that takes no cache, and from `prefill` for one that hands none back.
    """

    def __init__(self, model: Model, *, vocabulary: int | None = None) -> None:
        self.model = model
        self.vocabulary: int = model.config.vocab_size if vocabulary is None else vocabulary  # type: ignore[attr-defined]
        self._accepted = accepted_arguments(model)
        self._device = device_of(model)
        if "past_key_values" not in self._accepted:
            raise self._no_cache("its forward does not name past_key_values.")

    def prefill(self, ids: Tensor) -> tuple[Tensor, HuggingFaceCache]:
        """The logits of the prompt's last token, or of all if the model cannot leave them out, and the filled cache."""
        ids = ids.to(self._device)
        return self._forward(ids, None, 0)

    def step(self, token: Tensor, state: HuggingFaceCache) -> tuple[Tensor, HuggingFaceCache]:
        """The logits [B, 1, V] after one more token [B, 1]. The cache is changed in place."""
        return self._forward(token, state.cache, state.length)

    def _forward(self, ids: Tensor, cache: object, past: int) -> tuple[Tensor, HuggingFaceCache]:
        rows, tokens = ids.shape
        length = past + tokens
        output = call(
            self.model,
            self._accepted,
            input_ids=ids,
            attention_mask=ids.new_ones(rows, length),
            position_ids=torch.arange(past, length, device=ids.device).repeat(rows, 1),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        filled = getattr(output, "past_key_values", None)
        if filled is None:
            raise self._no_cache("forward(..., use_cache=True) returned no past_key_values.")
        return logits_of(output), HuggingFaceCache(filled, length)

    def _no_cache(self, why: str) -> ModelError:
        return ModelError(
            "MODEL-004",
            f"{type(self.model).__name__} keeps no cache, so it cannot generate token by token.",
            why=why,
            fix="measure a decoder that keeps a cache, or write a GenerationTarget for this one.",
        )


@dataclass(frozen=True)
class Spread:
    """A quantity measured once per round."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of the values of all rounds, at least one."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Speed:
    """How fast one model generates, and what was asked of it.

    Args:
        prefill: prompt tokens per second, over all sequences of the batch, until the first new token is known.
        decode: new tokens per second, over all sequences of the batch, after the first.
        first_token: seconds from the prompt to the first new token.
        prefill_ratio: prefill over the baseline's in the same round; above 1 is faster.
        decode_ratio: decode over the baseline's in the same round; above 1 is faster.
        baseline: name of the model that the ratios are to.
        batch: sequences generated at once.
        prompt: tokens of each prompt.
        new_tokens: tokens generated after each prompt.
        rounds: times each model was measured, after a warm-up.
        seed: of the prompts.
    """

    prefill: Spread
    decode: Spread
    first_token: Spread
    prefill_ratio: Spread
    decode_ratio: Spread
    baseline: str
    batch: int
    prompt: int
    new_tokens: int
    rounds: int
    seed: int

    def __str__(self) -> str:
        return (
            f"decode {_text(self.decode)} tokens/s, {self.decode_ratio.median:.2f}x {self.baseline}; "
            f"prefill {_text(self.prefill)} tokens/s, {self.prefill_ratio.median:.2f}x; "
            f"first token {self.first_token.median * 1e3:.1f} ms "
            f"(batch {self.batch}, prompt {self.prompt}, {self.new_tokens} new tokens, medians of {self.rounds} rounds)"
        )


def measure_generation(
    models: Mapping[str, GenerationTarget[Any]],
    *,
    batch: int = 1,
    prompt: int = 128,
    new_tokens: int = 64,
    rounds: int = 7,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Speed]:
    """The speed of each model at greedy generation from the same random prompts, the models taking turns.

    Args:
        models: by name; the first is the baseline of the ratios.
        batch: sequences generated at once.
        prompt: tokens of each prompt.
        new_tokens: tokens to generate, at least 2, because the first belongs to the prefill.
        rounds: measurements of each model; one more before them warms it up and is not counted.
        seed: of the prompts.
        clock: seconds, as of `time.perf_counter`.
        progress: called with (rounds done, rounds and warm-up) after each round.

    Raises: OPTION-002 for no models, or an option out of range.
    """
    if not models:
        raise OptionError("OPTION-002", "models={} is out of range: one or more is expected.", fix="give a model.")
    for name, value in (("batch", batch), ("prompt", prompt), ("rounds", rounds)):
        check_range(name, value, low=1, high=2**31)
    check_range("new_tokens", new_tokens, low=2, high=2**31)
    vocabulary = min(target.vocabulary for target in models.values())
    ids = torch.randint(0, vocabulary, (batch, prompt), generator=torch.Generator().manual_seed(seed))
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    with torch.no_grad():
        for turn in range(rounds + 1):
            for name, target in models.items():
                taken = _generate(target, ids, new_tokens, clock)
                if turn > 0:
                    times[name].append(taken)
            if progress is not None:
                progress(turn + 1, rounds + 1)
    baseline = next(iter(models))
    return {
        name: Speed(
            prefill=Spread.of([batch * prompt / first for first, _ in taken]),
            decode=Spread.of([batch * (new_tokens - 1) / rest for _, rest in taken]),
            first_token=Spread.of([first for first, _ in taken]),
            prefill_ratio=Spread.of([base[0] / own[0] for base, own in zip(times[baseline], taken, strict=True)]),
            decode_ratio=Spread.of([base[1] / own[1] for base, own in zip(times[baseline], taken, strict=True)]),
            baseline=baseline,
            batch=batch,
            prompt=prompt,
            new_tokens=new_tokens,
            rounds=rounds,
            seed=seed,
        )
        for name, taken in times.items()
    }


def _generate(
    target: GenerationTarget[Any], ids: Tensor, new_tokens: int, clock: Callable[[], float]
) -> tuple[float, float]:
    """Seconds to the first new token, and from it to the last."""
    # Not timed: processor caches still hold the model before this one, and who follows whom would show in the ratios.
    logits, state = target.prefill(ids)
    logits, state = target.step(_greedy(logits), state)
    _finish(_greedy(logits))
    start = clock()
    logits, state = target.prefill(ids)
    token = _greedy(logits)
    _finish(token)
    first = clock()
    for _ in range(new_tokens - 1):
        logits, state = target.step(token, state)
        token = _greedy(logits)
    _finish(token)
    return first - start, clock() - first


def _greedy(logits: Tensor) -> Tensor:
    """The likeliest next token of each sequence, [B, 1]."""
    return logits[:, -1].argmax(dim=-1, keepdim=True)


def _finish(token: Tensor) -> None:
    """Wait until a GPU has done what it was told; a CPU has already."""
    if token.is_cuda:
        torch.cuda.synchronize(token.device)


def _text(spread: Spread) -> str:
    return f"{spread.median:,.0f} ({spread.low:,.0f}-{spread.high:,.0f})"
