"""What stands in a program, layer by layer, as plain data: the content of `skink inspect`."""

import dataclasses
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from skink.cli.leftovers import Leftover, leftovers
from skink.errors import StateError
from skink.graph.blocks import FeedForward, feed_forward_blocks
from skink.graph.cost import ProgramCost, program_cost
from skink.graph.passes import linear_weight
from skink.graph.pattern import through_casts
from skink.graph.pipeline import Pipeline
from skink.graph.program import Program, StateInput
from skink.graph.state import derive_step
from skink.graph.text import target_name
from skink.kernels import ATTENTION, RMS_NORM, ROTARY, find_op
from skink.passes.canonicalize import Canonicalize

aten = torch.ops.aten
_NORMS = (aten.layer_norm.default, aten.native_layer_norm.default, aten.group_norm.default)
# A repeated layer: everything up to the first number in a qualified name.
_LAYER = re.compile(r"^(?:[^.]+\.)*?\d+(?=\.|$)")
# Moves and relabels numbers; of no interest beside what computes.
_PLUMBING = frozenset(
    {
        *("reshape", "view", "transpose", "permute", "unsqueeze", "squeeze", "expand", "clone", "contiguous", "to"),
        *("slice", "select", "cat", "split", "chunk", "unbind", "getitem", "alias", "type_as", "_to_copy", "sym_size"),
        *("arange", "full", "zeros", "ones", "add", "mul", "sub", "embedding"),
    }
)


@dataclass(frozen=True)
class Attention:
    """One attention: query heads, key/value heads, width of a head; window 0 is none, softcap 0 is none."""

    heads: int
    kv_heads: int
    head_size: int
    causal: bool
    window: int
    softcap: float
    sinks: bool
    alibi: bool = False


@dataclass(frozen=True)
class Norm:
    """One normalisation over the last axis."""

    name: str
    kind: str
    size: int
    eps: float
    offset: float = 0.0


@dataclass(frozen=True)
class Rotary:
    """Rotary positions on `count` tensors: the first `rotated` of `head_size` dims turn."""

    count: int
    rotated: int
    head_size: int
    interleaved: bool


@dataclass(frozen=True)
class Block:
    """One feed-forward block: `plain`, `gated` or `experts`, its activation and its inner width.

    With experts, how many there are, how many each token uses, the weight that scores them, and the blocks beside them.
    """

    name: str
    kind: str
    activation: str
    width: int
    gated: bool
    experts: int = 0
    chosen: int = 0
    router: str = ""
    shared: tuple["Block", ...] = ()


@dataclass(frozen=True)
class Linear:
    """One linear layer, weight [out, in]; `parameters` with its bias. A weight counts where it is read first: another
    reader has none of its own and is tied to it.
    """

    name: str
    shape: tuple[int, int]
    bias: bool
    parameters: int
    tied_to: str = ""


@dataclass(frozen=True)
class OtherWeight:
    """A weight that neither a linear layer nor a norm reads: an embedding, stacked experts."""

    name: str
    shape: tuple[int, ...]
    parameters: int
    used_by: str


@dataclass
class Layer:
    """A repeated layer, or what stands outside of them (`name` is empty).

    `operators` counts what else computes; `parameters` are all weights that are read here first.
    """

    name: str
    attention: list[Attention] = field(default_factory=list)
    norms: list[Norm] = field(default_factory=list)
    rotary: list[Rotary] = field(default_factory=list)
    feed_forward: list[Block] = field(default_factory=list)
    linear: list[Linear] = field(default_factory=list)
    others: list[OtherWeight] = field(default_factory=list)
    state: list[StateInput] = field(default_factory=list)
    operators: Counter[str] = field(default_factory=Counter)
    parameters: int = 0


@dataclass(frozen=True)
class Inspection:
    """A program by layer, and what was not raised; `no_state` says why it cannot be stepped, where it cannot."""

    program: Program
    layers: list[Layer]
    refused: list[Leftover]
    no_state: str
    cost: ProgramCost


def inspect_program(program: Program, *, context: int) -> Inspection:
    """Canonicalise a program, on a copy, and describe what came of it."""
    canonical = program.clone()
    result = Pipeline((Canonicalize(),), start=canonical.stage).run(canonical, verify=1)
    blocks = feed_forward_blocks(canonical)
    refused = leftovers(canonical, blocks, [entry for record in result.passes for entry in record.result.refused])
    layers = _layers(canonical, blocks)
    no_state = _add_state(canonical, layers)
    return Inspection(canonical, list(layers.values()), refused, no_state, program_cost(canonical, context=context))


def _layers(program: Program, blocks: Sequence[FeedForward]) -> dict[str, Layer]:
    layers: dict[str, Layer] = {"": Layer("")}
    counted: set[str] = set()
    inside = {node for block in blocks for part in (block, *block.shared) for node in part.nodes}
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        # What type_as casts like is read for its dtype alone.
        reads = node.all_input_nodes[:1] if node.target is aten.type_as.default else node.all_input_nodes
        weights = [str(entry.target) for entry in reads if entry.op == "get_attr"]
        layer_name = _layer_name(weights, node)
        layer = layers.setdefault(layer_name, Layer(layer_name))
        if node not in inside:
            _describe_node(program, node, layer)
        own = linear_weight(program, node)
        if own is not None:
            layer.linear.append(_linear(program, node, own, tied=own in counted))
        elif node.target is not RMS_NORM.overload and node.target not in _NORMS:
            layer.others.extend(
                OtherWeight(weight, tuple(tensor.shape), tensor.numel(), target_name(node.target))
                for weight in weights
                if weight not in counted and weight not in program.buffers
                for tensor in [program.weight(weight)]
            )
        fresh = {weight for weight in weights if weight not in program.buffers} - counted
        layer.parameters += sum(program.weight(weight).numel() for weight in fresh)
        counted |= fresh
    for block in blocks:
        layers[_layer_name([block.down.weight], block.output)].feed_forward.append(_block(block))
    outside = layers.pop("")
    return {**layers, "": outside}


