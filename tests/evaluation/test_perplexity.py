import importlib
import math
import platform
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from skink.errors import CalibrationError, CaptureError, OptionError
from skink.evaluation import Documents, held_out_perplexity, perplexity

# The function of the same name hides the module as an attribute of the package.
module = importlib.import_module("skink.evaluation.perplexity")

ASSET = Path(module.__file__).parents[1] / "assets" / "stdlib-llama"


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def windows():
    return torch.randint(0, 97, (7, 19), generator=torch.Generator().manual_seed(1))


def independent_nats(logits, windows):
    """Mean of -log p by the definition, in float64 and plain loops."""
    total = 0.0
    for row in range(windows.shape[0]):
        for position in range(1, windows.shape[1]):
            scores = logits[row, position - 1].double()
            top = scores.max()
            total += (top + (scores - top).exp().sum().log() - scores[windows[row, position]]).item()
    return total / (windows.shape[0] * (windows.shape[1] - 1))


def test_value_is_that_of_the_definition(llama, windows):
    with torch.no_grad():
        expected = independent_nats(llama(input_ids=windows).logits, windows)
    result = perplexity(llama, windows)
    assert result.nats_per_token == pytest.approx(expected, abs=1e-6)
    assert result.value == pytest.approx(math.exp(expected), rel=1e-6)
    assert result.tokens == 7 * 18


def test_value_is_that_of_the_loss_of_transformers(llama, windows):
    with torch.no_grad():
        loss = llama(input_ids=windows, labels=windows).loss.item()
    assert perplexity(llama, windows).nats_per_token == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize("batch", [1, 2, 3, 7, 100])
def test_the_batch_does_not_matter_even_when_it_does_not_divide(llama, windows, batch):
    result = perplexity(llama, windows, batch=batch)
    assert result.nats_per_token == pytest.approx(perplexity(llama, windows, batch=7).nats_per_token, abs=1e-6)
    assert result.batch == batch


def test_equal_windows_score_as_one(llama, windows):
    repeated = windows[:1].repeat(5, 1)
    assert perplexity(llama, repeated, batch=2).nats_per_token == pytest.approx(
        perplexity(llama, windows[:1]).nats_per_token, abs=1e-6
    )


def test_logits_are_taken_to_float32_in_slices(llama, windows, monkeypatch):
    whole = perplexity(llama, windows)
    rows = []
    original = module.cross_entropy

    def watched(scores, *arguments, **keywords):
        assert scores.dtype == torch.float32
        rows.append(len(scores))
        return original(scores, *arguments, **keywords)

    monkeypatch.setattr(module, "cross_entropy", watched)
    monkeypatch.setattr(module, "_SLICE", 97 * 5)
    assert perplexity(llama, windows) == whole
    assert rows == [5, 5, 5, 3] * 7


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary(windows):
    result = perplexity(lambda ids: torch.zeros(*ids.shape, 97, dtype=torch.float16), windows)
    assert result.value == pytest.approx(97.0, rel=1e-6)
    assert result.dtype == "float16"


def test_a_model_that_knows_the_next_token_has_perplexity_one(windows):
    def oracle(ids):
        following = ids.roll(-1, dims=1)
        return (1e4 * nn.functional.one_hot(following, 97).float(),)

    assert perplexity(oracle, windows).value == 1.0


def test_an_impossible_token_is_infinite_and_no_crash(windows):
    assert (
        perplexity(lambda ids: torch.full((*ids.shape, 97), 0.0).index_fill_(2, ids.unique(), -1e6), windows).value
        == math.inf
    )


def test_models_get_the_arguments_that_they_name(windows):
    seen = []

    def model(input_ids, attention_mask, position_ids, use_cache):
        seen.append((attention_mask, position_ids, use_cache))
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 97))

    perplexity(model, windows, batch=4)
    mask, positions, use_cache = seen[-1]
    assert torch.equal(mask, torch.ones(3, 19, dtype=torch.int64))
    assert torch.equal(positions, torch.arange(19).expand(3, 19))
    assert use_cache is False


