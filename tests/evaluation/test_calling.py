import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM

from skink.errors import CaptureError
from skink.evaluation.calling import accepted_arguments, call, device_of, logits_of

EVERYTHING = {"input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}


def llama():
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    )


def test_arguments_are_those_of_the_signature():
    assert accepted_arguments(llama()) == EVERYTHING
    bloom = BloomForCausalLM(BloomConfig(vocab_size=11, hidden_size=8, n_layer=1, n_head=2))
    assert accepted_arguments(bloom) == EVERYTHING - {"position_ids"}
    assert accepted_arguments(lambda ids: ids) == frozenset()
    assert accepted_arguments(lambda **anything: anything) == EVERYTHING - {"logits_to_keep"}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_a_wrapper_is_seen_through():
    assert accepted_arguments(torch.compile(llama(), backend="eager")) == EVERYTHING
    assert accepted_arguments(get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))) == EVERYTHING


def test_only_accepted_arguments_are_passed():
    assert call(lambda **given: given, frozenset({"input_ids"}), input_ids=1, use_cache=True) == {"input_ids": 1}
    assert call(lambda ids: ids, frozenset(), input_ids=1, use_cache=True) == 1


def test_logits_are_found_in_every_form_of_output():
    logits = torch.zeros(1, 2, 3)
    assert logits_of(logits) is logits
    assert logits_of((logits, None)) is logits
    assert logits_of(type("Output", (), {"logits": logits})()) is logits


@pytest.mark.parametrize("output", [None, (), {"logits": 1}, (None,)])
def test_an_output_without_logits_is_an_error(output):
    with pytest.raises(CaptureError, match=r"^\[CAPTURE-004\] the model returned a \w+, in which there are no logits"):
        logits_of(output)


def test_device_is_that_of_the_weights():
    assert device_of(nn.Linear(2, 2, device="meta")) == torch.device("meta")
    assert device_of(nn.ReLU()) is None
    assert device_of(lambda ids: ids) is None