def _layer_name(weights: Sequence[str], node: fx.Node) -> str:
    # A constant is named after the module that made it, and others may read it.
    own = (weight for weight in weights if not weight.startswith("constants."))
    for name in (*own, str(node.meta.get("module") or "")):
        found = _LAYER.match(name)
        if found:
            return found.group()
    return ""


def _describe_node(program: Program, node: fx.Node, layer: Layer) -> None:
    if node.target is ATTENTION.overload:
        arguments = ATTENTION.bind(node.args, node.kwargs)
        query, key = arguments["query"].meta["val"].shape, arguments["key"].meta["val"].shape
        layer.attention.append(
            Attention(
                heads=int(query[1]),
                kv_heads=int(key[1]),
                head_size=int(query[3]),
                causal=bool(arguments["causal"]),
                window=int(arguments["window"]),
                softcap=float(arguments["softcap"]),
                sinks=arguments["sinks"] is not None,
                alibi=arguments["alibi"] is not None,
            )
        )
    elif node.target is RMS_NORM.overload:
        arguments = RMS_NORM.bind(node.args, node.kwargs)
        size = int(node.meta["val"].shape[-1])
        layer.norms.append(Norm(_owner(node), "rms_norm", size, float(arguments["eps"]), float(arguments["offset"])))
    elif node.target in _NORMS:
        eps = next((entry for entry in reversed(node.args) if isinstance(entry, float)), 1e-5)
        layer.norms.append(Norm(_owner(node), target_name(node.target), int(node.meta["val"].shape[-1]), eps))
    elif node.target is ROTARY.overload:
        _add_rotary(node, layer)
    elif linear_weight(program, node) is None:
        name = target_name(node.target)
        short = name.split(".")[1] if name.startswith(("aten.", "operator.")) else name
        if short not in _PLUMBING:
            layer.operators[short] += 1


def _block(block: FeedForward) -> Block:
    scores = block.router.args[1] if block.router is not None else None
    router = through_casts(scores)
    return Block(
        name=block.module,
        kind=block.kind,
        activation=block.activation,
        width=block.width,
        gated=block.gate is not None,
        experts=block.experts,
        chosen=block.chosen,
        router=str(router.target).removesuffix(".weight") if isinstance(router, fx.Node) else "",
        shared=tuple(map(_block, block.shared)),
    )


def _add_rotary(node: fx.Node, layer: Layer) -> None:
    arguments = ROTARY.bind(node.args, node.kwargs)
    rotated = int(arguments["cos"].meta["val"].shape[-1])
    head_size, interleaved = int(node.meta["val"].shape[-1]), bool(arguments["interleaved"])
    for index, known in enumerate(layer.rotary):
        if (known.rotated, known.head_size, known.interleaved) == (rotated, head_size, interleaved):
            layer.rotary[index] = Rotary(known.count + 1, rotated, head_size, interleaved)
            return
    layer.rotary.append(Rotary(1, rotated, head_size, interleaved))


def _owner(node: fx.Node) -> str:
    """The module that a node belongs to, by its weight's name or by where it was called."""
    weight = next((str(entry.target) for entry in node.all_input_nodes if entry.op == "get_attr"), "")
    return weight.rpartition(".")[0] or str(node.meta.get("module") or node.name)


def _linear(program: Program, node: fx.Node, weight: str, *, tied: bool) -> Linear:
    rows, columns = program.weight(weight).shape
    bias = node.args[2] if len(node.args) > 2 else None
    parameters = 0 if tied else rows * columns
    if isinstance(bias, fx.Node) and bias.op == "get_attr":
        parameters += program.weight(str(bias.target)).numel()
    name = weight.removesuffix(".weight")
    if tied:
        alias = next((alias for alias, target in program.aliases.items() if target == weight), "")
        called = alias.removesuffix(".weight") or str(node.meta.get("module") or node.name)
        return Linear(called, (rows, columns), bias is not None, parameters, tied_to=name)
    return Linear(name, (rows, columns), bias is not None, parameters)


def _add_state(program: Program, layers: dict[str, Layer]) -> str:
    """Put each state tensor to the layer whose op owns it; why there is none, where the step graph cannot be had."""
    owners = [node for node in program.graph.nodes if (op := find_op(node.target)) is not None and op.state is not None]
    try:
        state = derive_step(program).state
    except StateError as error:
        return str(error)
    for entry in state:
        layers[_layer_name([], owners[entry.layer])].state.append(entry)
    return ""


def as_json(inspection: Inspection) -> dict[str, Any]:
    """An inspection as plain values."""
    program, cost = inspection.program, inspection.cost
    return {
        "model_type": program.origin.get("model_type", ""),
        "stage": str(program.stage),
        "dtype": str(program.dtype).removeprefix("torch."),
        "meta": program.is_meta,
        "inputs": [{"name": entry.name, "dims": list(entry.dims)} for entry in program.inputs],
        "totals": dataclasses.asdict(cost),
        "tied": dict(program.aliases),
        "layers": [
            {
                "name": layer.name,
                "parameters": layer.parameters,
                **{
                    key: [dataclasses.asdict(entry) for entry in getattr(layer, key)]
                    for key in ("attention", "norms", "rotary", "feed_forward", "linear", "others", "state")
                },
                "operators": dict(layer.operators),
            }
            for layer in inspection.layers
        ],
        "refused": [dataclasses.asdict(entry) for entry in inspection.refused],
        "no_state": inspection.no_state,
    }
