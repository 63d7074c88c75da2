"""What an op of the `skink::` namespace is: one `OpDef` says everything that the compiler asks about it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from skink.kernels.cpp.library import library
from skink.settings import settings

_LIBRARY = torch.library.Library("skink", "DEF")  # lives as long as the process: PyTorch drops ops with their library


@dataclass(frozen=True)
class Tolerance:
    """Largest difference allowed between a kernel and the float64 reference: `absolute + relative * |reference|`."""

    absolute: float
    relative: float


@dataclass(frozen=True)
class Cost:
    """What one call costs: multiply-accumulates, and bytes that must cross the memory bus once."""

    macs: int
    bytes: int


@dataclass(frozen=True)
class OpCall:
    """A call that a kernel may be asked to serve: arguments as fake or real tensors, and the device."""

    arguments: Mapping[str, Any]
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first tensor argument."""
        for value in self.arguments.values():
            if isinstance(value, Tensor):
                return value.dtype
        raise TypeError("a call without tensors has no dtype")


@dataclass(frozen=True)
class Variant:
    """One kernel of an op.

    Args:
        name: what users see: `reference`, `torch`, `cpp`, `triton`.
        load: returns the callable (same arguments as the op); imports what it needs only when called.
        supports: None where the kernel serves the call, otherwise the reason why not. Total: it never raises.
        differentiable: whether gradients flow through it.
    """

    name: Literal["reference", "torch", "cpp", "triton"]
    load: Callable[[], Callable[..., Tensor]]
    supports: Callable[[OpCall], str | None]
    differentiable: bool = False


Growth = Literal["append", "ring", "fixed"]


@dataclass(frozen=True)
class StateTensor:
    """One tensor that an op carries from step to step.

    Args:
        name: its name within the layer: `key`, `value`.
        argument: the op's argument that feeds it.
        growth: `append` grows with every token, `ring` keeps the last `limit`, `fixed` keeps its shape.
        limit: for `ring`, how many of the last tokens are kept.
    """

    name: str
    argument: str
    growth: Growth
    limit: int = 0


@dataclass(frozen=True)
class StateSpec:
    """How an op that mixes tokens is stepped.

    Args:
        tensors: the tensors it carries, given the call's arguments by name.
        axis: the token axis of every state tensor.
        refuses: why a call with these arguments cannot be stepped, or None.
    """

    tensors: Callable[[Mapping[str, Any]], tuple[StateTensor, ...]]
    axis: int
    refuses: Callable[[Mapping[str, Any]], str | None] = lambda arguments: None


@dataclass(frozen=True)
class OpDef:
    """A semantic op: its meaning, its kernels, what it costs and what it remembers.

    Args:
        name: name within `skink::`.
        schema: PyTorch schema without the namespace.
        reference: plain torch, differentiable, written to be read; the op's meaning, and its implementation wherever
            no kernel is bound (it is registered as composite, so autograd, fake tensors and `torch.compile` see
            through it).
        fake: an empty tensor of the result's shape and dtype, for shape propagation without the reference's own ops.
        variants: kernels in order of preference; the reference is always last and always there.
        tolerance: per dtype.
        cost: (arguments by name, as fake tensors) → Cost.
        state: for ops that mix tokens, otherwise None.
    """

    name: str
    schema: str
    reference: Callable[..., Tensor]
    fake: Callable[..., Tensor]
    tolerance: Mapping[torch.dtype, Tolerance]
    cost: Callable[[Mapping[str, Any]], Cost]
    variants: tuple[Variant, ...] = ()
    state: StateSpec | None = None

    def __post_init__(self) -> None:
        _LIBRARY.define(self.schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(self.name, self.reference, "CompositeImplicitAutograd")

    @property
    def overload(self) -> torch._ops.OpOverload:
        """The op as it stands in graphs, `torch.ops.skink.<name>.default`."""
        packet = getattr(torch.ops.skink, self.name)
        overload: torch._ops.OpOverload = packet.default
        return overload

    def choose(self, call: OpCall, *, training: bool = False) -> tuple[Variant | None, tuple[tuple[str, str], ...]]:
        """The first kernel that serves `call`, None for the reference; and those before it, each with its reason.

        Args:
            call: its arguments, fake or real.
            training: take only kernels that gradients flow through.
        """
        if settings().kernels == "reference":
            return None, (("all", "SKINK_KERNELS=reference"),)
        refused: list[tuple[str, str]] = []
        for variant in self.variants:
            reason = "has no gradient" if training and not variant.differentiable else variant.supports(call)
            if reason is None:
                return variant, tuple(refused)
            refused.append((variant.name, reason))
        return None, tuple(refused)

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """All arguments by name, defaults filled in."""
        bound: dict[str, Any] = {}
        for index, argument in enumerate(self.overload._schema.arguments):
            if index < len(args):
                bound[argument.name] = args[index]
            else:
                bound[argument.name] = kwargs.get(argument.name, argument.default_value)
        return bound


def nbytes(*tensors: Any) -> int:
    """Bytes of the tensors among the arguments; symbolic sizes count at their hint."""
    return sum(int(value.numel()) * value.element_size() for value in tensors if isinstance(value, Tensor))


def cpp_variant(
    name: str,
    supports: Callable[[OpCall], str | None],
    load: Callable[[], Callable[..., Tensor]] | None = None,
) -> Variant:
    """The compiled CPU kernel `skink_cpp::<name>`, refused where the library is not built or the call is not its kind.

    The kernels read float32, bfloat16 and float16 on the CPU and have no backward. `load` takes
    the place of the kernel itself where another should serve some calls.
    """

    def load_op() -> Callable[..., Tensor]:
        library()
        overload: Callable[..., Tensor] = getattr(torch.ops.skink_cpp, name).default
        return overload

    def check(call: OpCall) -> str | None:
        if call.device.type != "cpu":
            return f"runs on cpu, not on {call.device.type}"
        if call.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"reads float32, bfloat16 and float16, not {str(call.dtype).removeprefix('torch.')}"
        loaded = library()
        return supports(call) if loaded.available else loaded.reason

    return Variant("cpp", load or load_op, check)
