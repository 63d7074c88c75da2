"""State derivation: from the full-sequence graph to the step graph, with explicit state.

Each op that mixes tokens declares what it must remember (its `StateSpec`). The step graph takes the new tokens only,
puts what it remembers before them, and hands back what to remember next:

    past.{i}.key ──┐
                   cat ──> attention(query, ·, ·, mask) ──> ...
    key ───────────┘  └──> present.{i}.key   (all of it: append; the last `limit` tokens: ring)

Law: full sequence = any chunking = step by step. With an empty past the step graph is the full graph.
"""

import operator
from collections.abc import Sequence

import torch
from torch import fx

from skink.errors import StateError
from skink.graph.mixing import token_mixing
from skink.graph.pattern import through_casts
from skink.graph.program import PADDING_INPUT, Input, Program, Stage, StateInput
from skink.graph.propagate import dim_text, propagate, shape_context
from skink.graph.rewriter import Rewriter, describe
from skink.graph.text import target_name
from skink.kernels import OpDef, StateTensor, find_op

aten = torch.ops.aten
_END = torch.iinfo(torch.int64).max


def derive_step(program: Program) -> Program:
    """The step graph of a canonical or rewritten program, at stage `stepped`; the program itself is left alone.

    Inputs are the same, for the new tokens, except that `attention_mask` covers past and new tokens: [B, M]. State
    inputs follow, `past_key_values.{layer}.{name}`, of any length from zero; outputs are the results, then
    `present....`.

    Raises:
        StateError: STATE-001 where the padding mask is used by anything but an op that declares state, or where such an
            op cannot be stepped or takes its padding from elsewhere; STATE-002 where anything else mixes tokens, or
            counts their positions.
    """
    stepped = program.clone()
    shape_context(stepped)
    rewriter = Rewriter(stepped, "derive-step")
    owners = [
        (node, op) for node in stepped.graph.nodes if (op := find_op(node.target)) is not None and op.state is not None
    ]
    _check_mask_users(stepped, {node for node, _ in owners})
    counts = counted_positions(stepped)
    _check_mixing(stepped, counts)
    names = shape_context(stepped)
    last_input = stepped.graph.find_nodes(op="placeholder")[-1]
    states: list[StateInput] = []
    presents: list[fx.Node] = []
    for layer, (node, op) in enumerate(owners):
        arguments = op.bind(node.args, node.kwargs)
        reason = op.state.refuses(arguments)  # type: ignore[union-attr]
        if reason is not None:
            raise StateError(
                "STATE-001",
                f"{op.name} {reason}, and cannot be stepped.",
                where=describe(node),
                fix="generate with causal models only.",
            )
        _check_own_mask(node, op, arguments.get("key_mask"))
        for tensor in op.state.tensors(arguments):  # type: ignore[union-attr]
            current = arguments[tensor.argument]
            axis = op.state.axis  # type: ignore[union-attr]
            dims: list[int | str] = [
                int(text) if (text := dim_text(names, size)).isdigit() else text for size in current.meta["val"].shape
            ]
            dims[axis] = "P" if tensor.growth == "append" else f"P{tensor.limit}"
            state = StateInput(
                f"past_key_values.{layer}.{tensor.name}", layer, tuple(dims), tensor.growth, axis, tensor.limit
            )
            states.append(state)
            past, present, joined = _join(rewriter, node, current, state, tensor, last_input)
            last_input = past
            presents.append(present)
            _set_argument(node, op, tensor.argument, joined)
            rewriter.record(node, rule=f"state-{tensor.growth}", detail=state.name)
    for count in counts:
        _count_on(rewriter, count)
    output = stepped.graph.output_node()
    output.args = ((*output.args[0], *presents),)  # type: ignore[misc]
    stepped.inputs = tuple(
        Input(entry.name, entry.dtype, (entry.dims[0], "M")) if entry.name == PADDING_INPUT else entry
        for entry in stepped.inputs
    )
    stepped.state = tuple(states)
    stepped.stage = Stage.STEPPED
    rewriter.finish()
    propagate(stepped)
    return stepped


def _join(
    rewriter: Rewriter,
    node: fx.Node,
    current: fx.Node,
    state: StateInput,
    tensor: StateTensor,
    last_input: fx.Node,
) -> tuple[fx.Node, fx.Node, fx.Node]:
    """(past, present, past and current joined) for one tensor of state."""
    graph = rewriter.program.graph
    with graph.inserting_after(last_input):
        past = graph.placeholder(state.name.replace(".", "_"))
    past.meta["val"] = current.meta["val"]
    with rewriter.before(node):
        joined = rewriter.call(aten.cat.default, [past, current], state.axis)
        if tensor.growth == "append":
            return past, joined, joined
        # A ring of none (a window of one) keeps nothing; `-0` would mean everything.
        start, end = (-tensor.limit, _END) if tensor.limit else (0, 0)
        return past, rewriter.call(aten.slice.Tensor, joined, state.axis, start, end), joined


