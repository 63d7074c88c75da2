"""The ways to a program: each gives the same one."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from skink.errors import CaptureError
from skink.graph.capture import capture
from skink.graph.frontends import program_from_dynamo
from skink.graph.pipeline import Pipeline
from skink.graph.program import Program
from skink.passes.canonicalize import Canonicalize
from tests.modules import One, Two, parameter


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.register_buffer("scale", torch.tensor([0.5] * 8))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.up(self.norm(x)))
        return x + self.down(hidden) * self.scale


class Stack(nn.Module):
    """Two layers, a tied head, and sizes read in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)
        self.layers = nn.ModuleList([Block(), Block()])
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor, scale: Tensor) -> Tensor:
        hidden = self.embed(tokens) * scale
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(hidden.reshape(tokens.shape[0] * tokens.shape[1], 8))


EXAMPLES = (torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3, 1))
CANONICAL = """\
program canonical(%tokens: i64[B,T], %scale: f32[B,T,1])
  %embedding : f32[B,T,8] = aten.embedding(@embed.weight, %tokens)
  %mul : f32[B,T,8] = aten.mul.Tensor(%embedding, %scale)
  %layer_norm : f32[B,T,8] = aten.layer_norm(%mul, [8], @layers.0.norm.weight, @layers.0.norm.bias, 1e-05, False)
  %linear : f32[B,T,16] = aten.linear(%layer_norm, @layers.0.up.weight, @layers.0.up.bias)
  %relu : f32[B,T,16] = aten.relu(%linear)
  %linear_1 : f32[B,T,8] = aten.linear(%relu, @layers.0.down.weight, @layers.0.down.bias)
  %mul_1 : f32[B,T,8] = aten.mul.Tensor(%linear_1, @layers.0.scale)
  %add : f32[B,T,8] = aten.add.Tensor(%mul, %mul_1)
  %layer_norm_1 : f32[B,T,8] = aten.layer_norm(%add, [8], @layers.1.norm.weight, @layers.1.norm.bias, 1e-05, False)
  %linear_2 : f32[B,T,16] = aten.linear(%layer_norm_1, @layers.1.up.weight, @layers.1.up.bias)
  %relu_1 : f32[B,T,16] = aten.relu(%linear_2)
  %linear_3 : f32[B,T,8] = aten.linear(%relu_1, @layers.1.down.weight, @layers.1.down.bias)
  %mul_2 : f32[B,T,8] = aten.mul.Tensor(%linear_3, @layers.1.scale)
  %add_1 : f32[B,T,8] = aten.add.Tensor(%add, %mul_2)
  %reshape : f32[B*T,8] = aten.reshape(%add_1, [%SIZE, 8])
  %linear_4 : f32[B*T,11] = aten.linear(%reshape, @embed.weight)
  return output_0=%linear_4"""


def exported(model: nn.Module, examples: tuple[Tensor, ...], *axes: dict[int, str], **options: Any) -> ExportedProgram:
    dims = {name: Dim(name, min=1, max=4096) for entry in axes for name in entry.values()}
    shapes = tuple({axis: dims[name] for axis, name in entry.items()} for entry in axes)
    return torch.export.export(model, examples, dynamic_shapes=shapes, **options)


def compiled(model: Callable[..., Any], examples: Sequence[Any], **options: Any) -> Program:
    """What a backend of `torch.compile` makes of its graph, while it compiles."""
    programs: list[Program] = []

    def backend(graph_module: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        programs.append(program_from_dynamo(graph_module, example_inputs, **options))
        return graph_module.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend, dynamic=True)(*examples)
    torch._dynamo.reset()
    (program,) = programs
    return program


FRONT_ENDS: dict[str, Callable[[nn.Module], Program]] = {
    "module": lambda model: capture(model, EXAMPLES),
    "strict": lambda model: capture(model, EXAMPLES, strict=True),
    "traced": lambda model: capture(fx.symbolic_trace(model), EXAMPLES),
    "exported": lambda model: capture(exported(model, EXAMPLES, {0: "B", 1: "T"}, {0: "B", 1: "T"})),
    "exported strict": lambda model: capture(
        exported(model, EXAMPLES, {0: "B", 1: "T"}, {0: "B", 1: "T"}, strict=True)
    ),
    "dynamo": lambda model: compiled(model, EXAMPLES),
}


def text(program: Program) -> str:
    """The canonical form; names of sizes are the exporter's."""
    Pipeline((Canonicalize(),)).run(program, verify=1)
    lines = [line for line in str(program).splitlines() if " : size " not in line]
    return re.sub(r"%mul_\d+, 8\]", "%SIZE, 8]", "\n".join(lines))


