import ast
import math
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import skink
from skink.errors import CalibrationError, OptionError
from skink.evaluation import Documents, multiple_choice, standard_library
from skink.evaluation.questions import KINDS

ASSET = Path(skink.__file__).parent / "assets" / "stdlib-llama"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ASSET)


@pytest.fixture(scope="module")
def documents():
    whole = standard_library("held-out")
    return Documents(whole.name, whole.texts[:40])


@pytest.mark.parametrize("kind", KINDS)
def test_the_truth_is_among_the_choices_and_follows_the_context(kind, documents, tokenizer):
    found = multiple_choice(kind, documents, tokenizer, 150, context=200)
    assert len(found) == 150
    for item in found.items:
        truth = item.choices[item.answer]
        assert len(set(item.choices)) == 4
        assert truth.strip() not in (other.strip() for other in item.choices if other != truth)
        assert any(
            f"{item.context}{truth}\n" in text or text.endswith(item.context + truth) for text in _trimmed(documents)
        )
        assert len(item.context) <= 200


def _trimmed(documents):
    return ["\n".join(line.rstrip() for line in text.split("\n")) for text in documents.texts]


def test_next_lines_are_as_deep_and_about_as_long(documents, tokenizer):
    for item in multiple_choice("next-line", documents, tokenizer, 150).items:
        truth = item.choices[item.answer]
        for other in item.choices:
            assert len(other) - len(other.lstrip()) == len(truth) - len(truth.lstrip())
            assert abs(len(other) - len(truth)) <= 0.2 * len(truth.strip()) + 1e-9
            # A line that was just read is not offered as the next.
            assert other == truth or other.strip("\n") not in item.context.split("\n")


def test_names_differ_in_the_name_alone_and_are_equally_long(documents, tokenizer):
    for item in multiple_choice("assigned-name", documents, tokenizer, 100).items:
        statements = [ast.parse(choice.strip()).body[0] for choice in item.choices]
        names = [statement.targets[0].id for statement in statements]
        assert len(set(names)) == 4
        assert len({len(name.encode()) for name in names}) == 1
        assert len({ast.unparse(statement.value) for statement in statements}) == 1


def test_the_names_offered_are_of_the_same_file(tokenizer):
    first = "".join(f"aa{letter} = 1 + {letter}\nbb{letter}()\n" for letter in "uvwxyz")
    second = first.replace("aa", "cc")
    for item in multiple_choice("assigned-name", Documents("two", (first, second)), tokenizer, 20, context=60).items:
        assert len({choice.strip()[:2] for choice in item.choices}) == 1


def test_equal_arguments_give_equal_questions_and_another_seed_gives_others(documents, tokenizer):
    first, again, other = (multiple_choice("next-line", documents, tokenizer, 50, seed) for seed in (0, 0, 1))
    assert first == again
    assert first.sha256 == again.sha256 != other.sha256
    assert not {item.context for item in first.items} & {item.context for item in other.items}


@pytest.mark.parametrize("kind", KINDS)
def test_the_place_of_the_answer_tells_nothing(kind, tokenizer):
    found = multiple_choice(kind, standard_library("held-out"), tokenizer, 600)
    counts = [sum(item.answer == place for item in found.items) for place in range(4)]
    expected = len(found) / 4
    # Chi-square with three degrees of freedom: 16.3 is exceeded once in a thousand.
    assert sum((count - expected) ** 2 / expected for count in counts) < 16.3
    # Nor does the length: the truth is as often the shortest or the longest as it is in the middle.
    ranks = [sum(len(other) < len(item.choices[item.answer]) for other in item.choices) for item in found.items]
    assert kind == "assigned-name" or min(ranks.count(rank) for rank in range(4)) > 0.18 * len(found)


def test_the_tokens_are_those_of_the_text_after_the_begin_token(documents, tokenizer):
    found = multiple_choice("next-line", documents, tokenizer, 20)
    for item, tokens in zip(found.items, found.tokens):
        for choice, (ids, begin) in zip(item.choices, tokens):
            assert ids[0] == tokenizer.bos_token_id
            assert tokenizer.decode(ids[1:]) == item.context + choice
            assert tokenizer.decode(ids[1:begin]) == item.context
            assert 1 < begin < len(ids)


def test_text_that_gives_none_is_an_error(tokenizer):
    for kind, text in (("assigned-name", "Dear reader,\nthis is prose.\n" * 20), ("next-line", "x = 1\n")):
        with pytest.raises(CalibrationError, match="gives no question") as caught:
            multiple_choice(kind, Documents("prose", (text,)), tokenizer, 5)
        assert caught.value.code == "CALIBRATION-001"


def test_options_out_of_range_are_refused(documents, tokenizer):
    with pytest.raises(OptionError, match="kind='colour' is no kind") as caught:
        multiple_choice("colour", documents, tokenizer)
    assert caught.value.code == "OPTION-002"
    with pytest.raises(OptionError, match="count=0"):
        multiple_choice("next-line", documents, tokenizer, 0)
    with pytest.raises(OptionError, match="context=0"):
        multiple_choice("next-line", documents, tokenizer, context=0)
    assert math.gcd(*[len(item.choices) for item in multiple_choice("next-line", documents, tokenizer, 3).items]) == 4