def test_dropout_is_off_and_each_modules_mode_comes_back(windows):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(97, 97, dtype=torch.bfloat16)
            self.dropout = nn.Dropout(0.5)
            self.frozen = nn.Dropout(0.5).eval()

        def forward(self, input_ids):
            return self.frozen(self.dropout(self.embed(input_ids)))

    torch.manual_seed(0)
    model = Model()
    first, second = perplexity(model, windows), perplexity(model, windows)
    assert first == second
    assert first.dtype == "bfloat16"
    assert (model.training, model.dropout.training, model.frozen.training) == (True, True, False)


def test_the_settings_are_recorded_and_printed(llama, windows):
    documents = Documents("some text", ("abc",))
    result = perplexity(llama, windows, documents=documents, stride=1234.4, batch=3)
    assert (result.source, result.data_hash, result.length, result.windows) == ("some text", documents.sha256, 19, 7)
    text = str(result)
    assert text == (
        f"{result.value:.3f} ({result.nats_per_token:.4f} nats per token over 126 tokens; some text, "
        f"sha256 {documents.sha256[:12]}; 7 windows of 19, one every 1,234 tokens; float32 on cpu, batch 3)"
    )


def test_windows_alone_are_named_by_their_own_hash(llama, windows):
    first = perplexity(llama, windows)
    assert first.source == "tokens as given"
    assert first.data_hash == perplexity(llama, windows.clone()).data_hash
    assert first.data_hash != perplexity(llama, windows.flip(0)).data_hash
    assert ", one every" not in str(first)


def test_progress_counts_windows(llama, windows):
    calls = []
    perplexity(llama, windows, batch=3, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(3, 7), (6, 7), (7, 7)]


@pytest.mark.parametrize(
    ("bad", "given"),
    [
        (torch.zeros(3, dtype=torch.int64), r"int64\[3\]"),
        (torch.zeros(0, 8, dtype=torch.int64), r"int64\[0, 8\]"),
        (torch.zeros(2, 1, dtype=torch.int64), r"int64\[2, 1\]"),
        (torch.zeros(2, 8), r"float32\[2, 8\]"),
    ],
)
def test_windows_of_the_wrong_kind_are_errors(llama, bad, given):
    with pytest.raises(
        OptionError, match=rf"^\[OPTION-002\] windows={given} is out of range: int64 \[1 or more, 2 or more\]"
    ):
        perplexity(llama, bad)


def test_a_batch_of_nothing_is_an_error(llama, windows):
    with pytest.raises(OptionError, match=r"^\[OPTION-002\] batch=0 is out of range"):
        perplexity(llama, windows, batch=0)


def test_a_model_without_logits_is_an_error(windows):
    with pytest.raises(CaptureError, match=r"^\[CAPTURE-004\] the model returned a dict, in which there are no logits"):
        perplexity(lambda ids: {}, windows)


@pytest.fixture(scope="module")
def shipped():
    model = AutoModelForCausalLM.from_pretrained(ASSET, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(ASSET)


def test_the_model_that_ships_predicts_held_out_python(shipped):
    result = held_out_perplexity(*shipped, count=12)
    assert 7.0 < result.value < 10.5
    assert result.windows == 12
    assert result.tokens == 12 * 511
    assert result.source.endswith("standard library, held-out")
    assert result.stride > 40_000


@pytest.mark.skipif(
    platform.python_version() != "3.11.7", reason="the reference perplexity is on the library of CPython 3.11.7"
)
def test_the_model_that_ships_has_its_reference_perplexity(shipped):
    assert held_out_perplexity(*shipped, length=512, count=64).value == pytest.approx(8.519, abs=0.003)


def test_too_little_held_out_text_is_an_error(shipped):
    documents = Documents("a haiku", ("one line",))
    with pytest.raises(
        CalibrationError,
        match=r"^\[CALIBRATION-001\] too little text: 'a haiku' gives \d tokens, and one window needs 512",
    ):
        held_out_perplexity(*shipped, documents=documents)
