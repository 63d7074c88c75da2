"""Run a program over many batches, region by region: all batches through the first, then all through the next.

So each weight is read once however many batches there are, and between regions only what later ones read is kept: in a
decoder, the residual stream of every batch. A region is a run of consecutive nodes, cut where the fewest values live.
What is computed from inputs alone (masks, rotary tables) is computed anew in each region that reads it.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx

from skink.errors import GraphError
from skink.graph.passes import Progress
from skink.graph.program import Program
from skink.kernels import OpCall, find_op
from skink.kernels.pivoted_linear.columns import index_select

Visit = Callable[[fx.Node, Any], None]
"""Called with a wanted node and its value, once per batch, while that batch runs."""

Plan = Sequence[tuple[fx.Node, Sequence[fx.Node]]]
"""Nodes to run, in order, each with the values that nothing reads after it."""

# A piece of the graph with more linear layers than this is cut further; one decoder layer has four to seven.
_MOST_LINEARS = 8

aten = torch.ops.aten


@dataclass(frozen=True)
class Region:
    """A run of consecutive nodes.

    Args:
        index: its place among the regions.
        nodes: the calls that lay in it when the run began.
        wanted: those of them whose values are visited, and wanted inputs that none before it showed.
        carried: values made here or before that a later region reads.
    """

    index: int
    nodes: frozenset[fx.Node]
    wanted: tuple[fx.Node, ...]
    carried: tuple[fx.Node, ...]


def run_regions(
    program: Program,
    batches: Sequence[Mapping[str, Tensor]],
    visit: Visit,
    *,
    wanted: Collection[fx.Node],
    follow_edits: bool = False,
    progress: Progress | None = None,
) -> Iterator[Region]:
    """Run every batch through one region after the other, and yield each region when all batches have passed it.

    While a region is in the caller's hands, the caller may edit it and those before it (through `Rewriter`, whose
    replacements are noticed); later regions must stay as they are.

    Args:
        program: not stepped; only what the wanted nodes depend on is run.
        batches: tensors by input name, on the device of the weights.
        visit: called with each wanted node and its value.
        wanted: nodes to visit; they may be inputs.
        follow_edits: run a region again after it was yielded, so that later regions see what the edits made of it.
            Otherwise all see what the program computed before.
        progress: called after each batch in each region.

    Raises:
        GraphError: GRAPH-002 where weights are on the meta device.
    """
    regions = split_regions(program, wanted)
    inputs = inputs_of(program, batches)
    live: list[dict[fx.Node, Any]] = [{} for _ in batches]
    renamed: dict[fx.Node, fx.Node] = {}
    steps, done = len(regions) * len(batches) * (2 if follow_edits else 1), 0
    for region in regions:
        entry_nodes = set(live[0]) if live else set()
        carried = [renamed.get(node, node) for node in region.carried]
        plan = plan_region(program.graph, [*carried, *region.wanted], entry_nodes)
        for index, values in enumerate(inputs):
            results = run_plan(program, plan, {**values, **live[index]}, carried, visit, frozenset(region.wanted))
            if not follow_edits:
                # Whatever of its entry no later region reads is freed here, one batch at a time.
                live[index] = results
            done = report(progress, done, steps)
        readers = [_later_reader(node, region, regions) for node in carried]
        yield region
        after = [user.all_input_nodes[position] for user, position in readers]
        renamed.update(zip(region.carried, after, strict=True))
        if follow_edits:
            plan = plan_region(program.graph, after, entry_nodes)
            for index, values in enumerate(inputs):
                live[index] = run_plan(program, plan, {**values, **live[index]}, after)
                done = report(progress, done, steps)
        else:
            names = dict(zip(carried, after, strict=True))
            live = [{names[node]: value for node, value in values.items()} for values in live]


def split_regions(program: Program, wanted: Collection[fx.Node]) -> list[Region]:
    """The regions that must run for the wanted nodes, in order; each has a linear layer, few more than eight."""
    order = [node for node in program.graph.nodes if node.op == "call_function"]
    position = {node: index for index, node in enumerate(order)}
    needed = _ancestors(wanted, frozenset())
    derived = derived_from_inputs(program)
    last_use = {
        node: max((position[user] for user in node.users if user in needed), default=-1)
        for node in order
        if node in needed and node not in derived
    }
    bounds = _bounds(order, [(position[node], last) for node, last in last_use.items() if last >= 0])
    regions: list[Region] = []
    for start, end in bounds:
        nodes = order[start:end]
        here = tuple(node for node in nodes if node in wanted)
        if not regions:
            here += tuple(node for node in wanted if node.op != "call_function")
        carried = tuple(node for node, last in last_use.items() if position[node] < end <= last)
        regions.append(Region(len(regions), frozenset(nodes), here, carried))
    while regions and not regions[-1].wanted:
        regions.pop()
    return regions


def _bounds(order: Sequence[fx.Node], spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Where the regions begin and end, given (made at, last read at) of every value that would have to be kept."""
    change = [0] * (len(order) + 1)
    for made, last in spans:
        change[made + 1] += 1
        change[last + 1] -= 1
    alive, total = [], 0
    for step in change:
        total += step
        # alive[i]: values that a cut right before node i would have to keep.
        alive.append(total)
    linears = [node.target is aten.linear.default for node in order]
    pieces, kept = [(0, len(order))], []
    while pieces:
        start, end = pieces.pop()
        if end - start < 2 or sum(linears[start:end]) <= _MOST_LINEARS:
            kept.append((start, end))
            continue
        least = min(alive[start + 1 : end])
        cuts = [start, *(index for index in range(start + 1, end) if alive[index] == least), end]
        pieces.extend(pairwise(cuts))
    # A piece without a linear layer is not worth keeping values for: it joins the next, and at the very end the last.
    merged: list[tuple[int, int]] = []
    begin = 0
    for start, end in sorted(kept):
        if any(linears[start:end]):
            merged.append((begin, end))
            begin = end
    if begin < len(order):
        begin = merged.pop()[0] if merged else 0
        merged.append((begin, len(order)))
    return merged


