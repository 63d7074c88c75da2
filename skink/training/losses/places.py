"""Where hidden states and attention outputs lie in two programs, and how far apart they are.

Places are found by where nodes came from (`meta["module"]`, skink/graph/provenance.py), so a layer that a pass removed
or rewrote does not shift the others: `model.layers.3` of the student is held against `model.layers.3` of the teacher.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor, fx

from skink.errors import RecoveryError
from skink.graph.pattern import op_name
from skink.graph.program import Program
from skink.graph.token_axis import product, size_of
from skink.kernels import ATTENTION

Kind = Literal["hidden", "attention"]

# How far behind attention its output projection may lie: shapes, casts, a gate, a norm.
_REACH = 8


def corresponding(
    original: Program, program: Program, kind: Kind, patterns: Sequence[str] = ()
) -> list[tuple[fx.Node, fx.Node]]:
    """Pairs (teacher's node, student's node) of the same place in both programs: the values of `common_places`."""
    return list(common_places(original, program, kind, patterns).values())


def common_places(
    original: Program, program: Program, kind: Kind, patterns: Sequence[str] = ()
) -> dict[str, tuple[fx.Node, fx.Node]]:
    """The places that both programs have: (teacher's node, student's node) by module name, in the teacher's order.

    Args:
        original: the teacher.
        program: the student.
        kind: `hidden`: what layers give, `attention`: what attention gives, after its output projection.
        patterns: shell-style patterns on qualified names of modules; empty: every layer, or every attention. `hidden`:
            the layers whose names match, or, where none does, any modules whose names match. `attention`: those of
            which the projection, or a module around it, matches.

    Raises:
        RecoveryError: RECOVER-007 where no place is in both, or the values differ in width.
    """
    places = _FINDERS[kind](original, patterns)
    pairs = {name: (node, other) for name, node in places.items() if (other := output_of(program, name)) is not None}
    if not pairs:
        raise _nowhere(original, kind, patterns, list(places))
    for name, (node, other) in pairs.items():
        one, two = _width(node), _width(other)
        if one != two:
            raise RecoveryError(
                "RECOVER-007",
                f"the {_WORDS[kind]} of both models cannot be compared at {name}.",
                why=f"the teacher gives {one} numbers for each token there, and the student {two}.",
                fix="choose by patterns the places that have one width in both, or train on the logits: kl.",
            )
    return pairs


def _nowhere(original: Program, kind: Kind, patterns: Sequence[str], places: Sequence[str]) -> RecoveryError:
    known = list(_FINDERS[kind](original, ()))
    if places:
        why = f"of {_some(places)}, which the teacher has, nothing is left in the student."
    elif known:
        why = f"no module of the teacher matches {', '.join(map(repr, patterns))}; it has {_some(known)}."
    elif kind == "hidden":
        why = "the teacher has no layers, which are modules with a number in their name."
    else:
        why = "the teacher has no attention that Skink knows, followed by a projection of its own."
    return RecoveryError(
        "RECOVER-007",
        f"there is no place where the {_WORDS[kind]} of both models could be compared.",
        why=why,
        fix="choose other places by their modules' names, or train on the logits: kl.",
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{names[0]}, ..., {names[-1]}"


def hidden_states(program: Program, patterns: Sequence[str] = ()) -> dict[str, fx.Node]:
    """The output of each layer by the layer's name; with patterns, of the layers or else the modules that match.

    A layer is the outermost module with a number in its name: `model.layers.3`, `encoder.layer.3`, `h.3`.
    """
    modules = _modules(program)
    layers = list(dict.fromkeys(layer for name in modules if (layer := layer_of(name))))
    names = layers
    if patterns:
        names = [layer for layer in layers if _matches(layer, patterns)]
        names = names or [name for name in modules if _matches(name, patterns)]
    found = ((name, output_of(program, name)) for name in names)
    return _ordered(program, ((name, node) for name, node in found if node is not None))


def attention_outputs(program: Program, patterns: Sequence[str] = ()) -> dict[str, fx.Node]:
    """What each attention's output projection gives, by the projection's module: `model.layers.3.self_attn.o_proj`."""
    found: dict[str, fx.Node] = {}
    for node in program.graph.find_nodes(op="call_function", target=ATTENTION.overload):
        name = _projection(node)
        # A projection that lies in the layer itself, and in no module of its own, cannot be told from the layer.
        if name != layer_of(name) and (not patterns or any(_matches(part, patterns) for part in _with_parents(name))):
            output = output_of(program, name)
            if output is not None:
                found[name] = output
    return _ordered(program, found.items())


def layer_of(module: str) -> str:
    """The layer that a module belongs to, empty where to none: `model.layers.3.mlp.up_proj` → `model.layers.3`."""
    parts = module.split(".")
    number = next((index for index, part in enumerate(parts) if part.isdecimal()), None)
    return ".".join(parts[: number + 1]) if number is not None else ""


def output_of(program: Program, module: str) -> fx.Node | None:
    """What a module gives: the last of its values, and of its children's, that something outside of it reads."""
    result = None
    for node in program.graph.nodes:
        value = node.meta.get("val")
        inside = _is_within(node, module) and isinstance(value, Tensor) and value.is_floating_point()
        if inside and any(not _is_within(user, module) for user in node.users):
            result = node
    return result if result is not None and holds_tokens(program, result) else None


