"""Which linear layers give the logits."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForMaskedLM, AutoModelForTokenClassification, PreTrainedModel

from skink.graph.capture import capture
from skink.graph.output_heads import head_weights, output_heads, predicts_next_tokens
from skink.graph.pipeline import Pipeline
from skink.graph.program import Stage
from skink.passes.canonicalize import Canonicalize
from skink.passes.decompose import LowRank
from tests.graph.programs import canonical
from tests.models import VOCABULARY


@pytest.mark.parametrize(("family", "head"), [("llama", "lm_head.weight"), ("gpt2", "transformer.wte.weight")])
def test_the_head_of_a_decoder(family: str, head: str) -> None:
    (node,) = output_heads(canonical(family))
    assert node.args[1].target == head
    assert head_weights(canonical(family)) == {head}


def test_a_factored_head_has_two() -> None:
    program = canonical("llama").clone()
    recipe = (LowRank(method="plain", keep=0.5, targets=("lm_head",)),)
    Pipeline(recipe, start=Stage.CANONICAL).run(program)
    assert head_weights(program) == {"lm_head.down.weight", "lm_head.up.weight"}


def test_a_module_without_a_vocabulary_has_no_head() -> None:
    program = capture(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), (torch.randn(3, 8),))
    assert not output_heads(program)
    assert not head_weights(program)


class Encoder(nn.Module):
    """Blocks of one width, and as many positions: that alone makes them no output heads."""

    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(32, 8), nn.Embedding(8, 8)
        self.first, self.second, self.last = nn.Linear(8, 8), nn.Linear(8, 8), last

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.words(input_ids) + self.places(position_ids)
        hidden = hidden + self.first(hidden)
        found: torch.Tensor = self.last(hidden + self.second(hidden))
        return found


@pytest.mark.parametrize(("last", "heads"), [(nn.Identity(), []), (nn.Linear(8, 32), ["last.weight"])])
def test_only_a_table_of_tokens_is_a_vocabulary(last: nn.Module, heads: list[str]) -> None:
    inputs = {name: torch.arange(6)[None] for name in ("input_ids", "position_ids")}
    program = capture(Encoder(last), inputs)
    assert [str(node.args[1].target) for node in output_heads(program)] == heads
    assert head_weights(program) == set(heads)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt"])
def test_a_decoder_predicts_the_next_token(family: str) -> None:
    assert predicts_next_tokens(canonical(family))


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        # What fills in a masked token has seen the next one.
        ("bert", AutoModelForMaskedLM),
        # Logits of each token, and causal attention: but of kinds of token.
        ("llama", AutoModelForTokenClassification),
    ],
)
def test_other_logits_do_not(family: str, kind: type[PreTrainedModel]) -> None:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    program = capture(kind.from_config(AutoConfig.for_model(family, **sizes, num_attention_heads=2)).eval())
    Pipeline((Canonicalize(),)).run(program, verify=0)
    assert program.outputs == ("logits",)
    assert not predicts_next_tokens(program)
    assert not predicts_next_tokens(capture(nn.Linear(8, 8), (torch.randn(3, 8),)))
