"""Training text that holds held-out text is found wherever it stands, and nothing else is."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoTokenizer

import skink
from skink.compression.training_texts import training_windows
from skink.errors import OptionError, RecoveryError
from skink.evaluation import standard_library, token_windows
from skink.graph.windows import Windows
from skink.training import overlap
from skink.training.overlap import check_overlap


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "_CHUNK", 64)
    monkeypatch.setattr(overlap, "_COMPARED", 40)


def text(count: int, length: int = 128, *, seed: int = 0, vocabulary: int = 1000) -> Tensor:
    return torch.randint(vocabulary, (count, length), generator=torch.Generator().manual_seed(seed))


def windows(tokens: Tensor, source: str = "", padding: Tensor | None = None) -> Windows:
    return Windows(tokens, source, padding=padding)


def covered_slowly(training: Tensor, held_out: Tensor, span: int) -> Tensor:
    """The definition: each held-out span compared with each of the training text."""
    known = {tuple(part.tolist()) for part in training.reshape(-1).unfold(0, span, 1)}
    flat = held_out.reshape(-1)
    covered = torch.zeros(flat.shape, dtype=torch.bool)
    for start in range(len(flat) - span + 1):
        if tuple(flat[start : start + span].tolist()) in known:
            covered[start : start + span] = True
    return covered.view(held_out.shape)


def repeated_slowly(held_out: Tensor, span: int) -> Tensor:
    """The definition: each held-out span, and the windows in which it begins."""
    flat, width = held_out.reshape(-1), held_out.shape[1]
    rows: dict[tuple[int, ...], set[int]] = {}
    for start, part in enumerate(flat.unfold(0, span, 1).tolist()):
        rows.setdefault(tuple(part), set()).add(start // width)
    repeated = torch.zeros(flat.shape, dtype=torch.bool)
    for start, part in enumerate(flat.unfold(0, span, 1).tolist()):
        if len(rows[tuple(part)]) >= 3:
            repeated[start : start + span] = True
    return repeated.view(held_out.shape)


def test_text_of_its_own_has_no_overlap() -> None:
    assert check_overlap(windows(text(50)), windows(text(20, seed=1))) == 0.0


@pytest.mark.parametrize("shift", [0, 1, 63, 64, 127])
def test_held_out_text_is_found_at_every_position(shift: int) -> None:
    held_out = text(4, seed=1)
    stream = torch.cat([text(3).reshape(-1)[: 128 + shift], held_out.reshape(-1), text(2, seed=2).reshape(-1)])
    training = stream[: len(stream) // 96 * 96].view(-1, 96)
    with pytest.raises(RecoveryError, match=r"\[RECOVER-002\] the training text holds 100.0% of the held-out tokens"):
        check_overlap(windows(training), windows(held_out))


def test_the_error_says_where_and_what_to_do() -> None:
    held_out = text(8, seed=1)
    training = torch.cat([text(5), held_out[[2, 5]], held_out[6:7, :64].repeat(1, 2)])
    with pytest.raises(RecoveryError) as caught:
        check_overlap(windows(training, "books"), windows(held_out, "articles"))
    assert caught.value.code == "RECOVER-002"
    assert "31.2%" in caught.value.what
    assert "'books' holds text of 3 of 8 windows of 'articles'" in caught.value.where
    assert "window 2: 128 tokens of 128" in caught.value.where
    assert "64 tokens and more" in caught.value.why
    assert "--held-out" in caught.value.fix


def test_spans_that_are_shorter_do_not_count() -> None:
    held_out = text(4, seed=1)
    training = text(4)
    training[:, :63] = held_out[:, 20:83]
    assert check_overlap(windows(training), windows(held_out)) == 0.0
    training[1, 40:104] = held_out[1, 20:84]
    assert check_overlap(windows(training), windows(held_out)) == 64 / 512


def test_one_window_decides_nothing() -> None:
    held_out, training = text(40, seed=1), text(40)
    # A file that is nearly another, and a licence that two more have: 3.4% together, 0.8% without the former.
    held_out[:2, :64] = training[:2, :64] = text(1, 64, seed=3)
    training[9] = held_out[9]
    share = check_overlap(windows(training), windows(held_out))
    assert share == (2 * 64 + 128) / (40 * 128)
    training[10:12] = held_out[10:12]
    with pytest.raises(RecoveryError, match=r"holds 10\.0%"):
        check_overlap(windows(training), windows(held_out))


def test_what_the_held_out_text_repeats_is_its_form() -> None:
    held_out, training = text(40, seed=1), text(40)
    prompt = text(1, 100, seed=3)
    held_out[:, 10:110] = training[:, 5:105] = prompt
    # A token beside it may be equal by chance.
    assert check_overlap(windows(training), windows(held_out)) == pytest.approx(100 / 128, abs=0.002)


def test_what_the_held_out_text_has_twice_is_not_its_form() -> None:
    held_out, training = text(12, seed=1), text(20)
    held_out[:6] = training[:3].repeat_interleave(2, dim=0)
    with pytest.raises(RecoveryError, match=r"holds 50\.0%"):
        check_overlap(windows(training), windows(held_out))


def test_one_window_decides_where_it_is_half_of_all() -> None:
    held_out = text(3, seed=1)
    training = torch.cat([text(5), held_out[1:2]])
    assert check_overlap(windows(training), windows(held_out)) == pytest.approx(1 / 3)
    with pytest.raises(RecoveryError):
        check_overlap(windows(training), windows(held_out[:2]))


def test_padding_is_no_text() -> None:
    held_out, training = text(4, seed=1), text(6)
    padding = torch.ones_like(held_out)
    padding[:, 100:] = 0
    held_out[:, 100:] = training[:4, 100:] = 0
    training[:4, :60] = held_out[:4, :60]
    # 60 tokens of text and padding on both sides of them: no 64 tokens that are equal text.
    training[:4, 60:] = 0
    theirs = torch.ones_like(training)
    theirs[:4, 60:] = 0
    assert check_overlap(windows(training, padding=theirs), windows(held_out, padding=padding)) == 0.0
    training[0, :100], theirs[0, :100] = held_out[0, :100], 1
    assert check_overlap(windows(training, padding=theirs), windows(held_out, padding=padding)) == 0.25
    # The same tokens, taken for padding, are not read.
    theirs[0] = 0
    assert check_overlap(windows(training, padding=theirs), windows(held_out, padding=padding)) == 0.0


@pytest.mark.usefixtures("small_chunks")
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    span=st.integers(8, 19),
    widths=st.tuples(st.integers(9, 40), st.integers(9, 40)),
    copies=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 100), st.integers(1, 60)), max_size=4),
)
def test_it_is_the_definition(
    seed: int, span: int, widths: tuple[int, int], copies: list[tuple[int, int, int]]
) -> None:
    # Of two tokens, so that much is equal by chance and most spans repeat.
    training = text(12, widths[0], seed=seed, vocabulary=2)
    held_out = text(4, widths[1], seed=seed + 1, vocabulary=2)
    flat, source = training.view(-1), held_out.view(-1)
    for to, start, length in copies:
        part = source[start : start + length]
        part = part[: max(0, len(flat) - to)]
        flat[to : to + len(part)] = part
    found, repeated = overlap._covered(windows(training), windows(held_out), span)
    assert torch.equal(torch.from_numpy(found), covered_slowly(training, held_out, span))
    assert torch.equal(torch.from_numpy(repeated), repeated_slowly(held_out, span))


def test_spans_that_only_share_a_hash_are_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def coarse(words: overlap.Words, span: int) -> overlap.Words:
        # All spans have one hash.
        return np.zeros(len(words) - span + 1, dtype=np.uint64)

    monkeypatch.setattr(overlap, "_span_hashes", coarse)
    training, held_out = text(3), text(2, seed=1)
    assert check_overlap(windows(training), windows(held_out)) == 0.0
    training[1, 30:94] = held_out[0, :64]
    assert check_overlap(windows(training), windows(held_out)) == 64 / 256


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("seed", range(4))
def test_padding_divides_text_in_every_chunk(seed: int) -> None:
    held_out = text(1, 40, seed=seed)
    training = held_out.repeat(20, 1)
    padding = torch.ones_like(training)
    padding[torch.arange(20), torch.randint(12, 28, (20,))] = 0
    # 11 tokens at either end of every row are text, and no more than 27.
    found, _ = overlap._covered(windows(training, padding=padding), windows(held_out), 28)
    assert not found.any()
    padding[13] = 1
    found, _ = overlap._covered(windows(training, padding=padding), windows(held_out), 28)
    assert found.all()


@pytest.mark.parametrize("span", [8, 13, 63, 64, 65, 100])
def test_the_hash_is_the_polynomial(span: int) -> None:
    words = overlap._mixed(text(1, 200).view(-1).numpy())
    base = int(overlap._BASE)
    first = sum(int(word) * base ** (span - 1 - place) for place, word in enumerate(words[:span])) % 2**64
    found = overlap._span_hashes(words, span)
    assert len(found) == 200 - span + 1
    assert int(found[0]) == first


def test_tokens_may_be_memory_mapped(tmp_path: Path) -> None:
    held_out = text(4, seed=1)
    np.save(tmp_path / "tokens.npy", torch.cat([text(5), held_out]).numpy())
    mapped = torch.from_numpy(np.load(tmp_path / "tokens.npy", mmap_mode="c"))
    with pytest.raises(RecoveryError, match=r"100\.0%"):
        check_overlap(windows(mapped), windows(held_out))


def test_text_without_a_span_is_not_looked_for() -> None:
    assert check_overlap(windows(text(1, 40)), windows(text(1, 40))) == 0.0


@pytest.mark.parametrize("span", [7, 4097])
def test_spans_have_a_range(span: int) -> None:
    with pytest.raises(OptionError, match=rf"\[OPTION-002\] span={span}"):
        check_overlap(windows(text(2)), windows(text(2)), span=span)


def test_the_split_of_the_model_that_ships_is_allowed() -> None:
    tokenizer = AutoTokenizer.from_pretrained(Path(skink.__file__).parent / "assets" / "stdlib-llama")
    training = training_windows(tokenizer, "stdlib", length=512, tokens=20_000)
    held_out = token_windows(standard_library("held-out"), tokenizer, length=512, count=4)
    assert check_overlap(training, windows(held_out)) < 0.05
