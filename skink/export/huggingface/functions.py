"""The functions behind a Skink model's forward: its graphs in the variants that calls ask for, made when first asked.

Variants: full sequence or step; with padding or without; logits of every token or of the last one only; for training
(only kernels that have gradients) or not, and then with everything kept for the backward pass or computed anew; state
handed in and out as tensors, or written into the cache's buffers.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from skink.errors import ModelError
from skink.export.huggingface.cache import StateBuffer
from skink.export.huggingface.recomputing import bind_in_regions
from skink.graph.emit import bind
from skink.graph.last_token import head_input, last_token_only
from skink.graph.program import Program, StateInput
from skink.graph.serialization import program_from_json, program_to_json
from skink.graph.state import counted_positions, derive_step, without_padding
from skink.passes.lower import lower

aten = torch.ops.aten
Function = Callable[..., Any]

# What a decoder's forward is given.
DECODER_INPUTS = ("input_ids", "attention_mask", "position_ids")


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
    recompute: bool = False


class Functions:
    """The functions of one program, which take the module tree that holds its weights: `function(tree, *inputs)`.

    Inputs are the program's, in order; a step's are followed by its state, and its results by the new state.

    Args:
        program: the full-sequence graph.
        known: the inputs that the model's forward can give it.

    Raises:
        ModelError: MODEL-005 where it takes something else.
    """

    def __init__(self, program: Program, known: tuple[str, ...] = DECODER_INPUTS) -> None:
        self.program = program.with_dtype(program.dtype, shapes_only=True)
        self.inputs = tuple(entry.name for entry in program.inputs)
        self.known = known
        others = [name for name in self.inputs if name not in known]
        if others:
            raise ModelError(
                "MODEL-005",
                f"the graph takes {', '.join(others)}, which this kind of model is not given.",
                why=f"it is given {', '.join(known)}.",
                fix="export it with skink.export_onnx, or run program.module().",
            )
        self.counts = bool(counted_positions(self.program))
        self.bound: dict[Variant, Function] = {}
        self._graphs: dict[tuple[bool, torch.dtype], Program] = {}
        self._lowered: dict[Variant, tuple[Program, fx.Node]] = {}
        self._lock = threading.RLock()

    def get(self, variant: Variant) -> Function:
        """The function for `variant`."""
        function = self.bound.get(variant)
        if function is None:
            with self._lock:
                make_function = bind_in_regions if variant.recompute else bind
                function = self.bound.setdefault(variant, make_function(self._prepared(variant)))
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
                full = self.program.with_dtype(dtype, shapes_only=True)
                self._graphs[key] = derive_step(full) if step else full
            return self._graphs[key]

    def _prepared(self, variant: Variant) -> Program:
        # Kernels are chosen once for both forms: leaving out tokens at the end changes no choice.
        key = replace(variant, last_only=False, in_place=False, recompute=False)
        if key not in self._lowered:
            program = self._graph(step=variant.step, dtype=variant.dtype)
            if not variant.padded:
                program = without_padding(program)
            cut = head_input(program)
            lowered, _ = lower(
                program, device=variant.device, dtype=variant.dtype, training=variant.training, keep=[cut]
            )
            self._lowered[key] = lowered, next(node for node in lowered.graph.nodes if node.name == cut.name)
        lowered, node = self._lowered[key]
        ready = last_token_only(lowered, node) if variant.last_only else lowered
        return state_in_place(ready) if variant.in_place else ready

    # Graphs never change here, so that copies of a model share them; a pickle holds the graph alone.
    def __deepcopy__(self, memo: dict[int, Any]) -> "Functions":
        return self

    def __reduce__(self) -> tuple[Callable[..., "Functions"], tuple[Any, ...]]:
        return _restore, (program_to_json(self.program), self.known)


def _restore(data: dict[str, Any], known: tuple[str, ...]) -> Functions:
    return Functions(program_from_json(data), known)


@torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]
def make(functions: Functions, *variant: Any) -> bool:
    """Makes a function while torch.compile traces a model, which must not trace the making."""
    functions.get(Variant(*variant))
    return True


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
