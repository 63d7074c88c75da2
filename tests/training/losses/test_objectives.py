"""The terms on logits, against formulas in float64, and how much memory they take."""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from skink.errors import OptionError, RecoveryError
from skink.training.losses import objectives
from skink.training.losses.objectives import Terms, counted_positions, logit_sums

ALL = ("ce", "kl", "reverse_kl", "js")


def terms(*names: str, **options: float) -> Terms:
    return Terms(**dict.fromkeys(names, 1.0), **options)


def random(*shape: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def tokens(batch: int, length: int, vocabulary: int) -> Tensor:
    return torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(batch * 100 + length))


def expected(term: str, student: Tensor, teacher: Tensor, label: int, temperature: float, beta: float) -> Tensor:
    """One position, written with probabilities and no logarithm of a softmax; float64[V] each."""
    q = torch.exp(student / temperature) / torch.exp(student / temperature).sum()
    p = torch.exp(teacher / temperature) / torch.exp(teacher / temperature).sum()
    m = beta * p + (1 - beta) * q
    squared = temperature**2
    if term == "ce":
        return -torch.log(torch.exp(student)[label] / torch.exp(student).sum())
    if term == "kl":
        return squared * (p * torch.log(p / q)).sum()
    if term == "reverse_kl":
        return squared * (q * torch.log(q / p)).sum()
    return squared * (beta * (p * torch.log(p / m)).sum() + (1 - beta) * (q * torch.log(q / m)).sum())


def expected_sum(term: str, student: Tensor, teacher: Tensor, ids: Tensor, mask: Tensor, chosen: Terms) -> Tensor:
    total = student.sum() * 0.0
    for row in range(len(ids)):
        for place in range(ids.shape[1] - 1):
            if mask[row, place] and mask[row, place + 1]:
                label = int(ids[row, place + 1])
                one, two = student[row, place], teacher[row, place]
                total = total + expected(term, one, two, label, chosen.temperature, chosen.beta)
    return total


MASKS = {
    "none": [[1, 1, 1, 1, 1], [1, 1, 1, 1, 1]],
    "left": [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]],
    "right": [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]],
    "both": [[0, 1, 1, 1, 0], [0, 0, 0, 0, 1]],
}


@pytest.mark.parametrize("term", ALL)
@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize(("temperature", "beta"), [(1.0, 0.5), (2.5, 0.2), (0.4, 0.9)])
def test_sums_and_gradients_are_those_of_the_formula(
    term: str, padding: str, temperature: float, beta: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Chunks of two positions, so that several are put together.
    monkeypatch.setattr(objectives, "_CHUNK", 14)
    student, teacher = random(2, 5, 7).requires_grad_(), random(2, 5, 7, seed=1)
    ids, mask = tokens(2, 5, 7), torch.tensor(MASKS[padding])
    chosen = terms(term, temperature=temperature, beta=beta)
    found = logit_sums(student, teacher, ids, mask, chosen)
    wanted = expected_sum(term, student, teacher, ids, mask, chosen)
    torch.testing.assert_close(found[term], wanted, rtol=1e-12, atol=1e-12)
    assert int(found["tokens"]) == sum(a * b for row in MASKS[padding] for a, b in itertools.pairwise(row))
    (gradient,) = torch.autograd.grad(3.0 * found[term], student)
    torch.testing.assert_close(gradient, torch.autograd.grad(3.0 * wanted, student)[0], rtol=1e-10, atol=1e-12)


def test_several_terms_have_their_own_weights() -> None:
    student, teacher, ids = random(2, 4, 5).requires_grad_(), random(2, 4, 5, seed=1), tokens(2, 4, 5)
    mask, chosen = torch.ones(2, 4), terms(*ALL, temperature=1.5)
    found = logit_sums(student, teacher, ids, None, chosen)
    wanted = {name: expected_sum(name, student, teacher, ids, mask, chosen) for name in ALL}
    loss = sum((index + 1.0) * found[name] for index, name in enumerate(ALL))
    reference = sum((index + 1.0) * wanted[name] for index, name in enumerate(ALL))
    torch.testing.assert_close(
        torch.autograd.grad(loss, student)[0], torch.autograd.grad(reference, student)[0], rtol=1e-10, atol=1e-12
    )


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 6),
    vocabulary=st.integers(2, 9),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 1000),
    shift=st.sampled_from([0.0, 100.0, -100.0]),
)
def test_any_shape_and_dtype_is_within_rounding(
    batch: int, length: int, vocabulary: int, dtype: torch.dtype, seed: int, shift: float
) -> None:
    student = (random(batch, length, vocabulary, seed=seed) + shift).to(dtype).requires_grad_()
    teacher = random(batch, length, vocabulary, seed=seed + 1).to(dtype)
    ids = tokens(batch, length, vocabulary)
    chosen = terms(*ALL, temperature=2.0)
    found = logit_sums(student, teacher, ids, None, chosen)
    wide = student.detach().double().requires_grad_()
    total = wide.sum() * 0.0
    for name in ALL:
        assert found[name].dtype is torch.float32
        wanted = expected_sum(name, wide, teacher.double(), ids, torch.ones_like(ids), chosen)
        total = total + wanted
        torch.testing.assert_close(found[name].double(), wanted, rtol=1e-5, atol=2e-4)
    (gradient,) = torch.autograd.grad(torch.stack([found[name] for name in ALL]).sum(), student)
    assert gradient.dtype is dtype
    # The gradient is rounded once, to the dtype of the logits.
    size = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(
        gradient.double(), torch.autograd.grad(total, wide)[0], rtol=max(size, 1e-4), atol=max(size * 1e-2, 1e-4)
    )


