"""Rows for each text, told from rows for each token."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from skink.graph.capture import capture
from skink.graph.passes import linear_weight
from skink.graph.pooling import rows_per_text
from tests.graph.programs import canonical
from tests.passes.decompose.programs import encoder


def read(program):
    """Rows of each linear layer's input, by its weight."""
    return {
        name: rows_per_text(program, node.args[0])
        for node in program.graph.nodes
        if (name := linear_weight(program, node))
    }


def test_a_pooler_and_a_head_read_one_row_of_each_text():
    found = read(encoder(AutoModelForSequenceClassification))
    assert {name for name, rows in found.items() if rows == 1} == {"bert.pooler.dense.weight", "classifier.weight"}
    assert {rows for rows in found.values() if rows != 1} == {None}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_layer_of_a_decoder_reads_tokens(family):
    assert set(read(canonical(family)).values()) == {None}


class Halves(nn.Module):
    """Each text gives two rows: the means of its features' halves."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(x.mean(1).unflatten(-1, (2, 4)))


def test_several_rows_of_each_text():
    program = capture(Halves(), (torch.randn(3, 5, 8),), dims={"x": {0: "batch", 1: "tokens"}})
    assert set(read(program).values()) == {2}


def test_examples_without_tokens_are_all_rows():
    program = capture(nn.Linear(4, 3), (torch.randn(3, 4),))
    assert set(read(program).values()) == {None}
