"""What a student is trained on: cross-entropy, and how far its distribution is from the teacher's.

With s and t the logits of student and teacher, τ the temperature, q = softmax(s/τ), p = softmax(t/τ), each summed over
the positions that count:

| term       | at one position                                             | source                                   |
| ce         | -log softmax(s)[next token]                                 |                                          |
| kl         | τ² Σ p log(p/q)                                             | Hinton et al. 2015, arXiv 1503.02531     |
| reverse_kl | τ² Σ q log(q/p)                                             | Gu et al. 2023, arXiv 2306.08543         |
| js         | τ² (β Σ p log(p/m) + (1-β) Σ q log(q/m)), m = β p + (1-β) q | Agarwal et al. 2023, arXiv 2306.13649, 1 |

τ² keeps gradients of one size whatever the temperature. `js` is the generalised Jensen-Shannon divergence of GKD: at
β = 1/2 the one of the textbooks; β towards 0 bends it to the forward KL, towards 1 to the reverse.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from skink.errors import OptionError, RecoveryError, check_range

# Most numbers of logits that are worked on at once, in float32: 32 MiB for each buffer, of which a term needs a few.
_CHUNK = 2**23

_ON_LOGITS = ("ce", "kl", "reverse_kl", "js")
_BY_LAYER: tuple[Literal["hidden", "attention"], ...] = ("hidden", "attention")


@dataclass(frozen=True)
class Terms:
    """A weighted sum of terms.

    Args:
        ce: weight of the cross-entropy with the text, nats per token; >= 0, as all weights, and one of them > 0.
        kl: of the forward KL divergence to the teacher's distribution.
        reverse_kl: of the reverse one.
        js: of the generalised Jensen-Shannon divergence.
        hidden: of the relative squared error of layers' outputs (skink/training/losses/places.py).
        attention: of that of attention's outputs.
        temperature: τ of kl, reverse_kl and js, > 0.
        beta: β of js, in (0, 1).

    Raises:
        OptionError: OPTION-002 for numbers out of their range, or all weights 0.
    """

    ce: float = 0.0
    kl: float = 0.0
    reverse_kl: float = 0.0
    js: float = 0.0
    hidden: float = 0.0
    attention: float = 0.0
    temperature: float = 1.0
    beta: float = 0.5

    def __post_init__(self) -> None:
        for name in (*_ON_LOGITS, *_BY_LAYER):
            check_range(name, getattr(self, name), low=0, high=float("inf"), open_high=True)
        check_range("temperature", self.temperature, low=0, high=float("inf"), open_low=True, open_high=True)
        check_range("beta", self.beta, low=0, high=1, open_low=True, open_high=True)
        if not self.weights():
            raise OptionError(
                "OPTION-002",
                "no term of the loss has a weight above 0.",
                fix=f"give a weight to one of {', '.join((*_ON_LOGITS, *_BY_LAYER))}: ce=1, say.",
            )

    def weights(self) -> dict[str, float]:
        """The terms that count, with their weights."""
        return {name: weight for name in (*_ON_LOGITS, *_BY_LAYER) if (weight := float(getattr(self, name)))}

    @property
    def on_logits(self) -> tuple[str, ...]:
        """The terms that read logits."""
        return tuple(name for name in self.weights() if name in _ON_LOGITS)

    @property
    def by_layer(self) -> tuple[Literal["hidden", "attention"], ...]:
        """The terms that compare values within the model."""
        return tuple(name for name in _BY_LAYER if getattr(self, name))

    @property
    def compares_logits(self) -> bool:
        """Whether some term reads the teacher's logits."""
        return any(name != "ce" for name in self.on_logits)

    @property
    def needs_teacher(self) -> bool:
        """Whether some term compares with a teacher."""
        return any(name != "ce" for name in self.weights())


def counted_positions(tokens: Tensor, counted: Tensor | None) -> Tensor:
    """Which positions are trained on: bool[B, T], those that are text and followed by text.

    Args:
        tokens: int[B, T].
        counted: nonzero for text, zero for padding, [B, T]; None: all is text.
    """
    pairs = torch.zeros(tokens.shape, dtype=torch.bool, device=tokens.device)
    pairs[:, :-1] = True if counted is None else (counted[:, :-1] != 0) & (counted[:, 1:] != 0)
    return pairs


