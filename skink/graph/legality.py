"""What is legal at each stage, as a list of rules: the definition of the graph's language.

A rule about nodes says of one node why it may not stand in the graph; a rule about programs says what does not fit
together, and at which node. Each holds at the stages that it names. The verifier walks the list after every pass.

    captured    ATen operators and ours, functional; sizes by arithmetic; weights by name
    canonical   the same without what the exporter leaves behind
    rewritten   the same
    stepped     the same with state: for each tensor of it an input, and an output that fits
    lowered     the same with kernels in the place of our operators
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from skink.graph.operators import SIZE_FUNCTIONS
from skink.graph.pattern import op_name
from skink.graph.program import Program, Stage, StateInput
from skink.graph.propagate import expression
from skink.kernels import find_op

_ALL = tuple(Stage)
_BEFORE_LOWERED = tuple(stage for stage in Stage if stage < Stage.LOWERED)
_CANONICAL_ON = tuple(stage for stage in Stage if stage >= Stage.CANONICAL)
_STATELESS = tuple(stage for stage in Stage if stage < Stage.STEPPED)
_STATEFUL = (Stage.STEPPED, Stage.LOWERED)

_LEFTOVERS = frozenset(
    {"_assert_tensor_metadata", "_assert_scalar", "_assert_async", "lift_fresh_copy", "detach", "detach_", "alias"}
)
_GROWTHS = ("append", "ring", "fixed")


@dataclass(frozen=True)
class Illegal:
    """Why a program breaks a rule, and at which node, where it is one."""

    rule: str
    reason: str
    node: fx.Node | None = None


@dataclass(frozen=True)
class NodeRule:
    """A rule about each node alone.

    Args:
        name: kebab-case.
        stages: where it holds.
        against: why a node breaks it, as the end of a sentence that begins with what the node is; or None.
    """

    name: str
    stages: tuple[Stage, ...]
    against: Callable[[fx.Node], str | None]


@dataclass(frozen=True)
class ProgramRule:
    """A rule about what fits together.

    Args:
        name: kebab-case.
        stages: where it holds.
        against: every breach: the reason, a whole sentence, and the node.
    """

    name: str
    stages: tuple[Stage, ...]
    against: Callable[[Program], Iterator[tuple[str, fx.Node | None]]]


def illegal(program: Program) -> Iterator[Illegal]:
    """Everything in the program that its stage forbids, in the order of the rules."""
    for rule in NODE_RULES:
        if program.stage in rule.stages:
            for node in program.graph.nodes:
                reason = rule.against(node)
                if reason is not None:
                    yield Illegal(rule.name, f"{reason} is not legal at stage {program.stage}.", node)
    for whole in PROGRAM_RULES:
        if program.stage in whole.stages:
            for reason, node in whole.against(program):
                yield Illegal(whole.name, reason, node)


def _kind(node: fx.Node) -> str | None:
    known = node.op in ("placeholder", "get_attr", "call_function", "output")
    return None if known else f"a node of kind {node.op!r}"


def _operator(node: fx.Node) -> str | None:
    if node.op != "call_function" or isinstance(node.target, torch._ops.OpOverload):
        return None
    return None if node.target in SIZE_FUNCTIONS.values() else f"the function {_function_name(node)}"


def _namespace(node: fx.Node) -> str | None:
    namespace = getattr(node.target, "namespace", "aten")
    return None if namespace in ("aten", "skink") else f"{node.target}, an operator of {namespace},"


def _functional(node: fx.Node) -> str | None:
    target = node.target
    writes = isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable
    return f"{target}, which writes to its argument," if writes else None


def _arguments(node: fx.Node) -> str | None:
    """Whether a call gives the arguments that its operator's schema asks for."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    takes = node.target._schema.arguments
    positional = [argument for argument in takes if not argument.kwarg_only]
    if len(node.args) > len(positional):
        return f"{node.target} with {len(node.args)} arguments, where it takes {len(positional)},"
    names = {argument.name for argument in takes[len(node.args) :]}
    unknown = next((name for name in node.kwargs if name not in names), None)
    if unknown is not None:
        return f"{node.target} with an argument {unknown!r}, which it does not take or has already,"
    needed = (a.name for a in takes[len(node.args) :] if not a.has_default_value() and a.name not in node.kwargs)
    missing = next(needed, None)
    return f"{node.target} without its argument {missing!r}" if missing is not None else None


def _leftover(node: fx.Node) -> str | None:
    return f"{node.target}, which the exporter left behind," if op_name(node) in _LEFTOVERS else None


def _bound(node: fx.Node) -> str | None:
    """Whether an operator of ours has its kernel; `lower` names it in the node."""
    unbound = find_op(node.target) is not None and "kernel" not in node.meta
    return f"{node.target}, which no kernel was chosen for," if unbound else None


def _kernel(node: fx.Node) -> str | None:
    """Beside ATen's operators and arithmetic, a lowered graph calls the kernels that `lower` chose."""
    if "kernel" in node.meta:
        return None
    return _operator(node) or _namespace(node)


def _function_name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))


def _weights_exist(program: Program) -> Iterator[tuple[str, fx.Node | None]]:
    stored = set(program.stored_weights())
    for node in program.graph.find_nodes(op="get_attr"):
        if node.target not in stored:
            yield f"the weight {node.target!r} is read and does not exist.", node


def _weights_read(program: Program) -> Iterator[tuple[str, fx.Node | None]]:
    read = {node.target for node in program.graph.find_nodes(op="get_attr")}
    for name in sorted(set(program.stored_weights()) - read):
        yield f"the weight {name!r} is kept and never read.", None


