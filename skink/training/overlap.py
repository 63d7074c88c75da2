"""Whether text to train on holds the text that a model is judged by.

A span is a number of consecutive tokens. Every span of the held-out text is looked for at every position of the
training text, by a polynomial hash of its tokens that is computed for all positions at once by doubling,

    h_1[i] = mix(x[i])      h_2k[i] = h_k[i] b^k + h_k[i + k]      modulo 2^64

after Karp & Rabin 1987 ("Efficient randomized pattern-matching algorithms"). What the hash finds is compared token by
token, so that spans which only share a hash are never refused.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from skink.errors import RecoveryError, check_range
from skink.graph.windows import Windows

Words = npt.NDArray[np.uint64]
Integers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

# What is refused. The two parts of an honest split share licence headers, generated tables and copied classes: of the
# standard library's held-out tokens 1.2% are in such spans, and one window in 130 is mostly so (a code page that is
# nearly another). So one window decides nothing, unless it is half of all that there is.
LARGEST_SHARE = 0.05
MOST = 0.5
FORM = 3  # held-out windows with the same span, from which on it is a form that the text repeats

_CHUNK = 1 << 20  # training tokens at once
_COMPARED = 1 << 20  # tokens of spans that are compared token by token at once
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no token's part in the hash vanishes
_FILTER_BITS = 22


def check_overlap(training: Windows, held_out: Windows, *, span: int = 64) -> float:
    """Share of the held-out tokens that stand in spans which the training text holds too, from 0 to 1.

    Rows are read one after another, so that spans are also found across the ends of windows; no span holds padding.
    Held-out text of fewer than `span` tokens is not looked for. What stands in three held-out windows or more is a form
    that the text repeats (a licence, a system prompt): it counts in the share, and nothing is refused for it.

    Takes seconds for some 10^7 training tokens and memory for 2^20 of them, beside 100 bytes per held-out token.
    Training tokens may be memory-mapped.

    Args:
        training: text to train on.
        held_out: text to judge by.
        span: tokens of the shortest text that counts as the same, from 8 to 4,096.

    Raises:
        RecoveryError: RECOVER-002 where the share, without such forms, is more than 5%, the window that is found most
            left out of the count; or half and more with it.
        OptionError: OPTION-002 for a span out of range.
    """
    covered, repeated = _covered(training, held_out, span)
    total = covered.size if held_out.padding is None else int(np.count_nonzero(_numpy(held_out.padding)))
    by_window = (covered & ~repeated).sum(1)
    found = int(by_window.sum())
    if found and (found >= MOST * total or found - int(by_window.max()) > LARGEST_SHARE * total):
        raise _overlap(training, held_out, by_window, found / total, span)
    return int(covered.sum()) / max(total, 1)


def _overlap(training: Windows, held_out: Windows, by_window: Integers, share: float, span: int) -> RecoveryError:
    most = int(by_window.argmax())
    return RecoveryError(
        "RECOVER-002",
        f"the training text holds {share:.1%} of the held-out tokens: the model would be judged by what it learnt.",
        where=f"{_named(training)} holds text of {np.count_nonzero(by_window)} of {len(by_window)} windows of "
        f"{_named(held_out)}, the most of window {most}: {by_window[most]} tokens of {held_out.tokens.shape[1]}",
        why=f"counted are spans of {span} tokens and more, equal token by token, that are not in {FORM} held-out "
        f"windows or more; parts of one library share some, and {LARGEST_SHARE:.0%} is allowed.",
        fix="train on text without what is held out, or judge by text of another source: --held-out FILES.",
    )


def _named(windows: Windows) -> str:
    return repr(windows.source) if windows.source else "text without a name"


@dataclass
class _Spans:
    """The distinct spans of the held-out text.

    Args:
        tokens: of all held-out rows, one after another.
        starts: of every span without padding, sorted by hash.
        hashes: of the spans that begin there, ascending.
        found: which of them the training text holds; of spans with one hash only the first is kept up to date.
    """

    tokens: Integers
    starts: Integers
    hashes: Words
    found: Flags

    @classmethod
    def of(cls, held_out: Windows, span: int) -> "_Spans":
        tokens = _numpy(held_out.tokens).reshape(-1).astype(np.int64)
        text = None if held_out.padding is None else _numpy(held_out.padding).reshape(-1) != 0
        hashes, starts = _hashes(tokens, text, span)
        order = np.argsort(hashes, kind="stable")
        return cls(tokens, starts[order], hashes[order], np.zeros(len(order), dtype=np.bool_))

    def at(self, starts: Integers, span: int) -> Integers:
        """Tokens int64[n, span] of the spans that begin at the given places."""
        tokens: Integers = self.tokens[starts[:, None] + np.arange(span)]
        return tokens


def _covered(training: Windows, held_out: Windows, span: int) -> tuple[Flags, Flags]:
    """Which held-out tokens stand in a span that the training text holds too, and which in one repeated, bool[N, T]."""
    check_range("span", span, low=8, high=4096)
    spans = _Spans.of(held_out, span)
    if len(spans.hashes):
        _search(training, spans, span)
    return _inside(_same(spans, span), held_out, span), _inside(_repeated(spans, held_out), held_out, span)


def _inside(starts: Integers, windows: Windows, span: int) -> Flags:
    """Which tokens stand in a span that begins at one of some places, bool[N, T]."""
    steps = np.zeros(windows.tokens.numel() + 1, dtype=np.int64)
    np.add.at(steps, starts, 1)
    np.add.at(steps, starts + span, -1)
    return (steps.cumsum()[:-1] > 0).reshape(windows.tokens.shape)


def _repeated(spans: _Spans, held_out: Windows) -> Integers:
    """Starts of the spans that begin in several held-out windows: `FORM` of them or more."""
    rows = spans.starts // held_out.tokens.shape[1]
    # Spans of one hash are neighbours, in the order of their starts.
    other = np.ones(len(rows), dtype=np.bool_)
    other[1:] = (spans.hashes[1:] != spans.hashes[:-1]) | (rows[1:] != rows[:-1])
    firsts = np.flatnonzero(np.concatenate([[True], spans.hashes[1:] != spans.hashes[:-1]])[: len(rows)])
    lengths = np.diff(np.append(firsts, len(rows)))
    windows = np.add.reduceat(other.astype(np.int64), firsts) if len(firsts) else lengths
    starts: Integers = spans.starts[np.repeat(windows >= FORM, lengths)]
    return starts


def _search(training: Windows, spans: _Spans, span: int) -> None:
    """Marks the held-out spans that the training text holds."""
    # Most training hashes are ruled out by their first bits: one look-up instead of a search among all.
    shift = np.uint64(64 - _FILTER_BITS)
    seen = np.zeros(1 << _FILTER_BITS, dtype=np.bool_)
    seen[spans.hashes >> shift] = True
    most = max(1, _COMPARED // span)
    for tokens, text in _chunks(training, span):
        hashes, starts = _hashes(tokens, text, span)
        perhaps = seen[hashes >> shift]
        hashes, starts = hashes[perhaps], starts[perhaps]
        places = np.searchsorted(spans.hashes, hashes)
        hit = (places < len(spans.hashes)) & (spans.hashes[places.clip(max=len(spans.hashes) - 1)] == hashes)
        places, starts = places[hit], starts[hit]
        while len(places):
            new = ~spans.found[places]
            places, starts = places[new], starts[new]
            some, theirs = places[:most], starts[:most]
            same = (tokens[theirs[:, None] + np.arange(span)] == spans.at(spans.starts[some], span)).all(1)
            spans.found[some[same]] = True
            places, starts = places[most:], starts[most:]


def _same(spans: _Spans, span: int) -> Integers:
    """Starts of all held-out spans equal to one that was found."""
    firsts = np.searchsorted(spans.hashes, spans.hashes)
    known = np.flatnonzero(spans.found[firsts])
    kept = [np.empty(0, dtype=np.int64)]
    most = max(1, _COMPARED // span)
    for begin in range(0, len(known), most):
        some = known[begin : begin + most]
        starts = spans.starts[some]
        same = (spans.at(starts, span) == spans.at(spans.starts[firsts[some]], span)).all(1)
        kept.append(starts[same])
    return np.concatenate(kept)


def _chunks(windows: Windows, span: int) -> Iterator[tuple[Integers, Flags | None]]:
    """Tokens of whole rows and which are text; each chunk begins with the last span of the one before."""
    rows = max(1, _CHUNK // max(1, windows.tokens.shape[1]))
    tail = np.empty(0, dtype=np.int64)
    tail_text = np.empty(0, dtype=np.bool_)
    for begin in range(0, windows.tokens.shape[0], rows):
        part = _numpy(windows.tokens[begin : begin + rows]).reshape(-1).astype(np.int64)
        tokens = np.concatenate([tail, part])
        text = None
        if windows.padding is not None:
            text = np.concatenate([tail_text, _numpy(windows.padding[begin : begin + rows]).reshape(-1) != 0])
            tail_text = text[-(span - 1) :]
        tail = tokens[-(span - 1) :]
        yield tokens, text


def _hashes(tokens: Integers, text: Flags | None, span: int) -> tuple[Words, Integers]:
    """Hashes of all spans without padding, and where each begins."""
    count = len(tokens) - span + 1
    if count <= 0:
        return np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.int64)
    hashes = _span_hashes(_mixed(tokens), span)
    starts = np.arange(count)
    if text is None:
        return hashes, starts
    before = np.concatenate([[0], text.cumsum()])
    whole = before[span:] - before[:-span] == span
    return hashes[whole], starts[whole]


def _mixed(tokens: Integers) -> Words:
    """A number of 64 bits for each token, of which every bit depends on every bit of the token (splitmix64)."""
    words = tokens.astype(np.uint64) + _BASE
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _span_hashes(words: Words, span: int) -> Words:
    """Hash of `span` words from every place on, by the binary digits of `span` from the highest on."""
    hashes, size, power = words, 1, _BASE
    for digit in bin(span)[3:]:
        # Twice as long: this span, moved up, and the next.
        hashes = hashes[:-size] * power + hashes[size:]
        size, power = 2 * size, _product(power, power)
        if digit == "1":
            hashes = hashes[:-1] * _BASE + words[size : size + len(hashes) - 1]
            size, power = size + 1, _product(power, _BASE)
    return hashes


def _product(left: np.uint64, right: np.uint64) -> np.uint64:
    return np.uint64(int(left) * int(right) % (1 << 64))


def _numpy(tensor: Tensor) -> npt.NDArray[np.generic]:
    values: npt.NDArray[np.generic] = tensor.detach().to(torch.device("cpu")).numpy()
    return values