def _ancestors(nodes: Iterable[fx.Node], stop: Collection[fx.Node]) -> set[fx.Node]:
    """The nodes and all that they depend on, without going past those of `stop`."""
    found: set[fx.Node] = set()
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node not in found and node not in stop:
            found.add(node)
            pending.extend(node.all_input_nodes)
    return found


def derived_from_inputs(program: Program) -> set[fx.Node]:
    """Calls that depend on inputs and buffers alone."""
    derived: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.op == "call_function":
            # The second argument of type_as is read for its dtype only.
            reads = node.all_input_nodes[:1] if node.target is aten.type_as.default else node.all_input_nodes
            if all(
                read.op == "placeholder"
                or read in derived
                or (read.op == "get_attr" and read.target in program.buffers)
                for read in reads
            ):
                derived.add(node)
    return derived


def _later_reader(node: fx.Node, region: Region, regions: Sequence[Region]) -> tuple[fx.Node, int]:
    """A call in a later region that reads `node`, and which of its inputs it is: through it a replacement is seen."""
    later = (user for user in node.users if any(user in other.nodes for other in regions[region.index + 1 :]))
    user = next(later)
    return user, user.all_input_nodes.index(node)


def inputs_of(program: Program, batches: Iterable[Mapping[str, Tensor]]) -> list[dict[fx.Node, Any]]:
    """Each batch's tensors by placeholder.

    Raises: GRAPH-002 where weights are on the meta device, since then there is nothing to run.
    """
    if program.is_meta:
        raise GraphError(
            "GRAPH-002",
            "this program's weights are on the meta device: there are no values to run calibration text through.",
            fix="load the checkpoint with its weights, then capture again.",
        )
    placeholders = program.graph.find_nodes(op="placeholder")
    return [
        {node: batch[entry.name] for node, entry in zip(placeholders, program.inputs, strict=True)} for batch in batches
    ]


def plan_region(graph: fx.Graph, results: Collection[fx.Node], known: Collection[fx.Node]) -> Plan:
    """What to run for `results`, in order, each with the values that nothing reads after it."""
    needed = _ancestors(results, known)
    ordered = [node for node in graph.nodes if node in needed and node.op != "placeholder"]
    last: dict[fx.Node, fx.Node] = {}
    for node in ordered:
        last[node] = node
        last.update(dict.fromkeys(node.all_input_nodes, node))
    unused: dict[fx.Node, list[fx.Node]] = {}
    for value, reader in last.items():
        if value not in results:
            unused.setdefault(reader, []).append(value)
    return [(node, unused.get(node, [])) for node in ordered]


def run_plan(
    program: Program,
    plan: Plan,
    values: dict[fx.Node, Any],
    results: Iterable[fx.Node],
    visit: Visit | None = None,
    visited: Collection[fx.Node] = (),
    *,
    training: bool = False,
) -> dict[fx.Node, Any]:
    """Run one batch through one region; `values` holds inputs and what earlier regions carried.

    With `training`, gradients flow from the results to those of `values` that require them and to the visited nodes: a
    visited value that depends on nothing with a gradient becomes a leaf itself.
    """
    with torch.set_grad_enabled(training):
        for node in visited:
            if node in values and visit is not None:
                visit(node, values[node])
        for node, unused in plan:
            if node.op == "get_attr":
                values[node] = program.weight(str(node.target))
            else:
                args: tuple[Any, ...] = fx.map_arg(node.args, values.__getitem__)
                kwargs: dict[str, Any] = fx.map_arg(node.kwargs, values.__getitem__)
                value = kernel_for(node.target, args, kwargs, training=training)(*args, **kwargs)
                if node in visited and visit is not None:
                    if training and not value.requires_grad and value.is_floating_point():
                        value = value.detach().requires_grad_()
                    visit(node, value)
                values[node] = value
            for spent in unused:
                del values[spent]
    return {node: values[node] for node in results}


def kernel_for(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, training: bool) -> Callable[..., Any]:
    """What computes a call: for an op of Skink's its first kernel that serves the call, otherwise the target itself.

    References are written to be read: attention's alone would take more time than all of calibration's other work.
    """
    op = find_op(target)
    if op is not None:
        arguments = op.bind(args, kwargs)
        device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
        variant, _ = op.choose(OpCall(arguments, device), training=training)
        if variant is not None:
            return variant.load()
    if target is aten.index_select.default:
        return index_select
    function: Callable[..., Any] = target
    return function


def report(progress: Progress | None, done: int, steps: int) -> int:
    """One more step is done."""
    if progress is not None:
        progress(done + 1, steps)
    return done + 1
