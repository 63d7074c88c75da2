"""Damaged and hostile graph files.

Each is refused with GRAPH-001 or gives a program that is well formed, and no code but calls of allowed operators is
ever made from one.
"""

import ast
import copy
import json
import os
import subprocess
import sys
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

from skink.errors import GraphError
from skink.graph.capture import capture
from skink.graph.operators import find_operator, operator_name
from skink.graph.pipeline import Pipeline
from skink.graph.program import Program
from skink.graph.serialization import load_graph, program_from_json, program_to_json
from skink.graph.state import derive_step
from skink.passes.canonicalize import Canonicalize
from tests.graph.test_state_law import Decoder, decoder
from tests.modules import One, parameter
from tests.programs import batch, canonical

JUNK: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2**31,
    2**63,
    -(2**63),
    10**40,
    1.5,
    1e308,
    "",
    " ",
    "x",
    "self",
    "None",
    "lambda",
    "torch",
    "__class__",
    "__builtins__",
    "__import__",
    "forward",
    "_modules",
    "a.b",
    "a\nb",
    "x\n__import__('os').abort()",
    'a"b',
    "a'b",
    "a#b",
    "x=__import__('os').abort()",
    "x):\n    import os\n    os.abort()\ndef f(y",
    "\x1b[2J",
    "\u202e",
    "\uff58",
    "\ufb01",
    "\u00e9",
    "\x00",
    "x" * 5000,
    "0.weight",
    "embed.weight",
    "aten.relu_.default",
    "aten.from_file.default",
    "builtins.eval",
    "operator.setitem",
    "os.abort",
    "aten.add.out",
    "operator.attrgetter",
    "torch.load",
    "skink_cpp.attention.default",
    "prim.device.default",
    "bool",
    "float32",
    [],
    {},
    [[]],
    [None],
    {"node": "x"},
    {"node": "__class__"},
    {"node": ["x"]},
    {"weight": "0.weight"},
    {"weight": "__dict__"},
    {"dtype": "float32"},
    {"dtype": "__class__"},
    {"device": "cpu"},
    {"device": "nowhere"},
    {"device": -1},
    {"float": "inf"},
    {"float": "1e9"},
    {"layout": "strided"},
    {"memory_format": "channels_last"},
    {"pickle": "gASV"},
    {"node": "x", "weight": "y"},
]


def mapped(self: Any, x: torch.Tensor) -> torch.Tensor:
    part = torch.cat([x, self.scale.expand(x.shape[0], 1, -1)], 1)
    return part.masked_fill(part > 0, float("-inf")).to(torch.float64).sum(1).reshape(x.shape[0] * 2, -1)


@cache
def sources() -> dict[str, str]:
    """Real programs, as files."""
    programs = {
        "layers": capture(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4)), (torch.randn(2, 3, 4),)),
        "sizes": capture(One(mapped, scale=parameter(4)), (torch.randn(2, 3, 4),)),
        "stepped": decoder((0, 3), 0.0, True)[1],
        "decoder": canonical("gpt2"),
    }
    return {name: json.dumps(program_to_json(program)) for name, program in programs.items()}


@st.composite
def damaged(draw: st.DrawFn) -> Any:
    """A real file with some parts of it replaced, dropped, doubled, renamed, or put in another's place."""
    data = json.loads(sources()[draw(st.sampled_from(["layers", "sizes", "stepped", "decoder"]))])
    for _ in range(draw(st.integers(1, 3))):
        holder, key = draw(st.sampled_from(_places(data)))
        match draw(st.integers(0, 6)):
            case 0 if isinstance(holder, dict):
                holder[draw(st.sampled_from([entry for entry in JUNK if isinstance(entry, str)]))] = holder.pop(key)
            case 1:
                del holder[key]
            case 2 if isinstance(holder, list):
                holder.insert(key, copy.deepcopy(holder[key]))
            case 3:
                other, place = draw(st.sampled_from(_places(data)))
                holder[key] = copy.deepcopy(other[place])
            case 4 if isinstance(holder[key], str):
                text = holder[key]
                cut = draw(st.integers(0, len(text)))
                holder[key] = (
                    text[:cut] + draw(st.sampled_from(["", "\n", '"', "'", ".", "__", "(", " ", "\\"])) + text[cut:]
                )
            case 5:
                for _ in range(draw(st.sampled_from([1, 9, 200]))):
                    holder[key] = [holder[key]]
            case _:
                holder[key] = copy.deepcopy(
                    draw(st.sampled_from(JUNK) | st.integers() | st.text(max_size=8) | st.floats())
                )
    return data