def _set_argument(node: fx.Node, op: OpDef, name: str, value: fx.Node) -> None:
    names = [argument.name for argument in op.overload._schema.arguments]
    if names.index(name) < len(node.args):
        node.update_arg(names.index(name), value)
    else:
        node.update_kwarg(name, value)


def _check_mask_users(program: Program, owners: set[fx.Node]) -> None:
    """Only ops that declare state may read the padding mask: only they know which part of it is theirs."""
    mask = next((node for node in program.graph.find_nodes(op="placeholder") if node.target == PADDING_INPUT), None)
    if mask is None:
        return
    pending = list(mask.users)
    while pending:
        user = pending.pop()
        if user in owners:
            continue
        if through_casts(user) is mask:
            pending.extend(user.users)
            continue
        raise StateError(
            "STATE-001",
            f"{PADDING_INPUT} is read by {user.target}, which cannot be stepped: it sees the mask of new tokens only.",
            where=describe(user),
            why="Only attention reads padding in a graph that can be stepped.",
            fix="give positions by position_ids instead of computing them from the mask.",
        )


def _check_own_mask(node: fx.Node, op: OpDef, mask: object) -> None:
    """The step graph gives keys of the past and of now; only the padding input covers both."""
    below = through_casts(mask)
    if below is None or (isinstance(below, fx.Node) and below.op == "placeholder" and below.target == PADDING_INPUT):
        return
    source = describe(below) if isinstance(below, fx.Node) else repr(below)
    raise StateError(
        "STATE-001",
        f"{op.name} takes its padding from {source}, which covers the new tokens only, and cannot be stepped.",
        where=describe(node),
        why=f"Only {PADDING_INPUT} says which tokens of the past are padding.",
        fix=f"let the model take its padding from the input {PADDING_INPUT}, and from nothing else.",
    )


def counted_positions(program: Program) -> list[fx.Node]:
    """The nodes `arange(T)`, which count the tokens of a whole sequence from its beginning, padding too."""
    names = shape_context(program)
    placeholders = {node.target for node in program.graph.find_nodes(op="placeholder")}
    if not {"input_ids", PADDING_INPUT} <= placeholders:
        return []
    found = []
    for node in program.graph.nodes:
        begin = {aten.arange.default: (), aten.arange.start: (0,), aten.arange.start_step: (0,)}.get(node.target)
        if begin is None or node.args[: len(begin)] != begin or node.args[len(begin) + 1 :] not in ((), (1,)):
            continue
        value = node.meta["val"]
        if value.dtype is torch.int64 and dim_text(names, value.shape[0]) == "T":
            found.append(node)
    return found


def _count_on(rewriter: Rewriter, count: fx.Node) -> None:
    """Count from the end of the past: the padding mask covers past and new tokens, and so ends where they end."""
    (ids,), (mask,) = (
        rewriter.program.graph.find_nodes(op="placeholder", target=name) for name in ("input_ids", PADDING_INPUT)
    )
    with rewriter.before(count.next):
        everything = rewriter.call(aten.sym_size.int, mask, 1)
        new = rewriter.call(aten.sym_size.int, ids, 1)
        past = rewriter.call(operator.sub, everything, new)
        position = rewriter.call(aten.add.Tensor, count, past)
    count.replace_all_uses_with(position, delete_user_cb=lambda user: user is not position)
    rewriter.record(position, rule="count-on")


def _check_mixing(program: Program, positions: Sequence[fx.Node]) -> None:
    """Nothing but operators that declare state may let one token's result depend on another token."""
    mixing = token_mixing(program, positions)
    if not mixing.origins:
        return
    live = _read_by_results(program)
    node = next((origin for origin in mixing.origins if origin in live), None)
    if node is not None:
        name = f"the input {node.target}" if node.op == "placeholder" else target_name(node.target)
        raise StateError(
            "STATE-002",
            f"{name} mixes tokens, or is not known not to, and only an operator that declares state can be stepped.",
            where=describe(node),
            why=mixing.mixes[node],
            fix="let each token be treated by itself outside of attention, with positions from position_ids.",
        )


def _read_by_results(program: Program) -> set[fx.Node]:
    """The nodes that some result depends on."""
    live: set[fx.Node] = set()
    for node in reversed(program.graph.nodes):
        if node.op == "output" or node in live:
            live.update(node.all_input_nodes)
    return live


def without_padding(program: Program) -> Program:
    """The program for inputs without padding: no op reads the padding mask, which stays an input."""
    clone = program.clone()
    mask = next((node for node in clone.graph.find_nodes(op="placeholder") if node.target == PADDING_INPUT), None)
    if mask is None:
        return clone
    for node in list(clone.graph.nodes):
        op = find_op(node.target)
        if op is None or op.state is None:
            continue
        for argument in list(node.all_input_nodes):
            if through_casts(argument) is mask:
                node.replace_input_with(argument, None)
    clone.graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    clone.graph_module.recompile()
    return clone
