"""Passages and queries from Python source and from any text."""

from skink.evaluation import Documents
from skink.evaluation.passages import passages, query_pairs, text_units

SOURCE = '''# file: sample.py
#!/usr/bin/env python
"""Read a folder of many small files.

Each file is read once and its lines are kept in order.

    >>> {1: [2], 3: (4)} == [[{}]]
"""

# A comment of two lines that says why
# something is done in this way here.
def count(x):
    """Count the words in one line of text. Words are parts between spaces, whatever they are made of."""
    return x  # not at the line's beginning

# ----- + ----- + -----
def short():
    """Too short."""
'''


def test_python_gives_docstrings_and_comments() -> None:
    units = text_units(Documents("sample", (SOURCE, SOURCE)))
    assert units[0].startswith("Read a folder of many small files.\n\nEach file is read once")
    assert units[1:] == [
        "Count the words in one line of text. Words are parts between spaces, whatever they are made of.",
        "Too short.",
        "A comment of two lines that says why something is done in this way here.",
    ]
    found = passages(units)
    assert "Each file is read once and its lines are kept in order." in found
    assert "Too short." not in found


def test_queries_are_first_paragraphs_and_first_sentences() -> None:
    queries, answers = query_pairs(text_units(Documents("sample", (SOURCE,))))
    assert queries == ["Read a folder of many small files.", "Count the words in one line of text."]
    assert answers[0].startswith("Each file is read once")
    assert answers[1] == "Words are parts between spaces, whatever they are made of."


def test_broken_source_gives_its_comments() -> None:
    broken = "# file: broken.py\n# Six words stand in this line.\ndef (:\n"
    assert text_units(Documents("broken", (broken,))) == ["Six words stand in this line."]


def test_other_text_gives_paragraphs_in_pieces() -> None:
    long = " ".join(f"word{index}" for index in range(150))
    units = text_units(Documents("text", (f"One paragraph of seven words\nis this.\n\n{long}\n\nbrief",)))
    assert units[0] == "One paragraph of seven words is this."
    assert [len(unit.split()) for unit in units] == [7, 64, 64, 22, 1]
    assert passages(units) == units[:-1]


def test_text_of_one_sentence_each_is_cut_in_half() -> None:
    units = ["a b c d e f g", "h i j k l m", "a b c n o p q"]
    assert query_pairs(units) == (["a b c", "h i j"], ["d e f g", "k l m"])
    assert query_pairs(["too few words"]) == ([], [])


def test_no_more_documents_are_read_than_are_needed() -> None:
    texts = tuple(f"Text number {index} is one of very many." for index in range(1000))
    assert len(text_units(Documents("many", texts))) == 1000
    some = text_units(Documents("many", texts), enough=100)
    assert 100 <= len(some) <= 200
    assert some[0] == texts[0]
    assert int(some[-1].split()[2]) > 900