@pytest.mark.parametrize("name", FRONT_ENDS)
def test_every_front_end_gives_the_same_program(name: str) -> None:
    torch.manual_seed(0)
    model = Stack().eval()
    program = FRONT_ENDS[name](model)
    for size, length in ((1, 1), (4, 9)):
        inputs = (torch.randint(0, 11, (size, length)), torch.randn(size, length, 1))
        with torch.no_grad():
            torch.testing.assert_close(program(*inputs)[0], model(*inputs))
    found = {node.name: node.meta for node in program.graph.nodes if node.op == "call_function"}
    assert found["linear_1"]["module"] == "layers.0.down"
    assert found["relu_1"]["module"] == "layers.1"
    if name != "traced":  # symbolic_trace keeps no lines
        assert found["linear_1"]["source"].startswith("graph/test_frontends.py:")
    weights = dict(program.weights())
    assert all(
        tensor.data_ptr() == model.get_parameter(key).data_ptr()
        for key, tensor in weights.items()
        if "scale" not in key
    )
    assert program.buffers == {"layers.0.scale", "layers.1.scale"}
    assert program.aliases == ({} if name == "dynamo" else {"head.weight": "embed.weight"})
    assert text(program) == CANONICAL


def test_a_function_may_be_compiled_too() -> None:
    one, other = Block(), Block()

    def both(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return one(x) + y, other(x)

    program = compiled(both, (torch.randn(2, 3, 8), torch.randn(2, 3, 8)), dims={"x": {0: "N"}})
    assert [(entry.name, entry.dims) for entry in program.inputs] == [("x", ("N", "T", 8)), ("y", ("N", "T", 8))]
    names = [name for name, _ in program.weights()]
    assert "one.up.weight" in names
    assert "other.up.weight" in names
    x, y = torch.randn(4, 5, 8), torch.randn(4, 5, 8)
    with torch.no_grad():
        for found, wanted in zip(program(x, y), both(x, y), strict=True):
            torch.testing.assert_close(found, wanted)


def test_inputs_by_keyword_have_their_own_names() -> None:
    def many(*args: Tensor, **kwargs: Tensor) -> Tensor:
        return args[0] + kwargs["bias"]

    got: list[Any] = []
    torch._dynamo.reset()
    compiled_many = torch.compile(many, backend=lambda *call: got.append(call) or call[0].forward, dynamic=True)
    compiled_many(torch.ones(2, 3), bias=torch.ones(2, 3))
    assert {entry.name for entry in program_from_dynamo(*got[0]).inputs} == {"args_0", "bias"}


def test_a_static_graph_from_dynamo_keeps_its_sizes() -> None:
    got: list[Any] = []
    torch._dynamo.reset()
    torch.compile(lambda x: x * 2, backend=lambda *call: got.append(call) or call[0].forward, dynamic=False)(
        torch.ones(2, 3)
    )
    program = program_from_dynamo(*got[0])
    assert program.inputs[0].dims == (2, 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: compiled(lambda x, n: x * n, (torch.ones(2, 3), 5)), "is an input of its own"),
        (lambda: compiled(lambda x, n: x * n, (torch.ones(2, 3), 0.5)), "input 'n' is of type float"),
        (
            lambda: program_from_dynamo(fx.symbolic_trace(One(lambda self, x: x)), []),
            "0 example inputs for a graph of 1",
        ),
        (lambda: capture(_two({0: "B"}), dims={"z": {0: "B"}}), "dims are named for z, which is no input"),
        (lambda: capture(_two({0: "B"}), dims={"x": {1: "T"}}), "axis 1 of 'x' is 3 in this graph"),
        (lambda: capture(_two({0: "B"}), dims={"x": {0: "B"}, "y": {0: "N"}}), "has two names, N and B"),
        (lambda: capture(fx.symbolic_trace(Two(lambda self, x, y: x + y)), [torch.ones(2)] * 3), "3 example inputs"),
    ],
)
def test_what_does_not_fit_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises((CaptureError, torch._dynamo.exc.BackendCompilerFailed)) as caught:
        make()
    assert f"[CAPTURE-005] {message}" in str(caught.value) or message in str(caught.value)
    assert "CAPTURE-005" in str(caught.value)


def _two(axes: dict[int, str]) -> ExportedProgram:
    return exported(Two(lambda self, x, y: x + y), (torch.ones(2, 3), torch.zeros(2, 3)), axes, axes)


def test_an_exported_program_that_writes_in_place() -> None:
    def body(self: Any, x: Tensor) -> Tensor:
        total = x.clone()
        total.mul_(self.scale)
        return total.relu_()

    model = One(body, scale=parameter(3))
    program = capture(exported(model, (torch.ones(2, 3),), {0: "B"}), dims={"x": {0: "N"}})
    x = torch.randn(5, 3)
    assert program.inputs[0].dims == ("N", 3)
    with torch.no_grad():
        torch.testing.assert_close(program(x)[0], model(x))


@pytest.mark.parametrize(
    "draw", [torch.rand_like, nn.functional.dropout, lambda x: torch.bernoulli(x.abs().clamp(0, 1))]
)
def test_random_numbers_are_refused_with_their_line(draw: Callable[[Tensor], Tensor]) -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + draw(x)

    with pytest.raises(CaptureError, match=r"\[CAPTURE-006\] the model draws random numbers \(aten\.") as caught:
        capture(Noisy(), (torch.ones(2, 3),))
    assert "test_frontends.py:" in caught.value.where


def test_a_dropout_that_lets_everything_through_is_none() -> None:
    def body(self: Any, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.5, training=False) + nn.functional.dropout(x, 0.0, training=True)

    x = torch.randn(4, 3)
    torch.testing.assert_close(capture(One(body), (torch.ones(2, 3),))(x)[0], 2 * x)
