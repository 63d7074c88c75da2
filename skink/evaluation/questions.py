"""Multiple-choice questions made from source text, for models that know no others.

Two kinds. `next-line`: some lines of a file, and which of four comes next; the other three are lines from the same
documents with the same indentation and nearly the same length. `assigned-name`: some lines of a Python file that end
before an assignment, and which of four names is assigned to; the whole statement is the choice, and the other three
names are as long and are assigned somewhere in the same file.

Nothing draws a random number: everything is ordered by SHA-256 of the seed and the text, so that equal text and seed
give equal questions on every machine. How they are scored: `skink.evaluation.answers`.
"""

import ast
import hashlib
import json
import math
import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from skink.errors import CalibrationError, OptionError, check_range, suggest
from skink.evaluation.corpus import Documents, Tokenizer
from skink.evaluation.python_source import parsed

Kind = Literal["next-line", "assigned-name"]
KINDS: tuple[Kind, ...] = ("next-line", "assigned-name")

_CHOICES = 4
# A line to ask for says something, and fits on a screen; in characters without the indentation.
_SHORTEST, _LONGEST = 8, 80
# A distractor's length beside the truth's: at most this share of it more or less.
_SLACK = 0.2


@dataclass(frozen=True)
class Question:
    """One question.

    Args:
        context: the text before, whole lines, which ends with a character that is not blank.
        choices: four texts, each of which begins with the line break after the context.
        answer: the place of the true one among them.
    """

    context: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Questions:
    """Questions, what they were made from, and the tokens that a model is asked with.

    Args:
        kind: `next-line` or `assigned-name`.
        source: name of the documents.
        data_hash: SHA-256 of the documents.
        seed: what they were chosen by.
        items: the questions.
        tokens: for each question and choice, the ids of context and choice, and how many of them are the context's.
    """

    kind: Kind
    source: str
    data_hash: str
    seed: int
    items: tuple[Question, ...]
    tokens: tuple[tuple[tuple[tuple[int, ...], int], ...], ...]

    def __len__(self) -> int:
        return len(self.items)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the questions' text, in hexadecimal; the tokenizer does not count."""
        content = [[item.context, *item.choices, item.answer] for item in self.items]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def multiple_choice(
    kind: Kind,
    documents: Documents,
    tokenizer: Tokenizer,
    count: int = 200,
    seed: int = 0,
    *,
    context: int = 400,
) -> Questions:
    """Questions from documents; equal arguments give equal questions, and the place of the true choice is uniform.

    Args:
        kind: see the module; `assigned-name` needs documents that are Python source, and passes over all others.
        documents: text that the model was not trained or calibrated on.
        tokenizer: the model's. A model gets the tokenizer's begin token, where it has one, and then the text.
        count: questions wanted; fewer if the text gives no more.
        seed: another one gives other questions.
        context: characters before a choice, at most, cut to whole lines.

    Raises: OPTION-002 for an unknown kind or an option out of range; CALIBRATION-001 where the text gives no question.
    """
    check_range("count", count, low=1, high=2**31)
    check_range("context", context, low=1, high=2**31)
    if kind not in KINDS:
        raise OptionError("OPTION-002", f"kind={kind!r} is no kind of question.", fix=suggest(str(kind), KINDS))
    make = _next_lines if kind == "next-line" else _assigned_names
    items = tuple(make(documents.texts, count, seed, context))
    if not items:
        raise CalibrationError(
            "CALIBRATION-001",
            f"too little text: {documents.name!r} gives no question of the kind {kind!r}.",
            why="assigned-name needs Python source." if kind == "assigned-name" else "",
            fix="give more text." if kind == "next-line" else "give more Python source, or ask for next-line.",
        )
    return Questions(kind, documents.name, documents.sha256, seed, items, _encode(items, tokenizer))


@dataclass(frozen=True)
class _Line:
    """A line to ask for: where it is, its text with indentation, and the indentation alone."""

    document: int
    number: int
    text: str
    indentation: str


def _next_lines(texts: Sequence[str], count: int, seed: int, context: int) -> Iterator[Question]:
    lines = [line for document, text in enumerate(texts) for line in _lines(document, text)]
    distinct: dict[str, list[str]] = {}
    for line in lines:
        distinct.setdefault(line.indentation, []).append(line.text)
    # By length, so that those of a length lie together, and within it in an order that nothing of the text decides.
    pools = {
        indentation: sorted(set(pool), key=lambda text: (len(text), _draw(seed, text)))
        for indentation, pool in distinct.items()
    }
    asked: set[str] = set()
    found = 0
    for line in sorted(lines, key=lambda line: _draw(seed, "line", line.document, line.number)):
        # Each line's text once: what is frequent would be asked for again and again.
        if line.text in asked:
            continue
        before = _before(texts[line.document], line.number, context)
        others = _similar(line, pools[line.indentation], before, seed) if before else []
        if not others:
            continue
        asked.add(line.text)
        yield _question(before, line.text, others, _draw(seed, "place", line.document, line.number))
        found += 1
        if found == count:
            return


def _lines(document: int, text: str) -> Iterator[_Line]:
    """The lines that can be asked for: those that follow one that is not blank, of some length, with a word in them."""
    previous = ""
    for number, line in enumerate(text.split("\n")):
        said = line.strip()
        if _SHORTEST <= len(said) <= _LONGEST and previous.strip() and re.search(r"[A-Za-z]{2}", said):
            yield _Line(document, number, line.rstrip(), line[: len(line) - len(line.lstrip())])
        previous = line