def logit_sums(
    student: Tensor, teacher: Tensor | None, tokens: Tensor, counted: Tensor | None, terms: Terms
) -> dict[str, Tensor]:
    """Each of the terms on logits, unweighted, summed over the positions that count; and `tokens`, how many these are.

    Computed in float32 (float64 stays), a limited number of positions at once, forward and backward: beside the logits
    and their gradient there is never more than a chunk.

    Args:
        student: float[B, T, V]; gradients flow to it alone.
        teacher: float[B, T, V]; None where no term reads it.
        tokens: int64[B, T]; logits at t are of the token at t + 1.
        counted: nonzero for text and zero for padding, [B, T]; None: all is text.
        terms: which terms.

    Returns:
        Scalars: float32 by term, int64 for `tokens`. A term is infinite where one distribution gives no chance at all
        to what the other expects (logits of -inf); logits that are -inf in both take no part.

    Raises:
        RecoveryError: RECOVER-006 where the teacher's logits are missing or have another shape.
    """
    names = terms.on_logits
    if not terms.compares_logits:
        teacher = None
    elif teacher is None or teacher.shape != student.shape:
        raise _other_logits(student, teacher)
    rows = counted_positions(tokens, counted).reshape(-1).nonzero().squeeze(1)
    labels = tokens.reshape(-1)[rows + 1]
    sums = {"tokens": torch.tensor(len(rows), device=tokens.device)}
    if names:
        found = _Sums.apply(student, teacher, rows, labels, terms)  # type: ignore[no-untyped-call]
        sums = dict(zip(names, found.unbind(), strict=True)) | sums
    return sums


def _other_logits(student: Tensor, teacher: Tensor | None) -> RecoveryError:
    given = "there are none" if teacher is None else f"these are {list(teacher.shape)}"
    return RecoveryError(
        "RECOVER-006",
        f"the loss compares the student's logits {list(student.shape)} with a teacher's, and {given}.",
        fix="take a teacher of the same vocabulary, or train on ce alone.",
    )


