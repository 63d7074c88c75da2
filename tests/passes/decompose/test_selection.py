import pytest
import torch
from torch import nn

from skink.graph.capture import capture
from skink.graph.output_heads import output_heads
from skink.passes.decompose.selection import linear_layers, notes_on_few_tokens, structural_reason
from tests.graph.programs import canonical


def reasons(program, *, asked=False):
    heads = output_heads(program)
    return {layer.name: structural_reason(layer, heads, asked=asked) for layer in linear_layers(program)}


def test_layers_are_listed_once_in_order_with_their_shapes():
    layers = linear_layers(canonical("llama"))
    names = [layer.name for layer in layers]
    assert len(names) == len(set(names)) == 15
    assert names[:2] == ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"]
    assert names[-1] == "lm_head"
    key = layers[1]
    assert (key.weight, key.shape, key.parameters) == ("model.layers.0.self_attn.k_proj.weight", (32, 64), 32 * 64)


def test_patterns_fit_qualified_names():
    layers = {layer.name: layer for layer in linear_layers(canonical("llama"))}
    up = layers["model.layers.0.mlp.up_proj"]
    assert up.matches(("*.mlp.*",))
    assert up.matches(("nothing", "model.layers.0.*"))
    assert not up.matches(("*.MLP.*", "up_proj"))
    assert not up.matches(())


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "gpt_neox", "opt"])
def test_only_the_output_head_of_a_decoder_stays(family):
    program = canonical(family, tie_word_embeddings=False)
    found = reasons(program)
    objections = {name: reason for name, reason in found.items() if reason is not None}
    assert len(objections) == 1
    name, reason = objections.popitem()
    assert name.split(".")[-1] in ("lm_head", "embed_out")
    assert reason == "it is the output head; name it in targets to factor it"
    assert all(reason is None for reason in reasons(program, asked=True).values())


def test_a_head_tied_to_the_embedding_stays_even_when_asked_for():
    program = canonical("gpt2")
    tied = [layer for layer in linear_layers(program) if layer.others]
    assert [layer.name for layer in tied] == ["transformer.wte"]
    assert tied[0].matches(("lm_head",))
    assert reasons(program, asked=True)["transformer.wte"] == "the weight is tied: embedding reads it too"


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_router_of_experts_stays_even_when_asked_for():
    found = reasons(canonical("mixtral"), asked=True)
    assert {name for name, reason in found.items() if reason and "experts" in reason} == {
        "model.layers.0.mlp.gate",
        "model.layers.1.mlp.gate",
    }


class Bottleneck(nn.Module):
    def __init__(self, width, between):
        super().__init__()
        self.down, self.up, self.between = nn.Linear(16, width), nn.Linear(width, 16), between

    def forward(self, x):
        return torch.tanh(self.up(self.between(self.down(torch.tanh(x)))))


@pytest.mark.parametrize(
    ("width", "between", "is_factor"),
    [(8, nn.Identity(), True), (9, nn.Identity(), False), (8, nn.ReLU(), False)],
)
def test_a_product_of_thin_layers_is_factored_already(width, between, is_factor):
    found = reasons(capture(Bottleneck(width, between), (torch.randn(3, 16),)))
    expected = "it is already one of two thin factors" if is_factor else None
    assert found == {"down": expected, "up": expected}


class Shared(nn.Module):
    """A weight that is also read as it is."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        return self.layer(x) + self.layer.weight.sum()


def test_a_weight_that_something_else_reads_stays():
    assert reasons(capture(Shared(), (torch.randn(3, 8),))) == {"layer": "the weight is tied: sum reads it too"}


class Computed(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight * 2)


def test_a_weight_that_is_computed_is_no_layer():
    assert linear_layers(capture(Computed(), (torch.randn(3, 8),))) == []


def test_one_note_for_all_layers_with_few_tokens():
    assert notes_on_few_tokens([("a", 16, 16), ("b", 40, 16)], "so be it.") == []
    assert notes_on_few_tokens([("a", 16, 16), ("b", 4, 16)], "so be it.") == [
        "b: 4 tokens of calibration text for 16 input features; so be it."
    ]
    assert notes_on_few_tokens([("a", 9, 16), ("b", 4, 16), ("c", 5, 80)], "so be it.") == [
        "c: 5 tokens of calibration text for 80 input features, and too few for 2 others; so be it."
    ]
