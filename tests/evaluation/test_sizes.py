import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from skink.evaluation import parameter_bytes, parameter_count


def test_values_and_bytes_are_summed():
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2, bias=False, dtype=torch.float16))
    assert parameter_count(model) == 3 * 5 + 5 + 5 * 2
    assert parameter_bytes(model) == 4 * (3 * 5 + 5) + 2 * 5 * 2


def test_tied_parameters_count_once():
    model = nn.Sequential(nn.Embedding(7, 3), nn.Linear(3, 7, bias=False))
    assert parameter_count(model) == 42
    model[1].weight = model[0].weight
    assert parameter_count(model) == 21


def test_two_parameters_over_the_same_memory_count_once():
    model = nn.Sequential(nn.Embedding(7, 3), nn.Linear(3, 7, bias=False))
    model[1].weight = nn.Parameter(model[0].weight.detach())
    assert parameter_count(model) == 21
    assert parameter_bytes(model) == 84


def test_halves_of_one_tensor_count_as_two():
    whole = torch.zeros(4, 3)
    model = nn.ParameterList([nn.Parameter(whole[:2]), nn.Parameter(whole[2:])])
    assert parameter_count(model) == 12


def test_meta_parameters_without_memory_are_told_apart():
    with torch.device("meta"):
        config = LlamaConfig(
            vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2
        )
        separate, tied = (
            LlamaForCausalLM(LlamaConfig(**{**config.to_dict(), "tie_word_embeddings": tie})) for tie in (False, True)
        )
    layer = 4 * 8 * 8 + 3 * 8 * 8 + 2 * 8
    assert parameter_count(separate) == 2 * 11 * 8 + 2 * layer + 8
    assert parameter_count(tied) == 11 * 8 + 2 * layer + 8


def test_nothing_has_no_size():
    assert parameter_count(nn.ReLU()) == 0
    assert parameter_bytes(nn.ReLU()) == 0