class _Sums(torch.autograd.Function):
    """The terms on logits as one float32[terms], whose backward computes the softmaxes anew."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor | None, rows: Tensor, labels: Tensor, terms: Terms
    ) -> Tensor:
        ctx.save_for_backward(student, teacher, rows, labels)
        ctx.terms = terms
        names = terms.on_logits
        totals = torch.zeros(len(names), dtype=_wide(student), device=student.device)
        for _, chunk in _chunks(student, teacher, rows, labels, terms):
            totals += torch.stack([_VALUES[name](chunk).sum() for name in names])
        return totals

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher, rows, labels = ctx.saved_tensors
        result = torch.zeros_like(student, memory_format=torch.contiguous_format)
        flat = result.view(-1, student.shape[-1])
        for part, chunk in _chunks(student, teacher, rows, labels, ctx.terms):
            total = torch.zeros((len(part), flat.shape[1]), dtype=gradient.dtype, device=gradient.device)
            for name, weight in zip(ctx.terms.on_logits, gradient, strict=True):
                total.addcmul_(_GRADIENTS[name](chunk), weight)
            flat[part] = total.to(result.dtype)
        return result, None, None, None, None


def _wide(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


class _Chunk:
    """Some positions of the logits, and what several terms read of them, each made when it is first wanted."""

    def __init__(self, student: Tensor, teacher: Tensor | None, labels: Tensor, terms: Terms) -> None:
        self.labels, self.terms = labels, terms
        self._student, self._teacher = student, teacher

    @cached_property
    def log_share(self) -> Tensor:
        """log softmax(s), without the temperature."""
        return self.log_q if self.terms.temperature == 1.0 else self._student.log_softmax(-1)

    @cached_property
    def log_q(self) -> Tensor:
        """log softmax(s/τ)."""
        return _log_softmax(self._student, self.terms.temperature)

    @cached_property
    def log_p(self) -> Tensor:
        """log softmax(t/τ)."""
        if self._teacher is None:
            raise TypeError("a term that reads the teacher got past the check")
        return _log_softmax(self._teacher, self.terms.temperature)

    @cached_property
    def log_m(self) -> Tensor:
        """log(β p + (1-β) q)."""
        beta = self.terms.beta
        return torch.logaddexp(self.log_p + math.log(beta), self.log_q + math.log1p(-beta))


def _chunks(
    student: Tensor, teacher: Tensor | None, rows: Tensor, labels: Tensor, terms: Terms
) -> Iterator[tuple[Tensor, _Chunk]]:
    """The positions `rows` of the flattened logits, some at a time: which, and what is there."""
    vocabulary, wide = student.shape[-1], _wide(student)
    flat = [logits.detach().reshape(-1, vocabulary) for logits in (student, teacher) if logits is not None]
    size = max(1, _CHUNK // vocabulary)
    for part, names in zip(rows.split(size), labels.split(size), strict=True):
        own, *other = [logits[part].to(wide) for logits in flat]
        yield part, _Chunk(own, other[0] if other else None, names, terms)


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    return (logits if temperature == 1.0 else logits / temperature).log_softmax(-1)


def _mean(log_share: Tensor, values: Tensor) -> Tensor:
    """Σ exp(log_share) values, [N, 1]; what has no chance takes no part, even where its value is not finite."""
    return _weighed(log_share, values).sum(-1, keepdim=True)


def _weighed(log_share: Tensor, values: Tensor) -> Tensor:
    share = log_share.exp()
    # Not share > 0: a share that is not a number must not vanish.
    return torch.where(share == 0, 0.0, share * values)


def _ce(chunk: _Chunk) -> Tensor:
    return -chunk.log_share.gather(1, chunk.labels[:, None])


def _ce_gradient(chunk: _Chunk) -> Tensor:
    share = chunk.log_share.exp()
    return share.scatter_add_(1, chunk.labels[:, None], share.new_full((len(share), 1), -1.0))


def _kl(chunk: _Chunk) -> Tensor:
    return chunk.terms.temperature**2 * _mean(chunk.log_p, chunk.log_p - chunk.log_q)


def _kl_gradient(chunk: _Chunk) -> Tensor:
    return chunk.terms.temperature * (chunk.log_q.exp() - chunk.log_p.exp())


def _reverse_kl(chunk: _Chunk) -> Tensor:
    return chunk.terms.temperature**2 * _mean(chunk.log_q, chunk.log_q - chunk.log_p)


def _reverse_kl_gradient(chunk: _Chunk) -> Tensor:
    difference = chunk.log_q - chunk.log_p
    return chunk.terms.temperature * _weighed(chunk.log_q, difference - _mean(chunk.log_q, difference))


def _js(chunk: _Chunk) -> Tensor:
    beta = chunk.terms.beta
    to_teacher = _mean(chunk.log_p, chunk.log_p - chunk.log_m)
    to_student = _mean(chunk.log_q, chunk.log_q - chunk.log_m)
    return chunk.terms.temperature**2 * (beta * to_teacher + (1 - beta) * to_student)


def _js_gradient(chunk: _Chunk) -> Tensor:
    # What β Σ p log(p/m) and the q of log m give cancels: Σ (β p + (1-β) q) dm/m = Σ dm = 0.
    difference = chunk.log_q - chunk.log_m
    centred = difference - _mean(chunk.log_q, difference)
    return chunk.terms.temperature * (1 - chunk.terms.beta) * _weighed(chunk.log_q, centred)


_VALUES: dict[str, Callable[[_Chunk], Tensor]] = {"ce": _ce, "kl": _kl, "reverse_kl": _reverse_kl, "js": _js}
_GRADIENTS: dict[str, Callable[[_Chunk], Tensor]] = {
    "ce": _ce_gradient,
    "kl": _kl_gradient,
    "reverse_kl": _reverse_kl_gradient,
    "js": _js_gradient,
}
