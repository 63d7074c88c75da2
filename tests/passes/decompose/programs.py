"""Small programs, and what runs a pass on them."""

import torch
from torch import nn
from transformers import AutoConfig

from skink.graph.capture import capture
from skink.graph.pipeline import Pipeline
from skink.graph.program import Stage
from skink.passes.canonicalize import Canonicalize
from tests.models import VOCABULARY


def text(count=8, length=24):
    return torch.randint(0, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(4))


def run(program, options, *, calibration=None, padding=None, progress=lambda name, done, total: None):
    """A pass on a clone of `program`, with its structure verified after it: (result, rewritten program)."""
    changed = program.clone()
    pipeline = Pipeline((options,), start=Stage.CANONICAL)
    records = pipeline.run(changed, calibration=calibration, padding=padding, verify=1, progress=progress).passes
    return records[0].result, changed


def captured(module, *shape):
    program = capture(module.eval(), (torch.randn(*shape),))
    Pipeline((Canonicalize(),)).run(program, verify=0)
    return program


def encoder(kind, **options):
    """A tiny BERT of a kind of Auto class, canonical."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    config = AutoConfig.for_model("bert", **sizes, num_attention_heads=4, max_position_embeddings=32)
    torch.manual_seed(0)
    model = kind.from_config(config, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    program = capture(model)
    Pipeline((Canonicalize(),)).run(program, verify=0)
    return program


def logits(program, ids):
    return program(ids, torch.ones_like(ids), torch.arange(ids.shape[1]).expand(ids.shape))[0]


class Block(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(16, 24, bias=bias), nn.Linear(24, 16, bias=bias)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))
