"""The ops of the `skink::` namespace: one folder each, listed here."""

from skink.kernels.attention import OP as ATTENTION
from skink.kernels.experts import OP as EXPERTS
from skink.kernels.low_rank_linear import OP as LOW_RANK_LINEAR
from skink.kernels.opdef import Cost, OpCall, OpDef, StateSpec, StateTensor, Tolerance, Variant
from skink.kernels.pivoted_linear import OP as PIVOTED_LINEAR
from skink.kernels.rms_norm import OP as RMS_NORM
from skink.kernels.rotary import OP as ROTARY

OPS: tuple[OpDef, ...] = (ATTENTION, EXPERTS, LOW_RANK_LINEAR, PIVOTED_LINEAR, RMS_NORM, ROTARY)


def find_op(target: object) -> OpDef | None:
    """The definition behind a graph node's target, or None where the target is no op of ours."""
    return _BY_TARGET.get(target)


_BY_TARGET: dict[object, OpDef] = {op.overload: op for op in OPS}

__all__ = [
    "ATTENTION",
    "EXPERTS",
    "LOW_RANK_LINEAR",
    "OPS",
    "PIVOTED_LINEAR",
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
