"""Texts as encoders read them: each by itself, and short. Docstrings and comments of Python source, or paragraphs.

A unit is a docstring, a run of comment lines or a paragraph. It gives passages, to calibrate on and to embed, and one
pair of a query and the passage that answers it. Nothing here draws a random number: equal text gives equal texts.
"""

import ast
import re
from collections.abc import Iterable, Iterator, Sequence

from skink.evaluation.corpus import Documents
from skink.evaluation.python_source import parsed

# Words of the longest passage: about as many as fill a window of 128 tokens.
_LONGEST = 64
# Words of the shortest passage, query and answer.
_SHORTEST, _QUERY, _ANSWER = 6, 3, 3

# How documents of the standard library begin; see `standard_library`.
_PYTHON = "# file: "


def text_units(documents: Documents, *, enough: int | None = None) -> list[str]:
    """The units of documents, each once, in their order; paragraphs within one are apart by an empty line.

    Args:
        documents: Python source of the standard library, or any text.
        enough: passages after which no more documents need be read. They are then chosen evenly spaced.
    """
    chosen = len(documents.texts) if enough is None else min(len(documents.texts), max(1, enough // 64))
    while True:
        texts = [documents.texts[index * len(documents.texts) // chosen] for index in range(chosen)]
        units = list(dict.fromkeys(unit for text in texts for unit in _units(text) if unit))
        if chosen == len(documents.texts) or len(passages(units)) >= (enough or 0):
            return units
        chosen = min(2 * chosen, len(documents.texts))


def passages(units: Iterable[str]) -> list[str]:
    """The paragraphs of units, each once, in pieces of at most 64 words; those of less than 6 words are left out."""
    pieces = [piece for unit in units for paragraph in _paragraphs(unit) for piece in _pieces(paragraph)]
    return list(dict.fromkeys(piece for piece in pieces if len(piece.split()) >= _SHORTEST))


def query_pairs(units: Iterable[str]) -> tuple[list[str], list[str]]:
    """Queries and the passages that answer them, as many of one as of the other; no query and no passage twice.

    The query is a unit's first paragraph (a docstring's summary line) and the passage its others; of a single paragraph
    the first sentence and the others. Text without any such gives the first half of each paragraph's words and the
    second.
    """
    listed = list(units)
    return _distinct(map(_split, listed)) or _distinct(map(_cut, listed)) or ([], [])


def _distinct(pairs: Iterable[tuple[str, str]]) -> tuple[list[str], list[str]] | None:
    queries: dict[str, str] = {}
    seen: set[str] = set()
    for query, passage in pairs:
        long_enough = len(query.split()) >= _QUERY and len(passage.split()) >= _ANSWER
        if long_enough and query not in queries and passage not in seen:
            queries[query] = passage
            seen.add(passage)
    return (list(queries), list(queries.values())) if queries else None


def _split(unit: str) -> tuple[str, str]:
    paragraphs = list(_paragraphs(unit))
    if len(paragraphs) == 1:
        paragraphs = re.split(r"(?<=[.!?])\s+", paragraphs[0])
    first, *others = paragraphs
    return _first_words([first]), _first_words(others)


def _cut(unit: str) -> tuple[str, str]:
    words = unit.split()
    half = len(words) // 2
    return _first_words(words[:half]), _first_words(words[half:])


def _first_words(texts: Sequence[str]) -> str:
    return " ".join(" ".join(texts).split()[:_LONGEST])


def _units(text: str) -> Iterator[str]:
    if not text.startswith(_PYTHON):
        for paragraph in _paragraphs(text):
            yield from _pieces(paragraph)
        return
    yield from _docstrings(text)
    for block in re.findall(r"(?m)(?:^[ \t]*#(?![!:]).*\n)+", text.partition("\n")[2]):
        comment = "\n".join(line.strip().lstrip("#").strip() for line in block.splitlines())
        if _is_prose(comment):
            yield "\n\n".join(_paragraphs(comment))


def _docstrings(source: str) -> Iterator[str]:
    tree = parsed(source)
    for node in ast.walk(tree) if tree is not None else ():
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and _is_prose(text):
                yield "\n\n".join(_paragraphs(text))


def _is_prose(text: str) -> bool:
    """Whether most of a text is words: rules and tables of symbols are not."""
    return sum(char.isalpha() or char.isspace() for char in text) > 0.7 * len(text)


def _paragraphs(text: str) -> Iterator[str]:
    """The parts of a text between empty lines, each on one line."""
    for paragraph in re.split(r"\n\s*\n", text):
        line = " ".join(paragraph.split())
        if line:
            yield line


def _pieces(paragraph: str) -> Iterator[str]:
    words = paragraph.split()
    for start in range(0, len(words), _LONGEST):
        yield " ".join(words[start : start + _LONGEST])
