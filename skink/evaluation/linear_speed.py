"""How long the linear layers of programs take, for a stated workload: their products, without anything between them.

Each linear layer runs as it would in the model: in the graph's order, with its own weights, by the kernel that lowering
binds, so that weights come from memory as they do there. Programs take turns, as in `skink.evaluation.speed`.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from skink.errors import check_range
from skink.evaluation.speed import Spread
from skink.graph.cost import linear_weights
from skink.graph.pattern import op_name
from skink.graph.program import Program
from skink.graph.state import derive_step
from skink.passes.lower import lower

# Steps in a row that are timed as one: a step of a small model is shorter than the clock is steady.
_STEPS = 8


# What moves the results of linear layers about, where a layer is made of several: it counts as part of the layer.
_MOVES = frozenset({"cat", "index_select", "index", "gather", "slice", "split", "split_with_sizes", "getitem"})


@dataclass(frozen=True)
class _Call:
    """One node: what it calls, and with what.

    Args:
        name: of the node.
        target: the kernel that lowering bound.
        args: the node's, with stored weights in the place of their nodes; other nodes stand for results.
        kwargs: likewise.
        width: of the random input that stands for the first argument; None where that is a result.
        last: names of the results that no later call needs.
    """

    name: str
    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    width: int | None
    last: tuple[str, ...] = ()


def measure_linear(
    programs: Mapping[str, Program],
    *,
    batch: int = 1,
    prompt: int = 128,
    output: int = 64,
    rounds: int = 7,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Spread]:
    """Seconds that the linear layers of each program take: for the prompt at once, and `output` times for one token.

    Which layers, `skink.graph.cost.linear_weights` says: the output head is not among them.

    Args:
        programs: by name, canonical or rewritten, on one device.
        batch: sequences at once.
        prompt: tokens of each prompt.
        output: tokens after it, one by one; with 0 no program need be steppable.
        rounds: measurements of each; one more warms up and is not counted.
        seed: of the inputs.
        clock: seconds, as of `time.perf_counter`.
        progress: called with (rounds done, rounds and warm-up).

    Raises:
        OptionError: OPTION-002 out of range.
        StateError: with `output`, for a program that cannot be stepped.
    """
    for name, value in (("batch", batch), ("prompt", prompt), ("rounds", rounds)):
        check_range(name, value, low=1, high=1 << 30)
    check_range("output", output, low=0, high=1 << 30)
    read = {name: _calls(program, program) for name, program in programs.items()}
    step = {name: _calls(program, derive_step(program)) for name, program in programs.items()} if output else {}
    taken: dict[str, list[float]] = {name: [] for name in programs}
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for turn in range(rounds + 1):
            for name, program in programs.items():
                seconds = _time(read[name], batch, prompt, 1, program, generator, clock)
                if output:
                    seconds += output * _time(step[name], batch, 1, _STEPS, program, generator, clock)
                if turn > 0:
                    taken[name].append(seconds)
            if progress is not None:
                progress(turn + 1, rounds + 1)
    return {name: Spread.of(seconds) for name, seconds in taken.items()}


def _calls(program: Program, form: Program) -> list[_Call]:
    """The linear nodes of one form of a program, as lowering binds them, and what moves their results about."""
    counted = linear_weights(program)
    lowered, _ = lower(form, device=_device(program), dtype=program.dtype)
    calls: dict[str, _Call] = {}
    for node in lowered.graph.nodes:
        if node.op != "call_function":
            continue
        stored = {entry.target for entry in node.all_input_nodes if entry.op == "get_attr"}
        results = [entry for entry in node.all_input_nodes if entry.op != "get_attr"]
        is_linear = not counted.isdisjoint(stored) and isinstance(node.args[0], fx.Node)
        inside = bool(results) and all(entry.name in calls for entry in results)
        if is_linear or (inside and op_name(node) in _MOVES):
            args, kwargs = fx.map_arg((node.args, node.kwargs), partial(_stored, lowered))
            width = int(node.args[0].meta["val"].shape[-1]) if is_linear and not inside else None
            calls[node.name] = _Call(node.name, node.target, args, kwargs, width)
    needed: set[str] = set()
    for name, call in reversed(calls.items()):
        read = {entry.name for entry in _read(call)} & calls.keys()
        calls[name] = replace(call, last=tuple(({name} | read) - needed))
        needed |= read | {name}
    return list(calls.values())


def _read(call: _Call) -> list[fx.Node]:
    """The nodes whose results a call reads."""
    found: list[fx.Node] = []
    fx.map_arg((call.args if call.width is None else call.args[1:], dict(call.kwargs)), found.append)
    return found


def _stored(program: Program, entry: fx.Node) -> Any:
    return program.weight(str(entry.target)) if entry.op == "get_attr" else entry


def _device(program: Program) -> torch.device:
    return next((tensor.device for _, tensor in program.weights()), torch.device("cpu"))


def _time(
    calls: list[_Call],
    batch: int,
    tokens: int,
    repeats: int,
    program: Program,
    generator: torch.Generator,
    clock: Callable[[], float],
) -> float:
    """Seconds for all calls on inputs of `tokens` tokens, the mean of `repeats`."""
    device, dtype = _device(program), program.dtype
    inputs = {
        width: torch.randn(batch, tokens, width, generator=generator).to(device, dtype)
        for width in dict.fromkeys(call.width for call in calls if call.width is not None)
    }
    start = clock()
    for _ in range(repeats):
        results: dict[str, Any] = {}
        for call in calls:
            results[call.name] = _run(call, inputs, results)
            for name in call.last:
                del results[name]
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (clock() - start) / repeats


def _run(call: _Call, inputs: Mapping[int, Tensor], results: Mapping[str, Any]) -> Any:
    if call.width is not None:
        return call.target(inputs[call.width], *call.args[1:], **call.kwargs)
    args, kwargs = fx.map_arg((call.args, dict(call.kwargs)), lambda entry: results[entry.name])
    return call.target(*args, **kwargs)
