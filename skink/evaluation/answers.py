"""How often a model finds the true one among four choices.

A choice's score is its log-likelihood after the context, over its length:

    score = 1/bytes(choice) sum over its tokens of log p(token | context, the tokens before it)

in bytes of UTF-8, which no tokenizer changes (as the normalised accuracy of lm-evaluation-harness, Gao et al. 2021).
The model answers with the highest score. Guessing gets a quarter.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from skink.errors import OptionError, check_range
from skink.evaluation.calling import Model, accepted_arguments, device_of, eval_mode, read_whole, weights_dtype
from skink.evaluation.questions import Questions


@dataclass(frozen=True)
class Accuracy:
    """The share of questions answered rightly and all that it depends on.

    Args:
        value: correct answers over questions.
        standard_error: of `value` for other questions of the kind: sqrt(value (1 - value) / (n - 1)); NaN for n = 1.
        n: questions.
        correct: whether each was answered rightly, in the questions' order.
        kind: of the questions.
        questions_hash: SHA-256 of the questions.
        source: name of the text that they were made from.
        data_hash: SHA-256 of that text.
        seed: that they were chosen by.
        dtype: of the model's weights, or of the logits of a callable without weights.
        device: where the model ran.
    """

    value: float
    standard_error: float
    n: int
    correct: tuple[bool, ...]
    kind: str
    questions_hash: str
    source: str
    data_hash: str
    seed: int
    dtype: str
    device: str

    def __str__(self) -> str:
        return (
            f"{100 * self.value:.1f}% ± {100 * self.standard_error:.1f} of {self.n} {self.kind} questions "
            f"(sha256 {self.questions_hash[:12]}; {self.source}; log-likelihood per byte; "
            f"{self.dtype} on {self.device})"
        )


@dataclass(frozen=True)
class Difference:
    """Two models on the same questions, question by question.

    Args:
        value: the second's accuracy less the first's.
        standard_error: of `value`, from the differences of single questions; NaN for n = 1.
        n: questions.
        gained: answered rightly by the second only.
        lost: answered rightly by the first only.
    """

    value: float
    standard_error: float
    n: int
    gained: int
    lost: int

    def __str__(self) -> str:
        return (
            f"{100 * self.value:+.1f} ± {100 * self.standard_error:.1f} points "
            f"({self.gained} gained, {self.lost} lost of {self.n})"
        )


def answer(
    model: Model, questions: Questions, *, batch: int = 32, progress: Callable[[int, int], None] | None = None
) -> Accuracy:
    """A causal language model's accuracy.

    Args:
        model: as `skink.evaluation.perplexity` takes them.
        questions: made with the model's tokenizer.
        batch: choices per forward; those of like length go together, and shorter ones are filled up on the right,
            where a causal model does not see it.
        progress: called with (choices scored, choices) after each batch.

    Raises: OPTION-002 for a batch out of range.
    """
    check_range("batch", batch, low=1, high=2**31)
    flat = [choice for tokens in questions.tokens for choice in tokens]
    accepted, device, dtype = accepted_arguments(model), device_of(model) or torch.device("cpu"), weights_dtype(model)
    sums = torch.zeros(len(flat), dtype=torch.float64)
    order = sorted(range(len(flat)), key=lambda index: len(flat[index][0]))
    with torch.no_grad(), eval_mode(model):
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            # The choice's last token is scored and never read.
            length = max(len(flat[index][0]) for index in chosen) - 1
            ids = torch.tensor([_filled(flat[index][0][:-1], length) for index in chosen], device=device)
            logits = read_whole(model, accepted, ids)
            dtype = dtype or str(logits.dtype).removeprefix("torch.")
            for row, index in enumerate(chosen):
                sums[index] = _log_likelihood(logits[row], *flat[index])
            if progress is not None:
                progress(min(start + batch, len(flat)), len(flat))
    sizes = [len(choice.encode("utf-8", "surrogatepass")) for item in questions.items for choice in item.choices]
    scores = (sums / torch.tensor(sizes, dtype=torch.float64)).view(len(questions), -1)
    # A NaN is no answer: it must not count as the highest score.
    best = scores.nan_to_num(nan=-math.inf, neginf=-math.inf).argmax(dim=1).tolist()
    finite = (~scores.isnan()).any(dim=1).tolist()
    correct = tuple(
        found == item.answer and known for found, item, known in zip(best, questions.items, finite, strict=True)
    )
    value, n = sum(correct) / len(correct), len(correct)
    return Accuracy(
        value=value,
        standard_error=math.sqrt(value * (1 - value) / (n - 1)) if n > 1 else math.nan,
        n=n,
        correct=correct,
        kind=questions.kind,
        questions_hash=questions.sha256,
        source=questions.source,
        data_hash=questions.data_hash,
        seed=questions.seed,
        dtype=dtype,
        device=str(device),
    )


def paired(first: Accuracy, second: Accuracy) -> Difference:
    """How much more often `second` is right than `first`, on the same questions.

    The standard error is that of the mean of n paired differences, each -1, 0 or 1: far smaller than that of either
    accuracy where the two models agree on most questions.

    Raises: OPTION-002 where the questions differ.
    """
    if first.questions_hash != second.questions_hash:
        raise OptionError(
            "OPTION-002",
            f"the accuracies are of different questions: {first.questions_hash[:12]} and {second.questions_hash[:12]}.",
            fix="answer the same questions with both models.",
        )
    gained = sum(two and not one for one, two in zip(first.correct, second.correct, strict=True))
    lost = sum(one and not two for one, two in zip(first.correct, second.correct, strict=True))
    n = first.n
    mean = (gained - lost) / n
    spread = (gained + lost - n * mean**2) / (n - 1) if n > 1 else math.nan
    return Difference(mean, math.sqrt(spread / n), n, gained, lost)


def _filled(ids: tuple[int, ...], length: int) -> list[int]:
    return [*ids, *([ids[0]] * (length - len(ids)))]


def _log_likelihood(logits: Tensor, ids: tuple[int, ...], begin: int) -> float:
    """Sum of log p of `ids` from `begin` on; logits [T, V] are those after each of `ids`."""
    rows = logits[begin - 1 : len(ids) - 1].float()
    targets = torch.tensor(ids[begin:], device=logits.device)
    return rows.log_softmax(dim=-1).gather(1, targets[:, None]).double().sum().item()
