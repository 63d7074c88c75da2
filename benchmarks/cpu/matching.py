"""Pattern matching and canonicalisation on graphs of real sizes, beside PyTorch's two pattern matchers.

One graph, that of a Llama with 7 billion parameters as it was captured (shapes without weights), and three patterns on
it, written once for each matcher in its own language: rms_norm with its casts, rotary, and the gate of a feed-forward
layer. Each finds all its matches and rewrites nothing; all must find equally many. Then, for ours: the whole of
`canonicalize`, verification of its result included, on graphs of several depths.

    python benchmarks/cpu/matching.py [--layers N ...] [--rounds N] [--json]
"""

import argparse
import json
import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor.pattern_matcher import CallFunction, KeywordArg, PatternMatcherPass, register_graph_pattern
from torch.fx.passes.utils.matcher_utils import SubgraphMatcher
from transformers import LlamaConfig, LlamaForCausalLM

from skink.evaluation.machine import machine
from skink.graph.capture import capture
from skink.graph.matcher import find
from skink.graph.pattern import LAST_AXIS, Call, Rule, op_name, ops
from skink.graph.pipeline import Pipeline
from skink.graph.program import Program
from skink.passes.canonicalize import Canonicalize

aten = torch.ops.aten
_HALF, _END = 64, 2**63 - 1


def _norm(x: Tensor, weight: Tensor) -> Call:
    return ops.mul(weight, ops.mul(x, ops.rsqrt(ops.add(ops.mean(ops.pow(x, 2), LAST_AXIS, True), 1e-6))))


def _rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Call:
    turned = ops.cat([ops.neg(ops.slice(x, 3, _HALF, _END)), ops.slice(x, 3, 0, _HALF)], LAST_AXIS)
    return ops.add(ops.mul(x, cos), ops.mul(turned, sin))


def _gate(x: Tensor, gate: Tensor, up: Tensor) -> Call:
    return ops.mul(ops.silu(ops.linear(x, gate)), ops.linear(x, up))


_RULES = [
    Rule(name, pattern=pattern, rewrite=lambda rewriter, found: found.root)
    for name, pattern in (("norm", _norm), ("rotary", _rotary), ("gate", _gate))
]


def ours(program: Program) -> int:
    """Matches that Skink finds, with the index by op that its driver uses."""
    by_root: dict[str, list[Rule]] = {}
    for rule in _RULES:
        by_root.setdefault(rule.outputs[0].names[0], []).append(rule)
    return sum(find(rule, node) is not None for node in program.graph.nodes for rule in by_root.get(op_name(node), ()))


def _traced_norm(x: Any, weight: Any, like: Any) -> Any:
    wide = aten.to.dtype(x, torch.float32)
    scale = aten.rsqrt.default(aten.add.Tensor(aten.mean.dim(aten.pow.Tensor_Scalar(wide, 2), [-1], True), 1e-6))
    return aten.mul.Tensor(weight, aten.type_as.default(aten.mul.Tensor(wide, scale), like))


def _traced_rotary(x: Any, cos: Any, sin: Any) -> Any:
    first, second = aten.slice.Tensor(x, 3, 0, _HALF), aten.slice.Tensor(x, 3, _HALF, _END)
    turned = aten.cat.default([aten.neg.default(second), first], -1)
    return aten.add.Tensor(aten.mul.Tensor(x, cos), aten.mul.Tensor(turned, sin))


def _traced_gate(x: Any, gate: Any, up: Any) -> Any:
    return aten.mul.Tensor(aten.silu.default(aten.linear.default(x, gate)), aten.linear.default(x, up))


def _subgraph_matchers() -> list[SubgraphMatcher]:
    # As torch.fx.subgraph_rewriter makes them.
    return [
        SubgraphMatcher(
            fx.symbolic_trace(pattern).graph,
            match_output=False,
            match_placeholder=False,
            remove_overlapping_matches=True,
            ignore_literals=False,
        )
        for pattern in (_traced_norm, _traced_rotary, _traced_gate)
    ]


def subgraph_rewriter(program: Program, matchers: list[SubgraphMatcher]) -> int:
    """Matches that `torch.fx.subgraph_rewriter` finds."""
    return sum(len(matcher.match(program.graph)) for matcher in matchers)


def _inductor_patterns() -> list[Any]:
    def call(target: Any, *arguments: Any, users: int = 1) -> Any:
        return CallFunction(target, *arguments, _users=users)

    wide = call(aten.to.dtype, KeywordArg("x"), torch.float32, users=2)
    mean = call(aten.mean.dim, call(aten.pow.Tensor_Scalar, wide, 2), [-1], True)
    scaled = call(aten.mul.Tensor, wide, call(aten.rsqrt.default, call(aten.add.Tensor, mean, 1e-6)))
    norm = call(aten.mul.Tensor, KeywordArg("weight"), call(aten.type_as.default, scaled, KeywordArg("like")))
    x = KeywordArg("x")
    second = call(aten.neg.default, call(aten.slice.Tensor, x, 3, _HALF, _END))
    turned = call(aten.cat.default, [second, call(aten.slice.Tensor, x, 3, 0, _HALF)], -1)
    rotary = call(
        aten.add.Tensor,
        call(aten.mul.Tensor, x, KeywordArg("cos")),
        call(aten.mul.Tensor, turned, KeywordArg("sin")),
    )
    gate = call(
        aten.mul.Tensor,
        call(aten.silu.default, call(aten.linear.default, x, KeywordArg("gate"))),
        call(aten.linear.default, x, KeywordArg("up")),
    )
    return [norm, rotary, gate]


