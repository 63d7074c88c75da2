"""Matches the layers of a small model, in each of the processes that tests start.

python -m tests.training.layerwise.layer_worker FOLDER
"""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from skink.graph.capture import capture
from skink.graph.pipeline import Pipeline
from skink.graph.program import Program
from skink.graph.windows import Windows
from skink.passes.canonicalize import Canonicalize
from skink.training.layerwise.match_layers import match_layers
from skink.training.layerwise.record import MatchingRecord
from skink.training.loop.options import TrainOptions
from skink.training.losses.objectives import Terms


class Block(nn.Module):
    """Adds to what runs past it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Stack(nn.Module):
    """Three layers between a table and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(13, 8), nn.Linear(8, 13)
        self.layers = nn.ModuleList(Block() for _ in range(3))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        for layer in self.layers:
            x = layer(x)
        result: Tensor = self.head(x)
        return result


def programs() -> tuple[Program, Program]:
    """The original, and one with other numbers; the same at every call."""
    torch.manual_seed(0)
    original = capture(Stack().eval(), (torch.zeros(6, 5, dtype=torch.int64),), dims={"tokens": {0: "B", 1: "T"}})
    Pipeline((Canonicalize(),)).run(original, verify=0)
    program = original.clone()
    for name, tensor in original.weights():
        program.set_weight(name, tensor + 0.1 * torch.randn_like(tensor))
    # As GPT-2 has its weights.
    name = "layers.1.up.weight"
    program.set_weight(name, program.weight(name).T.contiguous().T)
    return original, program


def run() -> tuple[MatchingRecord, Program]:
    """The same numbers at every call."""
    original, program = programs()
    text = Windows(torch.randint(13, (6, 5), generator=torch.Generator().manual_seed(0)))
    options = TrainOptions(steps=3, batch=4, learning_rate=1e-2)
    return match_layers(original, program, text, options, terms=Terms(hidden=1.0), train="all"), program


def main() -> None:
    torch.set_num_threads(1)
    record, program = run()
    result = {
        "record": {**record.as_dict(), "seconds": 0.0},
        "weights": {name: tensor.detach() for name, tensor in program.weights()},
    }
    torch.save(result, Path(sys.argv[1]) / f"{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
