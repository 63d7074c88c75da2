"""Which operators may stand in a graph: functional ATen operators that take tensors, a few factories, arithmetic on
sizes, and Skink's own ops.
"""

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch

from skink.errors import GraphError, suggest
from skink.kernels import OPS

# What computes sizes, and takes results apart: the functions that may stand in a graph beside operators.
SIZE_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    **{f"operator.{name}": getattr(operator, name) for name in (
        "add", "sub", "mul", "floordiv", "truediv", "mod", "pow", "neg", "getitem", "eq", "ne", "lt", "le", "gt", "ge",
        "and_", "or_",
    )},
    **{f"torch.{name}": getattr(torch, name) for name in (
        "sym_max", "sym_min", "sym_not", "sym_ite", "sym_sum", "sym_float", "sym_int",
    )},
    **{f"math.{name}": getattr(math, name) for name in ("ceil", "floor", "trunc")},
}  # fmt: skip

_FACTORIES = frozenset({"arange", "full", "zeros", "ones", "empty", "scalar_tensor", "eye", "linspace"})
# ATen's own underscored operators may trust their arguments and read past the end of memory; these are checked.
_PRIVATE = frozenset({
    "_to_copy", "_unsafe_view", "_softmax", "_log_softmax", "_safe_softmax", "_grouped_mm", "_int_mm",
    "__and__", "__or__", "__xor__", "__lshift__", "__rshift__",
})  # fmt: skip
_NATIVE_LIBRARIES = ("cudnn_", "miopen_", "mkldnn_", "fbgemm_", "quantized_")


def find_operator(name: str) -> Callable[..., Any]:
    """The operator of this name, if it is on the allow-list.

    Raises:
        GraphError: GRAPH-001 where it is not.
    """
    namespace, _, rest = name.partition(".")
    if name in SIZE_FUNCTIONS:
        return SIZE_FUNCTIONS[name]
    if namespace == "skink":
        for op in OPS:
            if name == f"skink.{op.name}.default":
                return op.overload
    if namespace == "aten":
        packet_name, _, overload_name = rest.partition(".")
        packet = getattr(torch.ops.aten, packet_name, None) if packet_name.isidentifier() else None
        if isinstance(packet, torch._ops.OpOverloadPacket) and overload_name in packet.overloads():
            overload: torch._ops.OpOverload = getattr(packet, overload_name)
            if _is_allowed(overload):
                return overload
    raise GraphError(
        "GRAPH-001",
        f"the operator {name!r} is not allowed in a graph.",
        fix=suggest(name, [f"skink.{op.name}.default" for op in OPS])
        if namespace == "skink"
        else "see docs/design.md.",
    )


def _is_allowed(overload: torch._ops.OpOverload) -> bool:
    """Whether an ATen operator only computes: it writes to none of its arguments, and works on tensors given to it."""
    schema = overload._schema
    if schema.is_mutable:
        return False
    name = schema.name.removeprefix("aten::")
    if (name.startswith("_") and name not in _PRIVATE) or name.startswith(_NATIVE_LIBRARIES):
        return False
    takes_tensors = any("Tensor" in str(argument.type) for argument in schema.arguments)
    return takes_tensors or name in _FACTORIES


def draws_random_numbers(target: torch._ops.OpOverload, arguments: Mapping[str, Any]) -> bool:
    """Whether a call with these arguments, by name, draws random numbers: a dropout, or an LSTM with one, need not."""
    is_dropout = "dropout" in target._schema.name
    if torch.Tag.nondeterministic_seeded not in target.tags and not is_dropout:
        return False
    defaults = {entry.name: entry.default_value for entry in target._schema.arguments if entry.has_default_value()}
    given = {**defaults, **arguments}
    if any(given.get(name) is False for name in ("train", "training")):
        return False
    return all(given.get(name) != 0 for name in ("dropout_p", "dropout", *(("p",) if is_dropout else ())))


def operator_name(target: Any) -> str:
    """The name by which `find_operator` finds `target`.

    Raises:
        GraphError: GRAPH-001 where it is not on the allow-list.
    """
    known = (name for name, function in SIZE_FUNCTIONS.items() if function is target)
    name = next(known, str(target))
    find_operator(name)
    return name
