import pytest
import torch
from torch import Tensor

from skink.graph.calibration import token_batches
from skink.graph.program import Program
from skink.graph.regions import inputs_of, plan_region, run_plan
from skink.training.layerwise.layer import Half, Layer, Target, hidden_targets, reaching, targets_among, weights_for
from skink.training.layerwise.pieces import Piece, cut_pieces
from skink.training.losses.places import corresponding
from skink.training.weights.trainable import trainable_names
from tests.models import VOCABULARY
from tests.training.layerwise.factored import factored
from tests.training.layerwise.test_pieces import stack


def values(program: Program, nodes: list[torch.fx.Node], inputs: dict[str, Tensor]) -> list[Tensor]:
    """What nodes give when the whole program runs."""
    plan = plan_region(program.graph, nodes, ())
    found = run_plan(program, plan, inputs_of(program, [inputs])[0], nodes)
    return [found[node] for node in nodes]


@pytest.fixture
def case() -> tuple[Program, Program, Piece, dict[str, Tensor], Tensor]:
    """Original, program, second layer, inputs with padding, which tokens count."""
    program, original = factored()
    piece = cut_pieces(original, program, trainable_names(program, original, "new"))[1]
    tokens = torch.randint(VOCABULARY, (3, 5), generator=torch.Generator().manual_seed(0))
    padding = torch.ones_like(tokens)
    padding[1, :3] = 0
    return original, program, piece, token_batches(original, tokens, padding=padding)[0], padding != 0


def test_half_a_piece_gives_what_the_whole_program_gives_there(case: tuple) -> None:
    original, _, piece, inputs, _ = case
    entry = values(original, [*piece.begin.teacher], inputs)
    half = Half(original, piece.begin.teacher, piece.end.teacher, weights_for(original, "float32"))
    (found,) = half.run(inputs, entry)
    (expected,) = values(original, [*piece.end.teacher], inputs)
    assert torch.equal(found, expected)


def test_errors_and_what_they_are_measured_against(case: tuple) -> None:
    original, program, piece, inputs, real = case
    pairs = corresponding(original, program, "attention")
    targets = [*hidden_targets(piece), *targets_among(original, piece, pairs, 1)]
    assert [(target.kind, target.share, target.change) for target in targets] == [(0, 1.0, 0), (1, 1.0, None)]
    layer = Layer(original, program, piece, targets, "float32")
    (x,) = values(original, [*piece.begin.teacher], inputs)
    following, exact = layer.exact(inputs, [x])
    y, attended = values(original, [piece.end.teacher[0], targets[1].teacher], inputs)
    assert torch.equal(following[0], y)
    assert torch.equal(exact[0], y) and torch.equal(exact[1], attended)  # noqa: PT018
    # The program's layer on the original's values, by the program itself.
    plan = plan_region(program.graph, [target.student for target in targets], piece.begin.student)
    start = {**inputs_of(program, [inputs])[0], piece.begin.student[0]: x}
    made = run_plan(program, plan, start, [target.student for target in targets])
    expected = [
        (made[target.student] - value)[real].square().sum() for target, value in zip(targets, exact, strict=True)
    ]
    squares = layer.squares(inputs, [x], exact, real)
    torch.testing.assert_close(squares, torch.stack(expected))
    sizes = layer.sizes([x], exact, real)
    torch.testing.assert_close(sizes[0].float(), (y - x)[real].square().sum())
    torch.testing.assert_close(sizes[1].float(), attended[real].square().sum())
    tokens = int(real.sum())
    error = layer.factors(sizes, tokens) @ squares / tokens
    torch.testing.assert_close(error, (squares / sizes).float())


def test_several_values_of_a_kind_share_its_weight(case: tuple) -> None:
    original, program, piece, _, _ = case
    node, other = piece.end.teacher[0], piece.end.student[0]
    layer = Layer(original, program, piece, [Target(node, other, 0, 0.5), Target(node, other, 0, 0.5)], "float32")
    factors = layer.factors(torch.tensor([4.0, 8.0]).double(), 2)
    assert factors.tolist() == [[0.25, 0.125], [0.0, 0.0]]
    # A measure of 0 is none.
    assert layer.factors(torch.zeros(2).double(), 2)[0].tolist() == [0.5, 0.5]


def test_gradients_reach_the_layer_s_own_weights_and_no_others(case: tuple) -> None:
    original, program, piece, inputs, real = case
    layer = Layer(original, program, piece, hidden_targets(piece), "float32")
    (x,) = values(original, [*piece.begin.teacher], inputs)
    _, exact = layer.exact(inputs, [x])
    layer.squares(inputs, [x], exact, real, training=True).sum().backward()
    for name, weight in layer.weights.items():
        assert weight.grad is not None
        assert weight.grad.abs().sum() > 0
        assert weight.data_ptr() != program.weight(name).data_ptr()
    assert all(tensor.grad is None for _, tensor in (*program.weights(), *original.weights()))


def test_padding_may_hold_anything(case: tuple) -> None:
    original, program, piece, inputs, real = case
    layer = Layer(original, program, piece, hidden_targets(piece), "float32")
    (x,) = values(original, [*piece.begin.teacher], inputs)
    _, (y,) = layer.exact(inputs, [x])
    expected = layer.squares(inputs, [x], [y], real)
    wild = torch.where(real[..., None], y, torch.nan)
    assert torch.equal(layer.squares(inputs, [x], [wild], real), expected)


def test_frozen_weights_are_float32_where_all_is() -> None:
    program = factored()[0].with_dtype(torch.bfloat16)
    name = "model.norm.weight"
    assert weights_for(program, "float32")(name).dtype is torch.float32
    assert weights_for(program, "bfloat16")(name).dtype is torch.bfloat16
    buffer = "model.rotary_emb.inv_freq"
    assert weights_for(program, "float32")(buffer).dtype is program.weight(buffer).dtype


def test_what_only_passes_by_is_no_target() -> None:
    original = stack(3, skip=True)
    pieces = cut_pieces(original, original.clone(), trainable_names(original, None, "all"))
    assert [len(piece.end.teacher) for piece in pieces] == [1, 2, 2]
    assert [len(hidden_targets(piece)) for piece in pieces] == [1, 1, 1]
    # It is told by where it stood among what came in.
    assert [target.change for piece in pieces for target in hidden_targets(piece)] == [None, None, 1]


def test_only_weights_that_targets_depend_on_train(case: tuple) -> None:
    original, program, piece, _, _ = case
    pairs = corresponding(original, program, "attention")
    found = reaching(program, piece, targets_among(original, piece, pairs, 1))
    assert found.trained == tuple(name for name in piece.trained if ".self_attn." in name)
    assert reaching(program, piece, []).trained == ()