def test_bfloat16_logits_are_summed_in_float32() -> None:
    student, ids = torch.zeros(1, 4097, 4, dtype=torch.bfloat16), torch.zeros(1, 4097, dtype=torch.int64)
    found = logit_sums(student, None, ids, None, terms("ce"))
    # In bfloat16 the sum would stop growing at 256 or so.
    torch.testing.assert_close(float(found["ce"]), 4096 * math.log(4), rtol=1e-6, atol=0)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_student_like_its_teacher_has_nothing_to_learn(temperature: float, dtype: torch.dtype) -> None:
    logits = random(2, 6, 300, scale=20.0).to(dtype)
    for name in ("kl", "reverse_kl", "js"):
        student = logits.clone().requires_grad_()
        found = logit_sums(student, logits, tokens(2, 6, 300), None, terms(name, temperature=temperature))[name]
        (gradient,) = torch.autograd.grad(found, student)
        exact = name != "js"
        assert abs(float(found.detach())) <= (0.0 if exact else 1e-5)
        assert float(gradient.abs().max()) <= (0.0 if exact else 1e-6)


@pytest.mark.parametrize("mask", [torch.zeros(2, 5, dtype=torch.int64), torch.tensor([[1, 0, 1, 0, 1]] * 2)])
def test_text_without_a_position_that_counts_gives_zeros(mask: Tensor) -> None:
    student = random(2, 5, 7).float().requires_grad_()
    found = logit_sums(student, random(2, 5, 7, seed=1).float(), tokens(2, 5, 7), mask, terms(*ALL))
    assert {name: float(value.detach()) for name, value in found.items()} == dict.fromkeys((*ALL, "tokens"), 0.0)
    (gradient,) = torch.autograd.grad(found["kl"] + found["ce"], student)
    assert not gradient.any()


def test_what_lies_in_padding_plays_no_part() -> None:
    student, teacher, ids = random(1, 5, 7).float(), random(1, 5, 7, seed=1).float(), tokens(1, 5, 7)
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    before = logit_sums(student, teacher, ids, mask, terms(*ALL))
    for logits in (student, teacher):
        logits[:, :2] = torch.nan
    ids[:, :2] = -100
    student.requires_grad_()
    after = logit_sums(student, teacher, ids, mask, terms(*ALL))
    assert before == {name: value.detach() for name, value in after.items()}
    (gradient,) = torch.autograd.grad(after["js"] + after["reverse_kl"] + after["ce"], student)
    assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("term", ALL)
def test_columns_that_no_token_has_may_be_shut_in_both(term: str) -> None:
    """Tables padded to a round size: logits of -inf in the columns behind the vocabulary."""
    student, teacher, ids = random(1, 4, 5), random(1, 4, 5, seed=1), tokens(1, 4, 5)
    shut = torch.full((1, 4, 3), -torch.inf, dtype=torch.float64)
    padded = torch.cat([student, shut], -1).requires_grad_()
    chosen = terms(term, temperature=2.0)
    found = logit_sums(padded, torch.cat([teacher, shut], -1), ids, None, chosen)[term]
    torch.testing.assert_close(found.detach(), logit_sums(student, teacher, ids, None, chosen)[term])
    (gradient,) = torch.autograd.grad(found, padded)
    assert bool(gradient.isfinite().all())
    assert not gradient[..., 5:].any()


