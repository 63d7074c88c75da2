"""The functions behind a Skink model's forward: its graphs in the variants that calls ask for, made when first asked.

Variants: full sequence or step; with padding or without; logits of every token or of the last one only; for training
(only kernels that have gradients) or not; state handed in and out as tensors, or written into the cache's buffers.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from skink.export.huggingface.cache import StateBuffer
from skink.graph.emit import bind
from skink.graph.program import Program, StateInput
from skink.graph.serialization import program_from_json, program_to_json
from skink.graph.state import derive_step, without_padding
from skink.kernels import RMS_NORM
from skink.passes.lower import lower

aten = torch.ops.aten
Function = Callable[..., Any]

# What may lie between the last layer and the logits and treats every token alike.
_TOKENWISE = frozenset(
    {
        RMS_NORM.overload,
        aten.layer_norm.default,
        aten.mul.Tensor,
        aten.div.Tensor,
        aten.mul.Scalar,
        aten.div.Scalar,
        aten.tanh.default,
        aten.to.dtype,
        aten.type_as.default,
        aten.alias.default,
    }
)


@dataclass(frozen=True)
class Variant:
    """Which function is asked for."""

    step: bool
    padded: bool
    last_only: bool
    training: bool
    in_place: bool
    dtype: torch.dtype
    device: str


class Functions:
    """The functions of one program, which take the module tree that holds its weights: `function(tree, *inputs)`.

    Inputs are the program's, in order; a step's are followed by its state, and its results by the new state.
    """

    def __init__(self, program: Program) -> None:
        self.program = without_weights(program, program.dtype)
        self.bound: dict[Variant, Function] = {}
        self._graphs: dict[tuple[bool, torch.dtype], Program] = {}
        self._lowered: dict[Variant, tuple[Program, fx.Node]] = {}
        self._lock = threading.RLock()

    def get(self, variant: Variant) -> Function:
        """The function for `variant`."""
        function = self.bound.get(variant)
        if function is None:
            with self._lock:
                function = self.bound.setdefault(variant, bind(self._prepared(variant)))
        return function

    def grows(self, dtype: torch.dtype) -> bool:
        """Whether all that the step graph remembers are tokens, put one behind the other."""
        return all(state.growth in ("append", "ring") for state in self.state(dtype))

    def state(self, dtype: torch.dtype) -> tuple[StateInput, ...]:
        """What the step graph remembers."""
        return self._graph(step=True, dtype=dtype).state

    def _graph(self, *, step: bool, dtype: torch.dtype) -> Program:
        with self._lock:
            key = (step, dtype)
            if key not in self._graphs:
                full = without_weights(self.program, dtype)
                self._graphs[key] = derive_step(full) if step else full
            return self._graphs[key]

    def _prepared(self, variant: Variant) -> Program:
        # Kernels are chosen once for both forms: leaving out tokens at the end changes no choice.
        key = replace(variant, last_only=False, in_place=False)
        if key not in self._lowered:
            program = self._graph(step=variant.step, dtype=variant.dtype)
            if not variant.padded:
                program = without_padding(program)
            cut = head_input(program)
            lowered, _ = lower(program, device=variant.device, dtype=variant.dtype, training=variant.training)
            self._lowered[key] = lowered, list(lowered.graph.nodes)[list(program.graph.nodes).index(cut)]
        lowered, node = self._lowered[key]
        ready = last_token_only(lowered, node) if variant.last_only else lowered
        return state_in_place(ready) if variant.in_place else ready

    # Graphs never change here, so that copies of a model share them; a pickle holds the graph alone.
    def __deepcopy__(self, memo: dict[int, Any]) -> "Functions":
        return self

    def __reduce__(self) -> tuple[Callable[..., "Functions"], tuple[Any, ...]]:
        return _restore, (program_to_json(self.program),)


def _restore(data: dict[str, Any]) -> Functions:
    return Functions(program_from_json(data))


def without_weights(program: Program, dtype: torch.dtype) -> Program:
    """A copy of the graph whose weights have shapes and no values; trained ones are of `dtype`."""
    clone = program.clone()
    for name, tensor in list(clone.weights()):
        trained = name not in clone.buffers and tensor.is_floating_point()
        empty = torch.empty(tensor.shape, dtype=dtype if trained else tensor.dtype, device="meta")
        clone.set_weight(name, empty, buffer=name in clone.buffers)
    return clone


def head_input(program: Program) -> fx.Node:
    """The node [B, T, ...] after which every token is treated by itself, up to the logits [B, T, V]."""
    node: fx.Node = program.graph.output_node().args[0][0]  # type: ignore[index, assignment]
    while node.target is aten.linear.default or node.target in _TOKENWISE:
        below = node.args[0]
        alone = all(other is below or other.op == "get_attr" for other in node.all_input_nodes)
        if not isinstance(below, fx.Node) or not alone or len(below.users) != 1:
            break
        node = below
    return node


def last_token_only(program: Program, cut: fx.Node) -> Program:
    """The program with logits [B, 1, V] of the last token; what comes after `cut` is not computed for the others."""
    clone = program.clone()
    before = list(clone.graph.nodes)[list(program.graph.nodes).index(cut)]
    with clone.graph.inserting_after(before):
        last = clone.graph.call_function(aten.slice.Tensor, (before, 1, -1, torch.iinfo(torch.int64).max))
    before.replace_all_uses_with(last, delete_user_cb=lambda user: user is not last)
    clone.graph_module.recompile()
    return clone


def state_in_place(program: Program) -> Program:
    """The step program with each state input a `StateBuffer` that the graph extends; new state is not returned.

    joined = cat(past, new)   becomes   joined = extend(past, new)
    """
    clone = program.clone()
    inputs = clone.graph.find_nodes(op="placeholder")[-len(clone.state) :]
    for past in inputs:
        (joined,) = past.users
        new = joined.args[0][1]
        joined.target, joined.args = extend, (past, new)
    output = clone.graph.output_node()
    output.args = (output.args[0][: len(clone.outputs)],)  # type: ignore[index]
    clone.state = ()
    clone.graph_module.recompile()
    return clone


def extend(buffer: StateBuffer, new: Tensor) -> Tensor:
    """Past and new tokens, after the new ones are written into the buffer."""
    return buffer.extend(new)