def _names_tied(program: Program) -> Iterator[tuple[str, fx.Node | None]]:
    stored = set(program.stored_weights())
    for alias, name in sorted(program.aliases.items()):
        if name not in stored:
            yield f"the name {alias!r} is tied to the weight {name!r}, which does not exist.", None


def _inputs(program: Program) -> Iterator[tuple[str, fx.Node | None]]:
    found, wanted = len(program.graph.find_nodes(op="placeholder")), len(program.inputs) + len(program.state)
    if found != wanted:
        yield f"the graph has {found} inputs, and the program lists {wanted}.", None


def _outputs(program: Program) -> Iterator[tuple[str, fx.Node | None]]:
    output = program.graph.output_node()
    results, wanted = output.args[0], len(program.outputs) + len(program.state)
    if not isinstance(results, tuple | list) or len(results) != wanted:
        found = len(results) if isinstance(results, tuple | list) else "one bare result instead of a tuple"
        yield f"the graph has {found} results, and the program lists {wanted}.", output
        return
    for result in results:
        if not isinstance(result, fx.Node):
            yield f"a result is {result!r}, which is no node.", output


def _no_state(program: Program) -> Iterator[tuple[str, fx.Node | None]]:
    if program.state:
        yield f"state is not legal at stage {program.stage}: {program.state[0].name} comes with stepping.", None


def _state_listed(program: Program) -> Iterator[tuple[str, fx.Node | None]]:
    """Names are unique, layers ascend, and what grows has an axis to grow along."""
    names: set[str] = set()
    layer = 0
    for entry in program.state:
        if entry.name in names:
            yield f"state {entry.name} is listed twice.", None
        names.add(entry.name)
        if entry.layer not in (layer, layer + 1):
            yield f"state {entry.name} is of layer {entry.layer}, and comes after layer {layer}.", None
        layer = entry.layer
        if entry.growth not in _GROWTHS:
            yield f"state {entry.name} grows by {entry.growth!r}, which is none of {', '.join(_GROWTHS)}.", None
        elif not 0 <= entry.axis < len(entry.shape):
            yield f"state {entry.name} has its token axis at {entry.axis}, and {len(entry.shape)} dims.", None
        elif entry.growth != "fixed" and not isinstance(entry.shape[entry.axis], str):
            yield f"state {entry.name} grows, and its token axis has the size {entry.shape[entry.axis]}.", None


def _state_fits(program: Program) -> Iterator[tuple[str, fx.Node | None]]:
    """Each tensor of state is an input that is read, and an output of its dtype and dims."""
    placeholders = program.graph.find_nodes(op="placeholder")[len(program.inputs) :]
    results: Any = program.graph.output_node().args[0]
    presents = results[len(program.outputs) :] if isinstance(results, tuple | list) else ()
    if not len(placeholders) == len(presents) == len(program.state):
        return  # said by the rules about inputs and outputs
    for entry, past, present in zip(program.state, placeholders, presents, strict=True):
        if past.target != entry.name.replace(".", "_"):
            yield f"state {entry.name} has the input {past.target!r} in its place.", past
        if not past.users:
            yield f"state {entry.name} is an input that nothing reads.", past
        reason = _misfit(entry, past.meta.get("val"), getattr(present, "meta", {}).get("val"))
        if reason:
            yield f"{entry.output_name} does not fit {entry.name}: {reason}.", present


def _misfit(entry: StateInput, past: Any, present: Any) -> str:
    if not isinstance(past, torch.Tensor) or not isinstance(present, torch.Tensor):
        return "they are not both tensors"
    if past.dtype != present.dtype:
        return f"{str(present.dtype).removeprefix('torch.')} after {str(past.dtype).removeprefix('torch.')}"
    if past.dim() != present.dim():
        return f"{present.dim()} dims after {past.dim()}"
    for axis, (before, after) in enumerate(zip(past.shape, present.shape, strict=True)):
        if (axis != entry.axis or entry.growth == "fixed") and expression(before) != expression(after):
            return f"size {after} after {before} on axis {axis}"
    return ""


NODE_RULES: tuple[NodeRule, ...] = (
    NodeRule("nodes-are-inputs-weights-calls-and-the-output", _ALL, _kind),
    NodeRule("calls-are-operators-or-arithmetic-on-sizes", _BEFORE_LOWERED, _operator),
    NodeRule("operators-are-of-aten-or-skink", _BEFORE_LOWERED, _namespace),
    NodeRule("nothing-writes-to-its-argument", _ALL, _functional),
    NodeRule("arguments-fit-the-schema", _ALL, _arguments),
    NodeRule("leftovers-of-the-exporter-are-gone", _CANONICAL_ON, _leftover),
    NodeRule("operators-of-skink-have-a-kernel", (Stage.LOWERED,), _bound),
    NodeRule("other-calls-are-kernels-of-aten-or-arithmetic-on-sizes", (Stage.LOWERED,), _kernel),
)

PROGRAM_RULES: tuple[ProgramRule, ...] = (
    ProgramRule("weights-that-are-read-exist", _ALL, _weights_exist),
    ProgramRule("weights-that-exist-are-read", _ALL, _weights_read),
    ProgramRule("tied-names-have-a-weight", _ALL, _names_tied),
    ProgramRule("inputs-are-as-listed", _ALL, _inputs),
    ProgramRule("results-are-as-listed", _ALL, _outputs),
    ProgramRule("there-is-no-state-before-stepping", _STATELESS, _no_state),
    ProgramRule("state-is-listed-in-order", _STATEFUL, _state_listed),
    ProgramRule("state-has-inputs-and-outputs-that-fit", _STATEFUL, _state_fits),
)