def test_what_the_teacher_shuts_the_student_learns_to_shut() -> None:
    student, teacher, ids = random(1, 4, 5).requires_grad_(), random(1, 4, 5, seed=1), tokens(1, 4, 5)
    teacher[..., 4] = -torch.inf
    found = logit_sums(student, teacher, ids, None, terms("kl", "js"))
    (gradient,) = torch.autograd.grad(found["kl"] + found["js"], student)
    assert bool(gradient.isfinite().all())
    assert bool((gradient[:, :-1, 4] > 0).all())


@pytest.mark.parametrize("term", ALL)
@pytest.mark.parametrize("whose", ["student", "teacher"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_not_taken_for_agreement(term: str, whose: str, value: float) -> None:
    logits = {"student": random(1, 3, 7).float(), "teacher": random(1, 3, 7, seed=1).float()}
    logits[whose][0, 1, 2] = value
    student = logits["student"].requires_grad_()
    found = logit_sums(student, logits["teacher"], tokens(1, 3, 7), None, terms(term))[term]
    (gradient,) = torch.autograd.grad(found, student)
    read = term != "ce" or whose == "student"
    assert bool(found.isfinite()) != read
    assert bool(gradient.isfinite().all()) != read


@pytest.mark.parametrize("teacher", [None, torch.zeros(1, 4, 6), torch.zeros(1, 3, 5)])
def test_logits_of_another_vocabulary_are_refused(teacher: Tensor | None) -> None:
    with pytest.raises(RecoveryError, match=r"\[RECOVER-006\].*\[1, 4, 5\]"):
        logit_sums(torch.zeros(1, 4, 5), teacher, tokens(1, 4, 5), None, terms("kl"))


def test_cross_entropy_asks_for_no_teacher() -> None:
    student, ids = random(1, 4, 5), tokens(1, 4, 5)
    found = logit_sums(student, torch.zeros(3), ids, None, terms("ce"))
    torch.testing.assert_close(found["ce"], logit_sums(student, None, ids, None, terms("ce"))["ce"])


class Largest(TorchDispatchMode):
    """The most numbers that one operation puts into memory of its own, logits and their gradient left out."""

    def __init__(self, vocabulary: int, positions: int) -> None:
        super().__init__()
        self.whole, self.numbers, self.wholes = vocabulary * positions, 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result._base is None and not function.is_view:
            if result.numel() == self.whole:
                self.wholes += 1
            else:
                self.numbers = max(self.numbers, result.numel())
        return result


def test_memory_is_bounded_by_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary, length, chunk = 500, 64, 2000
    monkeypatch.setattr(objectives, "_CHUNK", chunk)
    student = random(2, length, vocabulary).bfloat16().requires_grad_()
    teacher, ids = random(2, length, vocabulary, seed=1).bfloat16(), tokens(2, length, vocabulary)
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in (student.untyped_storage().data_ptr(), teacher.data_ptr()):
            saved.append(tensor.numel())
        return tensor

    with Largest(vocabulary, 2 * length) as largest:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            found = logit_sums(student, teacher, ids, None, terms(*ALL, temperature=2.0))
            loss = torch.stack([found[name] for name in ALL]).sum()
        assert largest.wholes == 0
        loss.backward()
    assert largest.numbers <= chunk
    # The gradient of the logits, once.
    assert largest.wholes == 1
    # Which positions, and their labels.
    assert max(saved) == 2 * (length - 1)


def test_counted_positions_are_text_followed_by_text() -> None:
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0]])
    assert counted_positions(mask, mask).tolist() == [[False, True, True, False], [True, False, False, False]]
    assert counted_positions(mask, None).tolist() == [[True, True, True, False]] * 2


def test_terms_say_what_they_need() -> None:
    assert Terms(ce=1.0).weights() == {"ce": 1.0}
    assert not Terms(ce=1.0).needs_teacher
    chosen = Terms(ce=1.0, kl=0.5, hidden=2.0)
    assert (chosen.on_logits, chosen.by_layer) == (("ce", "kl"), ("hidden",))
    assert chosen.needs_teacher
    assert chosen.compares_logits
    assert not Terms(ce=1.0, attention=1.0).compares_logits


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "no term of the loss has a weight above 0"),
        ({"kl": -1.0}, r"kl=-1.0 is out of range \[0, inf\)"),
        ({"ce": math.inf}, r"ce=inf is out of range"),
        ({"kl": math.nan}, r"kl=nan is out of range"),
        ({"kl": 1.0, "temperature": 0.0}, r"temperature=0.0 is out of range \(0, inf\)"),
        ({"js": 1.0, "beta": 1.0}, r"beta=1.0 is out of range \(0, 1\)"),
    ],
)
def test_terms_out_of_range_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(OptionError, match=rf"\[OPTION-002\] .*{message}"):
        Terms(**options)
