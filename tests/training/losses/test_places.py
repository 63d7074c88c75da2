"""Where hidden states and attention outputs lie: held against what hooks on the model's own modules see."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import skink
from skink.errors import RecoveryError
from skink.graph.passes import Pass
from skink.graph.pipeline import Pipeline
from skink.graph.program import Program
from skink.graph.regions import inputs_of, plan_region, run_plan
from skink.graph.rewriter import Rewriter
from skink.kernels import ATTENTION
from skink.passes.canonicalize import Canonicalize
from skink.passes.decompose import BasisSharing, LowRank, ReduceWidth
from skink.training.losses.places import (
    Kind,
    attention_outputs,
    common_places,
    corresponding,
    hidden_states,
    holds_tokens,
    layer_of,
    output_of,
    relative_error,
)
from tests.models import FAMILIES, build
from tests.programs import batch, canonical, eager

KINDS: tuple[Kind, ...] = ("hidden", "attention")
PROJECTIONS = {
    "gpt2": "transformer.h.{}.attn.c_proj",
    "gpt_neox": "gpt_neox.layers.{}.attention.dense",
    "opt": "model.decoder.layers.{}.self_attn.out_proj",
}
LAYERS = {"gpt2": "transformer.h.{}", "gpt_neox": "gpt_neox.layers.{}", "opt": "model.decoder.layers.{}"}


def layers(family: str, *numbers: int) -> list[str]:
    return [LAYERS.get(family, "model.layers.{}").format(number) for number in numbers]


def projections(family: str, *numbers: int) -> list[str]:
    return [PROJECTIONS.get(family, "model.layers.{}.self_attn.o_proj").format(number) for number in numbers]


@cache
def _deep() -> Program:
    program = skink.capture(build("llama", num_hidden_layers=3))
    Pipeline((Canonicalize(),)).run(program)
    return program


def values(program: Program, places: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    nodes = list(places.values())
    plan = plan_region(program.graph, nodes, ())
    found = run_plan(program, plan, inputs_of(program, [inputs])[0], nodes)
    return {name: found[node] for name, node in places.items()}


def hooked(model: nn.Module, names: list[str], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What modules give, as the model itself computes it."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, result: Any) -> None:
            found[name] = result[0] if isinstance(result, tuple) else result

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_places_hold_what_the_modules_give(family: str) -> None:
    program, inputs = canonical(family), batch(2, 7, 2)._asdict()
    places = hidden_states(program) | attention_outputs(program)
    assert sorted(places) == sorted([*layers(family, 0, 1), *projections(family, 0, 1)])
    assert all(holds_tokens(program, node) for node in places.values())
    found = values(program, places, {entry.name: inputs[entry.name] for entry in program.inputs})
    wanted = hooked(eager(family), list(places), inputs)
    mask = inputs["attention_mask"].bool()
    for name in places:
        torch.testing.assert_close(found[name][mask], wanted[name].view_as(found[name])[mask], rtol=1e-4, atol=1e-4)


PASSES: dict[str, Pass] = {
    "low-rank": LowRank(method="plain", keep=0.9),
    "pivoted": LowRank(keep=0.9, refit=False),
    "reduce-width": ReduceWidth(keep=0.8),
    "basis-sharing": BasisSharing(keep=0.9, refit=False),
}
REWRITTEN = [("low-rank", family) for family in FAMILIES]
REWRITTEN += [
    (name, family) for name in ("pivoted", "reduce-width", "basis-sharing") for family in ("llama", "gpt2", "phi3")
]


@pytest.mark.parametrize(("name", "family"), REWRITTEN)
def test_places_stay_where_they_are_when_layers_are_rewritten(name: str, family: str) -> None:
    original, program = canonical(family), canonical(family)
    text = torch.randint(3, 97, (8, 16), generator=torch.Generator().manual_seed(0))
    Pipeline((PASSES[name],), start=program.stage).run(program, calibration=text)
    assert len(program.edits) > len(original.edits)
    inputs = {entry.name: value for entry, value in zip(program.inputs, batch(2, 7), strict=True)}
    for kind, names in (("hidden", layers(family, 0, 1)), ("attention", projections(family, 0, 1))):
        places = common_places(original, program, kind)  # type: ignore[arg-type]
        assert list(places) == names
        one = values(original, {key: pair[0] for key, pair in places.items()}, inputs)
        two = values(program, {key: pair[1] for key, pair in places.items()}, inputs)
        for own, other in (names, reversed(names)):
            alike = [float(torch.cosine_similarity(two[own].flatten(), one[key].flatten(), 0)) for key in (own, other)]
            assert alike[0] > max(alike[1], 0.5)


def without_layer(program: Program, name: str, before: str) -> Program:
    rewriter = Rewriter(program, "test")
    last, first = (output_of(program, entry) for entry in (name, before))
    assert last is not None
    assert first is not None
    rewriter.replace(last, first, rule="drop-layer")
    rewriter.finish()
    return program


def test_a_layer_that_was_removed_does_not_shift_the_others() -> None:
    original, program = _deep(), without_layer(_deep().clone(), "model.layers.1", "model.layers.0")
    hidden = common_places(original, program, "hidden")
    assert list(hidden) == layers("llama", 0, 2)
    assert all(one.meta["module"] == two.meta["module"] for one, two in hidden.values())
    assert list(common_places(original, program, "attention")) == projections("llama", 0, 2)


def test_attention_that_was_replaced_is_still_found() -> None:
    """Something else may mix tokens in the student; its projection is where it was."""
    original, program = canonical("llama"), canonical("llama")
    rewriter = Rewriter(program, "test")
    for node in program.graph.find_nodes(op="call_function", target=ATTENTION.overload):
        with rewriter.before(node):
            relu = rewriter.call(torch.ops.aten.relu.default, node.args[0], rule="test")
        rewriter.replace(node, relu, rule="test")
    rewriter.finish()
    assert not attention_outputs(program)
    assert list(common_places(original, program, "attention")) == projections("llama", 0, 1)


@pytest.mark.parametrize(
    ("kind", "patterns", "names"),
    [
        ("hidden", ("model.layers.1",), layers("llama", 1)),
        # A star goes past dots, but where a layer's name matches, what is inside layers is not meant.
        ("hidden", ("model.layers.*",), layers("llama", 0, 1)),
        ("hidden", ("*.mlp",), ["model.layers.0.mlp", "model.layers.1.mlp"]),
        ("hidden", ("*.0.mlp", "*.1.self_attn"), ["model.layers.0.mlp", "model.layers.1.self_attn"]),
        ("hidden", ("*.1.mlp.up_proj",), ["model.layers.1.mlp.up_proj"]),
        ("attention", ("*.o_proj",), projections("llama", 0, 1)),
        ("attention", ("model.layers.1",), projections("llama", 1)),
        ("attention", ("*.0.self_attn",), projections("llama", 0)),
    ],
)
def test_patterns_choose(kind: Kind, patterns: tuple[str, ...], names: list[str]) -> None:
    program = canonical("llama")
    assert list(common_places(program, program, kind, patterns)) == names
    assert corresponding(program, program, kind, patterns) == [
        (node, node) for node, _ in common_places(program, program, kind, patterns).values()
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_a_pattern_that_matches_nothing_is_refused(kind: Kind) -> None:
    program = canonical("llama")
    with pytest.raises(RecoveryError, match=r"\[RECOVER-007\].*\n.*matches '\*\.atention'; it has model\.layers\.0"):
        corresponding(program, program, kind, ("*.atention",))


@pytest.mark.parametrize("kind", KINDS)
def test_models_of_other_families_have_nothing_in_common(kind: Kind) -> None:
    with pytest.raises(RecoveryError, match=r"\[RECOVER-007\].*\n.*nothing is left in the student"):
        corresponding(canonical("llama"), canonical("gpt2"), kind)


def test_other_widths_are_refused() -> None:
    narrow = skink.capture(build("llama", hidden_size=32))
    with pytest.raises(RecoveryError, match=r"\[RECOVER-007\].*model\.layers\.0\.\n.*gives 64 .* the student 32"):
        corresponding(canonical("llama"), narrow, "hidden")
    # Where a pattern keeps clear of what differs, the rest can be compared.
    inner = ("*.mlp.up_proj",)
    assert len(corresponding(canonical("llama"), narrow, "hidden", inner)) == 2


@pytest.mark.parametrize("form", ["thin", "pivoted"])
def test_layers_that_share_a_factor_give_what_they_gave(form: Any) -> None:
    """The first of them computes the factor, which the others read too, and it is not what the layer gives."""
    original, program = canonical("llama"), canonical("llama")
    text = torch.randint(3, 97, (8, 16), generator=torch.Generator().manual_seed(0))
    sharing = LowRank(method="whitened", allocation="uniform", form=form, share_inputs=True, keep=0.9, refit=False)
    Pipeline((sharing,), start=program.stage).run(program, calibration=text)
    names = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]
    places = common_places(original, program, "hidden", [f"*.{name}" for name in names])
    assert len(places) == 10
    inputs = {entry.name: value for entry, value in zip(program.inputs, batch(2, 7), strict=True)}
    one = values(original, {key: pair[0] for key, pair in places.items()}, inputs)
    two = values(program, {key: pair[1] for key, pair in places.items()}, inputs)
    for name in places:
        assert float(torch.cosine_similarity(two[name].flatten(), one[name].flatten(), 0)) > 0.5


class Inline(nn.Module):
    """A layer whose attention and projection are in no modules of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.out, self.up = nn.Parameter(torch.eye(8)), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = x.unsqueeze(1)
        mixed = nn.functional.scaled_dot_product_attention(y, y.sin(), y.cos(), is_causal=True).squeeze(1)
        return self.up(x + nn.functional.linear(mixed, self.out))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Inline(), Inline()])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[1](self.layers[0](x))


