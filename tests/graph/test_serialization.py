"""Programs as JSON: the same back, and nothing that a file says is run."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from skink.errors import GraphError
from skink.graph.capture import capture
from skink.graph.serialization import FORMAT, load_graph, program_from_json, program_to_json
from skink.graph.state import derive_step
from skink.passes.lower import lower
from tests.graph.test_state_law import decoder
from tests.modules import One
from tests.programs import batch, canonical

X = torch.randn(2, 3, 4)


def valid() -> dict[str, Any]:
    module = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))
    data: dict[str, Any] = json.loads(json.dumps(program_to_json(capture(module, (X,)))))
    return data


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_round_trip(name: str) -> None:
    for program in (canonical(name), derive_step(canonical(name))):
        text = json.dumps(program_to_json(program))
        loaded = load_graph(text, dict(program.weights()))
        assert str(loaded) == str(program)
        assert json.dumps(program_to_json(loaded)) == text
        for field in ("inputs", "outputs", "buffers", "aliases", "any_dtype", "stage", "state", "origin"):
            assert getattr(loaded, field) == getattr(program, field)
    inputs = batch(2, 7, padding=2)
    program = canonical(name)
    loaded = load_graph(json.dumps(program_to_json(program)), dict(program.weights()))
    assert torch.equal(loaded(*inputs)[0], program(*inputs)[0])


def test_arguments_of_every_kind() -> None:
    def body(self: Any, x: torch.Tensor) -> torch.Tensor:
        y = torch.full_like(x, float("-inf"), dtype=torch.float64, device="cpu")
        y = torch.where(x > 0, x.to(torch.float64), y)
        z = torch.zeros(x.shape[0], 2, dtype=torch.int32).contiguous(memory_format=torch.contiguous_format)
        return torch.cat([y.clamp(min=None, max=1e300).flatten(1), z], 1)

    program = capture(One(body), (X,))
    loaded = load_graph(json.dumps(program_to_json(program)))
    assert str(loaded) == str(program)
    assert torch.equal(loaded(X)[0], program(X)[0])


def test_weights_that_are_not_given_are_meta() -> None:
    loaded = program_from_json(valid())
    assert loaded.is_meta
    assert {name: tuple(weight.shape) for name, weight in loaded.weights()}["0.weight"] == (6, 4)


def test_weights_of_another_dtype_are_taken_and_of_another_shape_refused() -> None:
    weights = {"0.weight": torch.zeros(6, 4, dtype=torch.float64)}
    assert program_from_json(valid(), weights).weight("0.weight").dtype is torch.float64
    with pytest.raises(GraphError, match=r"GRAPH-001.*'0.weight' has shape \[6, 5\].*written for \[6, 4\]"):
        program_from_json(valid(), {"0.weight": torch.zeros(6, 5)})


def test_what_has_no_name_cannot_be_written() -> None:
    program, _ = lower(canonical("llama"))
    with pytest.raises(GraphError, match=r"\[GRAPH-001\] the operator .* is not allowed"):
        program_to_json(program)


def call(data: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = next(entry for entry in data["nodes"] if entry["op"] == "call_function")
    return found


def with_call(**parts: Any) -> Callable[[dict[str, Any]], None]:
    return lambda data: call(data).update(parts)


def rename(old: str, new: str) -> Callable[[dict[str, Any]], None]:
    """The weight `old` by another name, wherever it is named."""

    def change(data: dict[str, Any]) -> None:
        text = json.dumps(data).replace(json.dumps(old), json.dumps(new))
        data.clear()
        data.update(json.loads(text))

    return change


INJECTION = 'x"), __import__("pathlib").Path("{}").touch() or ("'

HOSTILE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "format": lambda data: data.update(format=FORMAT + 1),
    "no format": lambda data: data.pop("format"),
    "no nodes": lambda data: data.pop("nodes"),
    "no weights": lambda data: data.pop("weights"),
    "stage": lambda data: data.update(stage="perfect"),
    "unknown operator": with_call(target="aten.no_such.default"),
    "unknown namespace": with_call(target="os.system"),
    "python function": with_call(target="builtins.eval"),
    "operator of torch": with_call(target="torch.load"),
    "unlisted operator": with_call(target="operator.setitem"),
    "writes": with_call(target="aten.relu_.default"),
    "writes out": with_call(target="aten.add.out"),
    "reads a file": with_call(target="aten.from_file.default"),
    "unchecked view": with_call(target="aten._reshape_alias.default"),
    "unknown skink": with_call(target="skink.atention.default"),
    "dunder": with_call(target="aten.__class__.default"),
    "target is a list": with_call(target=["aten.relu.default"]),
    "node kind": with_call(op="call_module"),
    "node name": with_call(name="a b"),
    "keyword as code": with_call(kwargs={"alpha=print(1), beta": 1}),
    "unknown keyword": with_call(kwargs={"alpha": 1}),
    "forward reference": with_call(args=[{"node": "linear_1"}]),
    "own reference": lambda data: call(data).update(args=[{"node": call(data)["name"]}]),
    "unknown node": with_call(args=[{"node": "nothing"}]),
    "unknown weight": with_call(args=[{"weight": "9.weight"}]),
    "unknown argument": with_call(args=[{"pickle": "gASV"}]),
    "two in one": with_call(args=[{"node": "x", "weight": "0.weight"}]),
    "dtype": with_call(args=[{"dtype": "float99"}]),
    "two nodes of a name": lambda data: data["nodes"].insert(1, dict(data["nodes"][0])),
    "input is a word of python": lambda data: data["nodes"][0].update(target="lambda"),
    "input is self": lambda data: data["nodes"][0].update(target="self"),
    "input as code": lambda data: data["nodes"][0].update(target="x=print(1)"),
    "more inputs": lambda data: data["inputs"].append(data["inputs"][0]),
    "dims": lambda data: data["inputs"][0].update(dims=[-1, "T", 4]),
    "dim as code": lambda data: data["inputs"][0].update(dims=["B", "__import__('os')", 4]),
    "more outputs": lambda data: data["outputs"].append("output_1"),
    "no output": lambda data: data["nodes"].pop(),
    "after the output": lambda data: data["nodes"].append({"name": "y", "op": "placeholder", "target": "y"}),
    "result is a number": lambda data: data["nodes"][-1].update(args=[[1]]),
    "weight name": rename("0.weight", "0..weight"),
    "weight dunder": rename("0.weight", "__class__.weight"),
    "weight as code": rename("0.weight", INJECTION),
    "weight of torch": rename("0.weight", "forward"),
    "weight and module": rename("0.weight", "0"),
    "negative shape": lambda data: data["weights"]["0.weight"].update(shape=[-6, 4]),
    "endless shape": lambda data: data["weights"]["0.weight"].update(shape=[2**70, 4]),
    "alias as code": lambda data: data["aliases"].update({INJECTION: "0.weight"}),
    "alias of nothing": lambda data: data["aliases"].update({"9.weight": "8.weight"}),
    "buffers": lambda data: data.update(buffers=[["0.weight"]]),
    "state": lambda data: data.update(state=[{"name": "x"}]),
    "nodes of numbers": lambda data: data.update(nodes=[1, 2]),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_files_are_refused(change: Callable[[dict[str, Any]], Any]) -> None:
    data = valid()
    program_from_json(data)
    change(data)
    with pytest.raises(GraphError, match=r"^\[GRAPH-001\] "):
        program_from_json(data)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "null", "[" * 100_000, "{" + '"a":{' * 50_000, '{"format": 1' + "0" * 9999]
)
def test_text_that_is_no_graph_is_refused(text: str) -> None:
    with pytest.raises(GraphError, match=r"^\[GRAPH-001\] "):
        load_graph(text)


def mutate(value: Any, rng: random.Random) -> Any:
    """`value` with one part of it, at any depth, replaced, dropped or doubled."""
    junk = rng.choice([None, 0, -1, 2**63, 1.5, "", "x", 'a"b', "0.weight", [], [[]], {}, {"node": "x"}, True, "self"])
    if isinstance(value, dict) and value and rng.random() < 0.95:
        key = rng.choice(list(value))
        if rng.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if rng.random() < 0.1:
            return {(str(junk) if k == key else k): v for k, v in value.items()}
        return {k: mutate(v, rng) if k == key else v for k, v in value.items()}
    if isinstance(value, list) and value and rng.random() < 0.95:
        index = rng.randrange(len(value))
        if rng.random() < 0.2:
            return value[:index] + value[index + 1 :] + value[index : index + 1] * rng.choice([0, 1, 2])
        return [*value[:index], mutate(value[index], rng), *value[index + 1 :]]
    return junk


@pytest.mark.parametrize(("source", "count"), [("layers", 300), ("stepped", 40)])
def test_damaged_files_load_or_are_refused(source: str, count: int) -> None:
    data = valid() if source == "layers" else json.loads(json.dumps(program_to_json(decoder((0, 3), 0.0, True)[1])))
    refused = 0
    for seed in range(count):
        rng = random.Random(seed)
        damaged = data
        for _ in range(rng.choice([1, 1, 3])):
            damaged = mutate(damaged, rng)
        try:
            load_graph(json.dumps(damaged))
        except GraphError:
            refused += 1
    assert count // 4 < refused < count


def test_nothing_in_a_name_is_run(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    for field in ("weights", "aliases", "kwargs", "nodes"):
        data = valid()
        code = INJECTION.format(mark)
        if field == "weights":
            rename("0.weight", code)(data)
        elif field == "aliases":
            data["aliases"] = {code + ".weight": "0.weight"}
        elif field == "kwargs":
            call(data)["kwargs"] = {f"x=__import__('pathlib').Path('{mark}').touch(), y": 1}
        else:
            call(data)["name"] = code
        with pytest.raises(GraphError):
            program_from_json(data).module()(X)
    assert not mark.exists()