def holds_tokens(program: Program, node: fx.Node) -> bool:
    """Whether a value has a row for each token: [B, T, ...] or [B*T, ...]."""
    entry = next((entry for entry in program.inputs if entry.name == "input_ids"), program.inputs[0])
    tokens = program.graph.find_nodes(op="placeholder")[program.inputs.index(entry)].meta["val"]
    if tokens.dim() < 2:
        return False
    shape, (batch, length) = node.meta["val"].shape, tokens.shape[:2]
    if len(shape) > 2 and (size_of(shape[0]), size_of(shape[1])) == (size_of(batch), size_of(length)):
        return True
    return len(shape) == 2 and size_of(shape[0]) == product((batch, length))


def relative_error(student: Tensor, teacher: Tensor, counted: Tensor) -> Tensor:
    """Σ over counted tokens of the mean square of `student - teacher`, relative to that of `teacher`: a float32 scalar.

    The mean square of the teacher is that of one window's counted tokens, so that every layer weighs alike, and the sum
    over windows is the same however they are put into batches.

    Args:
        student: float[B, T, ...] or float[B*T, ...]; gradients flow to it alone.
        teacher: likewise.
        counted: bool[B, T].
    """
    wide = torch.promote_types(student.dtype, torch.float32)
    # A value that does not count may be anything, even no number, and times zero it would not be zero.
    outside = ~counted[..., None]
    given = teacher.detach().to(wide).reshape(*counted.shape, -1).masked_fill(outside, 0.0)
    difference = student.to(wide).reshape(given.shape).masked_fill(outside, 0.0) - given
    sizes = given.square().mean(-1).sum(1) / counted.sum(1).clamp(min=1)
    # A teacher that gives nothing but zeros has no scale; the error then counts as it is.
    sizes = torch.where(sizes > 0, sizes, 1.0)
    return (difference.square().mean(-1).sum(1) / sizes).sum()


def _projection(attention: fx.Node) -> str:
    """The module of the first linear layer behind attention; empty where there is none, or it is no module's end."""
    frontier = [attention]
    for _ in range(_REACH):
        following: list[fx.Node] = []
        for node in frontier:
            for user in node.users:
                if op_name(user) == "linear":
                    return str(user.meta.get("module", ""))
                if user.op == "call_function":
                    following.append(user)
        frontier = following
    return ""


def _is_within(node: fx.Node, module: str) -> bool:
    name = str(node.meta.get("module", ""))
    return name == module or name.startswith(f"{module}.")


def _modules(program: Program) -> list[str]:
    """Names of all modules that nodes came from, and of those around them, in the graph's order."""
    names = (str(node.meta["module"]) for node in program.graph.nodes if node.meta.get("module"))
    return list(dict.fromkeys(part for name in dict.fromkeys(names) for part in _with_parents(name)))


def _with_parents(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[:end]) for end in range(1, len(parts) + 1))


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _ordered(program: Program, found: Iterable[tuple[str, fx.Node]]) -> dict[str, fx.Node]:
    places = dict(found)
    order = {node: index for index, node in enumerate(program.graph.nodes)}
    return dict(sorted(places.items(), key=lambda item: order[item[1]]))


def _width(node: fx.Node) -> int:
    shape = node.meta["val"].shape
    return int(product(shape[1:] if len(shape) == 2 else shape[2:]))


_WORDS = {"hidden": "hidden states", "attention": "attention outputs"}
_FINDERS: Mapping[str, Callable[[Program, Sequence[str]], dict[str, fx.Node]]] = {
    "hidden": hidden_states,
    "attention": attention_outputs,
}
