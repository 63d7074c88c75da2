import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import skink
from skink.errors import OptionError
from skink.evaluation.answers import Accuracy, answer, paired
from skink.evaluation.questions import Question, Questions


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).eval()


def questions(count=12, seed=0):
    """Random ids of differing lengths under texts of differing lengths."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high, (1,), generator=generator))

    items, tokens = [], []
    for index in range(count):
        context = [draw(0, 60) for _ in range(draw(3, 14))]
        choices = [tuple(context + [draw(0, 60) for _ in range(draw(1, 7))]) for _ in range(4)]
        texts = tuple(f"\n{'é' * draw(1, 9)}{index}{place}" for place in range(4))
        items.append(Question(f"context {index}", texts, draw(0, 4)))
        tokens.append(tuple((ids, len(context)) for ids in choices))
    return Questions("next-line", "random", "0" * 64, seed, tuple(items), tuple(tokens))


def by_definition(model, asked):
    """Which choices score highest: one forward for each choice, float64, plain loops."""
    found = []
    for item, tokens in zip(asked.items, asked.tokens):
        scores = []
        for choice, (ids, begin) in zip(item.choices, tokens):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids])).logits[0].double()
            total = 0.0
            for place in range(begin, len(ids)):
                row = logits[place - 1]
                total += (row[ids[place]] - row.logsumexp(0)).item()
            scores.append(total / len(choice.encode()))
        found.append(scores.index(max(scores)))
    return found


def test_answers_are_those_of_the_definition(llama):
    asked = questions()
    best = by_definition(llama, asked)
    result = answer(llama, asked, batch=5)
    assert list(result.correct) == [one == item.answer for one, item in zip(best, asked.items)]
    assert 0 < sum(result.correct) < len(asked)
    share = sum(result.correct) / 12
    assert result.value == share
    assert result.standard_error == pytest.approx(math.sqrt(share * (1 - share) / 11))


def test_callables_and_skink_models_answer_alike(llama):
    asked = questions(20)
    expected = answer(llama, asked)
    assert answer(lambda ids: llama(input_ids=ids).logits, asked).correct == expected.correct
    assert answer(skink.compress(llama, []), asked, batch=7).correct == expected.correct


def test_the_score_is_per_byte_and_not_per_token():
    # Each token has probability 1/4 whatever it is: the choice with the fewest tokens per byte wins.
    def flat(ids):
        return torch.zeros(*ids.shape, 4)

    item = Question("c", ("\nabcdefgh", "\nabcd", "\nab", "\na"), 0)
    tokens = tuple(((0, 1, *([2] * count)), 2) for count in (4, 3, 2, 1))
    # Tokens per byte: 4/9, 3/5, 2/3, 1/2.
    asked = Questions("next-line", "text", "0" * 64, 0, (item,), (tokens,))
    result = answer(flat, asked)
    assert result.correct == (True,)
    assert math.isnan(result.standard_error)


def test_a_model_of_nans_answers_nothing():
    result = answer(lambda ids: torch.full((*ids.shape, 60), math.nan), questions(40))
    assert result.value == 0.0


def test_progress_and_the_model_s_mode(llama):
    seen = []
    llama.train()
    answer(llama, questions(3), batch=5, progress=lambda done, total: seen.append((done, total)))
    assert llama.training
    llama.eval()
    assert seen == [(5, 12), (10, 12), (12, 12)]


def accuracy(correct, hash_="a" * 64):
    value = sum(correct) / len(correct)
    return Accuracy(value, 0.0, len(correct), tuple(correct), "next-line", hash_, "t", "d", 0, "float32", "cpu")


def test_the_paired_difference_is_that_of_the_single_questions():
    first, second = [True, True, False, False, True, False], [True, False, True, False, True, True]
    result = paired(accuracy(first), accuracy(second))
    differences = torch.tensor([int(b) - int(a) for a, b in zip(first, second)], dtype=torch.float64)
    assert result.value == pytest.approx(differences.mean().item())
    assert result.standard_error == pytest.approx((differences.std() / math.sqrt(6)).item())
    assert (result.gained, result.lost, result.n) == (2, 1, 6)
    assert "+16.7" in str(result)


def test_other_questions_are_not_compared():
    with pytest.raises(OptionError, match="different questions") as caught:
        paired(accuracy([True]), accuracy([True], "b" * 64))
    assert caught.value.code == "OPTION-002"


def test_a_batch_out_of_range_is_refused(llama):
    with pytest.raises(OptionError, match="batch=0"):
        answer(llama, questions(1), batch=0)


def test_the_text_says_what_was_asked():
    said = str(accuracy([True, False], "c" * 64))
    for part in ("50.0%", "of 2 next-line questions", "cccccccccccc", "per byte"):
        assert part in said
