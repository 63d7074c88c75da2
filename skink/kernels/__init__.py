"""The ops of the `skink::` namespace: one folder each, listed here."""

from skink.kernels.attention import OP as ATTENTION
from skink.kernels.experts import OP as EXPERTS
from skink.kernels.opdef import Cost, OpCall, OpDef, StateSpec, StateTensor, Tolerance, Variant
from skink.kernels.rms_norm import OP as RMS_NORM
from skink.kernels.rotary import OP as ROTARY

OPS: tuple[OpDef, ...] = (ATTENTION, EXPERTS, RMS_NORM, ROTARY)


def find_op(target: object) -> OpDef | None:
    """The definition behind a graph node's target, or None where the target is no op of ours."""
    return _BY_TARGET.get(target)


_BY_TARGET: dict[object, OpDef] = {op.overload: op for op in OPS}

__all__ = [
    "ATTENTION",
    "EXPERTS",
    "OPS",
    "RMS_NORM",
    "ROTARY",
    "Cost",
    "OpCall",
    "OpDef",
    "StateSpec",
    "StateTensor",
    "Tolerance",
    "Variant",
    "find_op",
]