def test_a_projection_without_a_module_is_not_taken_for_its_layer() -> None:
    program = skink.capture(Stack(), (torch.randn(3, 5, 8),), dims={"x": {0: "B", 1: "T"}})
    Pipeline((Canonicalize(),)).run(program)
    assert len(program.graph.find_nodes(op="call_function", target=ATTENTION.overload)) == 2
    assert list(hidden_states(program)) == ["layers.0", "layers.1"]
    assert not attention_outputs(program)


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 4)])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[1](self.layers[0](x).mean(1))


def test_what_has_no_row_for_each_token_is_no_place() -> None:
    program = skink.capture(Pooled(), (torch.randn(3, 5, 8),), dims={"x": {0: "B", 1: "T"}})
    assert list(hidden_states(program)) == ["layers.0"]
    with pytest.raises(RecoveryError, match=r"\[RECOVER-007\].*\n.*no attention that Skink knows"):
        corresponding(program, program, "attention")


class Loose(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x)


def test_a_model_without_layers_says_what_a_layer_is() -> None:
    program = skink.capture(Loose(), (torch.randn(3, 5, 8),), dims={"x": {0: "B", 1: "T"}})
    with pytest.raises(RecoveryError, match=r"\[RECOVER-007\].*\n.*a number in their name"):
        corresponding(program, program, "hidden")
    assert list(common_places(program, program, "hidden", ("up",))) == ["up"]