def _places(data: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of nested JSON, all but the numbers of long lists alike."""
    found: list[tuple[Any, Any]] = []
    pending = [data]
    while pending:
        value = pending.pop()
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        found += [(value, key) for key in keys]
        pending += [value[key] for key in keys if isinstance(value[key], dict | list)]
    return found


def assert_refused_or_well_formed(text: str) -> Program | None:
    """The program that the text gives, or None where it is refused."""
    try:
        program = load_graph(text)
    except GraphError as error:
        refused = error
    else:
        assert_well_formed(program)
        return program
    assert refused.code == "GRAPH-001"
    return None


def assert_well_formed(program: Program) -> None:
    """It lints, its code calls allowed operators only, and it can be written and read again."""
    program.graph.lint()
    assert set(program.stored_weights()) >= {node.target for node in program.graph.find_nodes(op="get_attr")}
    for node in program.graph.nodes:
        if node.op == "call_function":
            assert find_operator(operator_name(node.target)) is node.target
    assert_calls_only_operators(program.graph)
    again = program_to_json(program)
    assert program_to_json(program_from_json(again)) == again
    assert "\n" not in "".join(str(node.meta) for node in program.graph.nodes)


def assert_calls_only_operators(graph: fx.Graph) -> None:
    """The code that runs the graph is one function, of assignments of calls to allowed operators."""
    code = graph.python_code("self")
    tree = ast.parse(code.src)
    (function,) = [entry for entry in tree.body if isinstance(entry, ast.FunctionDef)]
    assert all(isinstance(entry, ast.FunctionDef | ast.Expr | ast.Import | ast.ImportFrom) for entry in tree.body)
    inputs = {argument.arg for argument in function.args.args}
    assert not inputs & set(code.globals)
    allowed = {torch.device, torch.dtype}
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
            # A part of a weight's name that is a number.
            _, part = node.args
            assert isinstance(part, ast.Constant)
            assert not str(part.value).startswith("__")
        elif isinstance(node, ast.Call):
            target = _resolve(node.func, code.globals)
            assert target in allowed or find_operator(operator_name(target)) is target
        assert not isinstance(node, ast.Lambda | ast.Import | ast.ImportFrom | ast.Await | ast.ListComp | ast.NamedExpr)
        if isinstance(node, ast.Attribute):
            assert not node.attr.startswith("__")


def _resolve(node: ast.expr, names: dict[str, Any]) -> Any:
    if isinstance(node, ast.Name):
        return names[node.id]
    assert isinstance(node, ast.Attribute)
    return getattr(_resolve(node.value, names), node.attr)


@settings(max_examples=200)
@given(damaged())
def test_damaged_files_are_refused_or_well_formed(data: Any) -> None:
    assert_refused_or_well_formed(json.dumps(data))


@settings(max_examples=100)
@given(st.sampled_from(["layers", "sizes"]), st.data())
def test_damaged_text_is_refused_or_well_formed(source: str, data: st.DataObject) -> None:
    text = sources()[source]
    for _ in range(data.draw(st.integers(1, 3))):
        begin = data.draw(st.integers(0, len(text)))
        end = min(len(text), begin + data.draw(st.sampled_from([0, 1, 5, 100])))
        text = (
            text[:begin]
            + data.draw(st.sampled_from(["", "0", '"', "{", "]", ",", "\\u0000", "NaN", "1e999", "\n"]))
            + text[end:]
        )
    assert_refused_or_well_formed(text)


@given(
    st.sampled_from(sorted({*dir(fx.GraphModule), *dir(nn.Module()), *vars(nn.Module()), "_graph", "_code", "meta"})),
    st.booleans(),
)
@settings(max_examples=200)
def test_no_weight_takes_an_attribute_of_the_module(name: str, nested: bool) -> None:
    text = sources()["layers"].replace('"0.weight"', json.dumps(f"{name}.weight" if nested else name))
    program = assert_refused_or_well_formed(text)
    if program is None:
        return
    assert isinstance(program.graph_module.code, str)
    assert callable(program.graph_module.forward)
    assert program.weight(f"{name}.weight" if nested else name).shape == (6, 4)


@pytest.mark.parametrize("text", ['{"format": 1, "format": 1}', '{"a": {"b": 1, "b": 2}}'])
def test_a_key_that_is_there_twice_is_refused(text: str) -> None:
    with pytest.raises(GraphError, match=r"\[GRAPH-001\]") as caught:
        load_graph(text)
    assert "twice" in caught.value.why


# Bodies that keep the shape [B, T, 8], for random graphs.
STEPS: list[Any] = [
    lambda m, x: torch.relu(x) * m.scale,
    lambda m, x: x @ m.square,
    lambda m, x: nn.functional.linear(x, m.square, m.scale),
    lambda m, x: nn.functional.layer_norm(x, (8,), m.scale, None, 1e-6),
    lambda m, x: torch.cat([x[..., 4:], x[..., :4]], -1),
    lambda m, x: x.masked_fill(x > 1, float("-inf")).clamp(min=-3.0),
    lambda m, x: x.view(x.shape[0], -1, 2, 4).transpose(1, 2).softmax(-1).transpose(1, 2).reshape(x.shape),
    lambda m, x: x.to(torch.float64).cumsum(1).to(torch.float32),
    lambda m, x: x + torch.arange(x.shape[1])[:, None] / (x.shape[0] + 1),
    lambda m, x: sum(x.chunk(2, -1)).repeat(1, 1, 2),
    lambda m, x: torch.ops.skink.rms_norm(x, m.scale, 1e-6, 1.0),
    lambda m, x: x.topk(8, -1).values + torch.zeros_like(x, dtype=torch.float32),
]


@settings(max_examples=15)
@given(st.lists(st.sampled_from(STEPS), min_size=1, max_size=5))
def test_random_graphs_come_back_whole(steps: list[Any]) -> None:
    def body(self: Any, x: torch.Tensor) -> torch.Tensor:
        for step in steps:
            x = step(self, x)
        return x

    program = capture(One(body, scale=parameter(8), square=parameter(8, 8)), (torch.randn(2, 3, 8),))
    text = json.dumps(program_to_json(program))
    loaded = load_graph(text, dict(program.weights()))
    assert str(loaded) == str(program)
    assert json.dumps(program_to_json(loaded)) == text
    x = torch.randn(3, 5, 8)
    assert torch.equal(loaded(x)[0], program(x)[0])
    assert_well_formed(loaded)


def written() -> str:
    """A program and its step form, captured anew, as they are written."""
    program = capture(Decoder((0, 3), 1.0, True), batch(2, 3))
    Pipeline((Canonicalize(),)).run(program, verify=0)
    return json.dumps([program_to_json(program), program_to_json(derive_step(program))])


def test_every_process_writes_the_same_bytes() -> None:
    # With other hashes of names than this process has.
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    script = "from tests.graph.test_serialization_fuzz import written\nprint(written())"
    environment = {"PYTHONHASHSEED": seed, "PATH": "", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == written()
