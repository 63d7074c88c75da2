"""Which class of ours a model of transformers becomes."""

import pytest
import torch
from torch import nn
from transformers import BertConfig, PreTrainedConfig
from transformers.models.auto import modeling_auto

from skink.export.huggingface import SkinkConfig
from skink.export.huggingface.encoders import SkinkForQuestionAnswering, SkinkModel
from skink.export.huggingface.forms import FORMS, HEADLESS, form_of, named_form
from skink.export.huggingface.modeling import SkinkForCausalLM
from skink.graph.capture import capture
from skink.graph.program import Program


def program(class_name: str, *outputs: str) -> Program:
    """A program that says it was captured from a class, with such results."""

    class Several(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(x + index for index in range(len(outputs)))

    made = capture(Several(), (torch.zeros(2, 3),))
    made.outputs = outputs
    made.origin["class"] = class_name
    return made


@pytest.mark.parametrize(
    ("source", "outputs", "name"),
    [
        ("LlamaForCausalLM", ("logits",), "SkinkForCausalLM"),
        ("BertLMHeadModel", ("logits",), "SkinkForCausalLM"),
        ("BertForMaskedLM", ("logits",), "SkinkForMaskedLM"),
        ("XLMRobertaForSequenceClassification", ("logits",), "SkinkForSequenceClassification"),
        ("DebertaV2ForTokenClassification", ("logits",), "SkinkForTokenClassification"),
        ("DistilBertForQuestionAnswering", ("start_logits", "end_logits"), "SkinkForQuestionAnswering"),
        ("BertModel", ("last_hidden_state", "pooler_output"), "SkinkModel"),
        ("SomebodysEncoder", ("last_hidden_state",), "SkinkModel"),
        ("SomebodysReader", ("start_logits", "end_logits"), "SkinkForQuestionAnswering"),
        ("SomebodysDecoder", ("logits",), "SkinkForCausalLM"),
    ],
)
def test_a_class_of_transformers_has_one_form(source: str, outputs: tuple[str, ...], name: str) -> None:
    assert form_of(program(source, *outputs), PreTrainedConfig()).name == name


def test_a_skink_configuration_says_it_itself() -> None:
    config = SkinkConfig(architectures=["SkinkForMaskedLM"])
    assert form_of(program("BertModel", "logits"), config).name == "SkinkForMaskedLM"
    assert named_form(SkinkConfig()) is None
    assert named_form(BertConfig(architectures=["BertModel"])) is None


def test_every_form_has_its_class_its_auto_class_and_its_table() -> None:
    for form in FORMS:
        assert form.model_class.__name__ == form.name
        assert getattr(modeling_auto, form.auto)
        assert getattr(modeling_auto, form.sources)
        assert form.encodes == (form.model_class is not SkinkForCausalLM)
    assert HEADLESS.model_class is SkinkModel
    assert SkinkForQuestionAnswering.outputs == ("start_logits", "end_logits")
