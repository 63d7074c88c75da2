"""The forms of one model that a report compares; `test_folder.py` has them measured from end to end."""

from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel

from skink.compression import CompressOptions
from skink.compression.compress import compress_program
from skink.compression.forms import Job, compare, measure_decoder, measure_encoder, measure_layers
from skink.export.huggingface.sentences import SentenceSettings


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A tiny encoder with thinner layers, of which nothing was written yet."""
    sizes = {"vocab_size": 11, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    source = BertModel(BertConfig(**sizes, num_hidden_layers=1)).eval()
    done = compress_program(source, "low-rank{keep=0.5,method=plain}", verify=0)
    options = CompressOptions(evaluate=False)
    return Job(done, source, Path("nowhere"), torch.float16, None, options, lambda name, count, total: None)


def test_sizes_are_those_in_the_dtype_that_is_stored(job: Job) -> None:
    forms = measure_encoder(job, None, SentenceSettings())
    assert list(forms) == ["transformers", "skink, empty recipe", "skink, compressed"]
    source, dense, small = forms.values()
    assert source == dense
    assert small.cost.linear_parameters < 0.6 * dense.cost.linear_parameters
    assert all(form.cost.bytes == 2 * form.cost.parameters for form in forms.values())
    assert measure_decoder(job, None, None) == forms


def test_without_text_nothing_is_compared(job: Job) -> None:
    assert compare(job, None) == {}
    assert measure_layers(job, None) == {}