class Inductor:
    """Inductor's pattern matcher with the three patterns; each match is counted and then refused."""

    def __init__(self) -> None:
        self.found = 0
        self.passes = PatternMatcherPass()
        for pattern in _inductor_patterns():
            register_graph_pattern(pattern, extra_check=self._count, pass_dict=self.passes)(lambda match, **_: None)

    def _count(self, match: Any) -> bool:
        self.found += 1
        return False

    def __call__(self, program: Program) -> int:
        """Matches that it finds."""
        self.found = 0
        self.passes.apply(program.graph)
        return self.found


@dataclass(frozen=True)
class Matching:
    """Medians over rounds, in milliseconds, of finding all matches of three patterns."""

    nodes: int
    matches: int
    ours_ms: float
    subgraph_rewriter_ms: float
    inductor_ms: float

    @property
    def ratios(self) -> tuple[float, float]:
        """How many times quicker ours is than subgraph_rewriter's and inductor's."""
        return self.subgraph_rewriter_ms / self.ours_ms, self.inductor_ms / self.ours_ms


@dataclass(frozen=True)
class Canonicalisation:
    """Medians over rounds, in seconds; `seconds` with verification of structure, on one graph."""

    layers: int
    captured_nodes: int
    canonical_nodes: int
    capture_seconds: float
    seconds: float


def _llama(layers: int) -> LlamaForCausalLM:
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers))


def _milliseconds(call: Callable[[], int]) -> tuple[float, int]:
    begun = time.perf_counter()
    found = call()
    return (time.perf_counter() - begun) * 1e3, found


def compare_matchers(program: Program, rounds: int) -> Matching:
    """All three on one graph, in turn, round after round."""
    matchers, inductor = _subgraph_matchers(), Inductor()
    calls: list[Callable[[], int]] = [
        lambda: ours(program),
        lambda: subgraph_rewriter(program, matchers),
        lambda: inductor(program),
    ]
    times: list[list[float]] = [[], [], []]
    counts: set[int] = set()
    for _ in range(rounds):
        for place, call in enumerate(calls):
            milliseconds, found = _milliseconds(call)
            times[place].append(milliseconds)
            counts.add(found)
    if len(counts) != 1:
        raise SystemExit(f"the matchers disagree: {sorted(counts)} matches")
    return Matching(len(program.graph.nodes), counts.pop(), *(statistics.median(entry) for entry in times))


def canonicalise(layers: int, rounds: int) -> tuple[Canonicalisation, Program]:
    """Capture once, canonicalise copies."""
    begun = time.perf_counter()
    captured = capture(_llama(layers))
    capture_seconds = time.perf_counter() - begun
    times = []
    for _ in range(rounds):
        program = captured.clone()
        begun = time.perf_counter()
        Pipeline((Canonicalize(),)).run(program, verify=1)
        times.append(time.perf_counter() - begun)
    result = Canonicalisation(
        layers, len(captured.graph.nodes), len(program.graph.nodes), capture_seconds, statistics.median(times)
    )
    return result, captured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 32, 80], help="depths to canonicalise")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    logging.getLogger("torch.fx.passes").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    matching: Matching | None = None
    rows: list[Canonicalisation] = []
    for layers in arguments.layers:
        row, program = canonicalise(layers, arguments.rounds)
        rows.append(row)
        if layers == 32 or (matching is None and layers == arguments.layers[-1]):
            matching = compare_matchers(program, arguments.rounds)
    if matching is None:
        raise SystemExit("give at least one --layers")
    if arguments.json:
        result = {
            "machine": asdict(machine()),
            "rounds": arguments.rounds,
            "matching": asdict(matching) | {"ratios": matching.ratios},
            "canonicalize": [asdict(row) for row in rows],
        }
        print(json.dumps(result, indent=2))
        return
    print(f"{machine()}; medians of {arguments.rounds} interleaved rounds\n")
    print(f"{matching.nodes} nodes, 3 patterns, {matching.matches} matches, nothing rewritten:")
    print(f"  skink                       {matching.ours_ms:8.2f} ms")
    for name, milliseconds, ratio in zip(
        ("torch.fx.subgraph_rewriter", "inductor's pattern matcher"),
        (matching.subgraph_rewriter_ms, matching.inductor_ms),
        matching.ratios,
        strict=True,
    ):
        print(f"  {name}  {milliseconds:8.2f} ms   {ratio:6.1f}x skink's")
    print("\ncanonicalize, verification of structure included:")
    print("  layers   captured   canonical   capture s   canonicalize s   µs per captured node")
    for row in rows:
        each = row.seconds / row.captured_nodes * 1e6
        print(
            f"  {row.layers:6d} {row.captured_nodes:10d} {row.canonical_nodes:11d} {row.capture_seconds:11.1f}"
            f" {row.seconds:16.2f} {each:22.0f}"
        )


if __name__ == "__main__":
    main()
