import pytest
import torch
from torch import Tensor, nn

from skink.errors import RecoveryError
from skink.graph.capture import capture
from skink.graph.passes import Pass
from skink.graph.pipeline import Pipeline
from skink.graph.program import Program
from skink.passes.canonicalize import Canonicalize
from skink.passes.decompose import BasisSharing, LowRank
from skink.training.layerwise.pieces import cut_pieces
from skink.training.weights.trainable import trainable_names
from tests.models import VOCABULARY
from tests.programs import canonical, canonicalized
from tests.training.layerwise.factored import factored


def module_of(node: torch.fx.Node) -> str:
    return str(node.meta["module"])


@pytest.mark.parametrize(
    ("family", "layers"),
    [
        *((family, "model.layers") for family in ("llama", "gemma2", "mixtral", "phi3")),
        ("gpt2", "transformer.h"),
        ("opt", "model.decoder.layers"),
    ],
)
def test_each_layer_is_a_piece(family: str, layers: str) -> None:
    program, original = factored(family)
    pieces = cut_pieces(original, program, trainable_names(program, original, "new"))
    assert [piece.name for piece in pieces] == [f"{layers}.0", f"{layers}.1"]
    for index, piece in enumerate(pieces):
        assert piece.index == index
        # Between layers of these there is the residual stream alone.
        assert len(piece.begin.teacher) == len(piece.begin.student) == len(piece.end.teacher) == 1
        assert piece.end.student[0] in program.graph.nodes
        assert piece.end.teacher[0] in original.graph.nodes
        assert module_of(piece.end.student[0]).startswith(f"{layers}.{index}")
        assert piece.trained
        assert all(name.startswith(f"{layers}.{index}.") for name in piece.trained)
    assert pieces[0].end == pieces[1].begin


def test_weights_outside_the_layers_do_not_train() -> None:
    original = canonical("llama")
    names = trainable_names(original, None, "all")
    pieces = cut_pieces(original, original.clone(), names)
    left = set(names) - {name for piece in pieces for name in piece.trained}
    assert left == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}


def test_layers_that_share_a_basis_are_one_piece() -> None:
    original = canonical("llama")
    program = original.clone()
    text = torch.randint(0, VOCABULARY, (4, 8), generator=torch.Generator().manual_seed(0))
    sharing = BasisSharing(keep=0.6, method="whitened", group=2)
    Pipeline((sharing,), start=original.stage).run(program, calibration=text)
    (piece,) = cut_pieces(original, program, trainable_names(program, original, "new"))
    assert piece.name == "model.layers.0 to model.layers.1"
    assert any("layers.0" in name and "down" in name for name in piece.trained)
    # What is shared and does not train keeps no layers together.
    names = [name for name in piece.trained if "up.weight" in name]
    assert len(cut_pieces(original, program, names)) == 2


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, width), nn.Linear(width, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Stack(nn.Module):
    """Layers that read the input itself, as often as asked; the last of them hand two values on."""

    def __init__(self, count: int, *, skip: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Block(12) for _ in range(count))
        self.skip = skip

    def forward(self, x: Tensor) -> Tensor:
        first = x = self.layers[0](x)
        for layer in self.layers[1:]:
            x = layer(x)
        return x * 2 + first if self.skip else x * 2


def stack(count: int, *, skip: bool = False) -> Program:
    return canonicalized(Stack(count, skip=skip), torch.randn(3, 8))[0]


def test_the_first_layer_may_read_the_input() -> None:
    program = stack(3)
    pieces = cut_pieces(program, program.clone(), trainable_names(program, None, "all"))
    assert [piece.name for piece in pieces] == ["layers.0", "layers.1", "layers.2"]
    assert pieces[0].begin.teacher == pieces[0].begin.student == ()
    assert [len(piece.trained) for piece in pieces] == [4, 4, 4]


def test_values_that_run_past_layers_are_carried() -> None:
    program = stack(3, skip=True)
    pieces = cut_pieces(program, program.clone(), trainable_names(program, None, "all"))
    assert [len(piece.end.teacher) for piece in pieces] == [1, 2, 2]


def test_a_weight_that_is_read_outside_the_layers_too_does_not_train() -> None:
    class Tied(Stack):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(super().forward(x), self.layers[0].up.weight)

    program = canonicalized(Tied(2), torch.randn(3, 8))[0]
    pieces = cut_pieces(program, program.clone(), trainable_names(program, None, "all"))
    trained = [name for piece in pieces for name in piece.trained]
    assert {"layers.0.up.bias", "layers.0.down.weight"} <= set(trained)
    assert "layers.0.up.weight" not in trained


def test_a_layer_that_is_gone_leaves_its_neighbours_in_one_piece() -> None:
    pieces = cut_pieces(stack(4), without(stack(4), "layers.1"), ["layers.0.up.weight", "layers.2.up.weight"])
    assert [piece.name for piece in pieces] == ["layers.0 to layers.1", "layers.2", "layers.3"]


def without(program: Program, layer: str) -> Program:
    """The program without what a layer adds."""
    inside = [node for node in program.graph.nodes if str(node.meta.get("module", "")).startswith(layer)]
    first = next(node for node in inside if node.op == "call_function")
    inside[-1].replace_all_uses_with(first.all_input_nodes[0])
    for node in reversed(inside):
        program.graph.erase_node(node)
    program.graph_module.recompile()
    return program


def test_programs_without_layers_in_common_are_refused() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(torch.relu(self.one(x)))

    program = capture(Plain().eval(), (torch.randn(3, 8),))
    Pipeline((Canonicalize(),)).run(program, verify=0)
    with pytest.raises(RecoveryError, match="no layers in common") as caught:
        cut_pieces(program, program.clone(), ["one.weight"])
    assert caught.value.code == "RECOVER-007"


def lowered_rank(program: Program, options: Pass) -> Program:
    Pipeline((options,), start=program.stage).run(program)
    return program


def test_factors_with_a_shared_input_stay_in_their_layer() -> None:
    original = canonical("llama")
    program = lowered_rank(original.clone(), LowRank(method="plain", keep=0.6, share_inputs=True))
    pieces = cut_pieces(original, program, trainable_names(program, original, "new"))
    assert [piece.name for piece in pieces] == ["model.layers.0", "model.layers.1"]