def _similar(line: _Line, pool: Sequence[str], before: str, seed: int) -> list[str]:
    """Three other lines of nearly the same length that do not stand in the context, or none where there are fewer.

    How many of the three are shorter is drawn, so that the truth is as often the longest as it is in the middle.
    """
    slack = _SLACK * len(line.text.strip())
    low = bisect_left(pool, len(line.text) - slack, key=len)
    high = bisect_left(pool, len(line.text) + slack + 1e-9, key=len)
    place = pool.index(line.text, low, high)
    shown = set(before.split("\n"))
    where = (seed, line.document, line.number)
    shorter = _scattered([other for other in pool[low:place] if other not in shown], *where)
    longer = _scattered([other for other in pool[place + 1 : high] if other not in shown], *where)
    wanted = _CHOICES - 1
    if len(shorter) + len(longer) < wanted:
        return []
    under = min(max(_draw(seed, "shorter", *where) % _CHOICES, wanted - len(longer)), len(shorter))
    return shorter[:under] + longer[: wanted - under]


def _scattered(lines: list[str], seed: int, *where: int) -> list[str]:
    """The first few of `lines` from a place that is drawn, in strides, so that they are not all of one length."""
    size = len(lines)
    start = _draw(seed, "others", *where) % max(size, 1)
    step = max(1, round(size * 0.382))
    while math.gcd(size, step) > 1:
        step += 1
    return [lines[(start + index * step) % size] for index in range(min(size, _CHOICES - 1))]


def _assigned_names(texts: Sequence[str], count: int, seed: int, context: int) -> Iterator[Question]:
    targets = []
    names: list[dict[int, set[str]]] = []
    for document, text in enumerate(texts):
        assigned, statements = _assignments(text)
        by_length: dict[int, set[str]] = {}
        for name in assigned:
            by_length.setdefault(len(name.encode()), set()).add(name)
        names.append(by_length)
        targets += [(document, number, name) for number, name in statements]
    asked: set[str] = set()
    found = 0
    for document, number, name in sorted(targets, key=lambda target: _draw(seed, "name", *target[:2])):
        line = texts[document].split("\n")[number].rstrip()
        if line in asked:
            continue
        before = _before(texts[document], number, context)
        # Of one length in bytes, so that no normalisation favours any of them.
        others = sorted(names[document][len(name.encode())] - {name}, key=lambda other: _draw(seed, number, other))
        if not before or len(others) < _CHOICES - 1:
            continue
        asked.add(line)
        begin = len(line) - len(line.lstrip())
        wrong = [line[:begin] + other + line[begin + len(name) :] for other in others[: _CHOICES - 1]]
        yield _question(before, line, wrong, _draw(seed, "place", document, number))
        found += 1
        if found == count:
            return


def _assignments(text: str) -> tuple[set[str], list[tuple[int, str]]]:
    """The names that a Python file assigns to, and (number of the line, name) of each assignment on a line of its own.

    Both are empty for what is not Python.
    """
    tree = parsed(text)
    if tree is None:
        return set(), []
    assigned, statements = set(), []
    lines = text.split("\n")
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            assigned.add(node.id)
        if not (isinstance(node, ast.Assign) and len(node.targets) == 1 and node.lineno == node.end_lineno):
            continue
        (target,) = node.targets
        number = node.lineno - 1
        # Form feeds and other breaks that ast counts and split does not would shift the numbers.
        if not isinstance(target, ast.Name) or number >= len(lines) or number == 0:
            continue
        said = lines[number].strip()
        if said.startswith(f"{target.id} = ") and len(said) <= _LONGEST and lines[number - 1].strip():
            statements.append((number, target.id))
    return assigned, statements


def _before(text: str, number: int, limit: int) -> str:
    """The lines before line `number`, whole, at most `limit` characters, without blanks at the end."""
    lines = text.split("\n")
    taken: list[str] = []
    size = 0
    for line in reversed(lines[:number]):
        size += len(line) + 1
        if size > limit + 1:
            break
        taken.append(line)
    return "\n".join(reversed(taken)).rstrip()


def _question(before: str, truth: str, others: Sequence[str], draw: int) -> Question:
    answer = draw % _CHOICES
    choices = [f"\n{other}" for other in others]
    choices.insert(answer, f"\n{truth}")
    return Question(before, tuple(choices), answer)


def _draw(seed: int, *parts: object) -> int:
    """A number that looks random and depends on nothing but its arguments."""
    text = "\0".join(map(str, (seed, *parts)))
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")


def _encode(items: Sequence[Question], tokenizer: Tokenizer) -> tuple[tuple[tuple[tuple[int, ...], int], ...], ...]:
    """Ids of context and choice together, and how many of them are those of the context alone.

    Both are encoded as one text, because a tokenizer may join the end of one with the beginning of the other; what is
    scored begins where the two encodings part.
    """
    texts = [text for item in items for text in (item.context, *(item.context + choice for choice in item.choices))]
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    tokens = []
    for index in range(len(items)):
        alone, *whole = encoded[index * (_CHOICES + 1) : (index + 1) * (_CHOICES + 1)]
        tokens.append(
            tuple((tuple([*begin, *ids]), max(len(begin) + _common(alone, ids), 1)) for ids in whole),
        )
    return tuple(tokens)


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """How many ids two sequences begin with alike."""
    return next((index for index, (one, two) in enumerate(zip(left, right)) if one != two), min(len(left), len(right)))