@pytest.mark.parametrize(
    ("module", "layer"),
    [
        ("model.layers.3.mlp.up_proj", "model.layers.3"),
        ("model.layers.3.mlp.experts.5", "model.layers.3"),
        ("h.0", "h.0"),
        ("0", "0"),
        ("lm_head", ""),
        ("model.layers3.mlp", ""),
        ("", ""),
    ],
)
def test_layers_are_modules_with_a_number(module: str, layer: str) -> None:
    assert layer_of(module) == layer


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


COUNTED = torch.tensor([[False, True, True, True, False], [True, True, False, False, False], [False] * 5])


def expected_error(student: Tensor, teacher: Tensor, counted: Tensor) -> Tensor:
    total = student[counted].sum() * 0.0
    for one, two, mask in zip(student, teacher, counted, strict=True):
        if mask.any():
            total = total + (one - two)[mask].square().mean() / two[mask].square().mean() * mask.sum()
    return total


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("flat", [False, True])
def test_the_error_is_relative_to_each_window(dtype: torch.dtype, flat: bool) -> None:
    student, teacher = random(3, 5, 4).to(dtype), (random(3, 5, 4, seed=1) * 7).to(dtype)
    # A window whose values are larger does not weigh more.
    teacher[1] *= 100
    # What does not count may be anything.
    student[~COUNTED] = torch.nan
    teacher[~COUNTED] = torch.inf
    wide = student.double().requires_grad_()
    wanted = expected_error(wide, teacher.double(), COUNTED)
    leaf = student.clone().requires_grad_()
    shape = (15, 4) if flat else (3, 5, 4)
    found = relative_error(leaf.view(shape), teacher.view(shape), COUNTED)
    tolerance = 1e-12 if dtype is torch.float64 else 1e-5
    torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)
    (gradient,), (reference,) = torch.autograd.grad(found, leaf), torch.autograd.grad(wanted, wide)
    assert not gradient[~COUNTED].any()
    rounding = max(tolerance, 2 * torch.finfo(dtype).eps)
    torch.testing.assert_close(gradient[COUNTED].double(), reference[COUNTED], rtol=rounding, atol=tolerance)


def test_the_error_is_the_same_however_windows_are_put_into_batches() -> None:
    student, teacher = random(3, 5, 4), random(3, 5, 4, seed=1)
    parts = [relative_error(student[row : row + 1], teacher[row : row + 1], COUNTED[row : row + 1]) for row in range(3)]
    torch.testing.assert_close(relative_error(student, teacher, COUNTED), torch.stack(parts).sum())


def test_a_copy_has_no_error_and_zeros_have_an_error_of_one_per_token() -> None:
    teacher, every = random(2, 5, 4), torch.ones(2, 5, dtype=torch.bool)
    assert float(relative_error(teacher, teacher, every)) == 0.0
    torch.testing.assert_close(float(relative_error(torch.zeros_like(teacher), teacher, every)), 10.0)
    # A teacher of zeros has no scale.
    torch.testing.assert_close(float(relative_error(torch.ones(1, 3, 4), torch.zeros(1, 3, 4), every[:1, :3])), 3.0)
