"""Values of the nodes that a mask rests on, for a choice of small sizes and inputs.

Numbers are kept in float32, whatever dtype the model's masks have: only their pattern counts.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, fx

from skink.graph.pattern import NoMatch, op_name
from skink.graph.propagate import expression

# What these are given is read for its shape: by op, the arguments' places.
_SHAPE_ONLY = {
    **dict.fromkeys(("zeros_like", "ones_like", "full_like", "empty_like"), 0),
    **dict.fromkeys(("new_zeros", "new_ones", "new_full", "new_empty"), 0),
    **dict.fromkeys(("expand_as", "view_as", "type_as"), 1),
}
# Numbers among their arguments are sizes, axes or scores, never a window.
_NO_WINDOW = frozenset(
    {"reshape", "view", "expand", "repeat", "unsqueeze", "squeeze", "permute", "transpose", "flatten", "cat", "stack"}
    | {"mul", "masked_fill", "where"}
)
# Numbers from here on mean "to the end".
_ENDLESS = 2**20
_HALF = (torch.bfloat16, torch.float16)

Values = Literal["ones", "padded", "counted", "random"]


class UnknownMaskError(Exception):
    """The mask cannot be evaluated, or is of no known kind; says why, and at which node."""

    def __init__(self, reason: str, node: fx.Node) -> None:
        super().__init__(reason)
        self.reason = NoMatch(reason, node)


class Evaluation:
    """Values of nodes for one choice of sizes and inputs.

    Args:
        sizes: of the symbols in shapes.
        given: what the inputs hold: all ones; padding on the left, on the right or nowhere from row to row; 0, 1, 2
            and so on; or anything below `length`, and what is in `likely`.
        length: of the sequences.
        turn: which row is padded how, and the seed.
        likely: numbers that inputs may be compared with.
    """

    def __init__(
        self,
        sizes: dict[Any, int],
        given: dict[fx.Node, Values],
        length: int,
        turn: int,
        likely: Sequence[int] = (),
    ) -> None:
        self.sizes = sizes
        self._likely = torch.tensor(
            sorted({0, *(near for number in likely for near in (number - 1, number, number + 1))})
        )
        self._values: dict[fx.Node, Any] = {}
        generator = torch.Generator().manual_seed(turn)
        self.inputs = {node: self._input(node, values, length, turn, generator) for node, values in given.items()}

    def size(self, dim: Any) -> int:
        """A size as a number."""
        known = expression(dim)
        return int(known.subs(self.sizes)) if hasattr(known, "subs") else int(known)

    def value(self, node: fx.Node) -> Any:
        """The value of `node`, found without recursion since graphs are deep."""
        pending = [node]
        while pending:
            current = pending[-1]
            missing = [source for source in read_by(current) if source not in self._values]
            if current in self._values or not missing:
                if current not in self._values:
                    self._values[current] = self._compute(current)
                pending.pop()
            else:
                pending.extend(missing)
        return self._values[node]

    def _compute(self, node: fx.Node) -> Any:
        fake = node.meta["val"]
        if not isinstance(fake, Tensor | tuple | list):
            return self.size(fake)
        if node.op == "placeholder":
            return self.inputs[node]
        if node.op == "get_attr":
            tensor = stored_tensor(node)
            if tensor.is_meta:
                raise UnknownMaskError(f"the mask rests on {node.target}, whose values are not loaded", node)
            return tensor.detach().cpu()

        def argument(source: fx.Node) -> Any:
            if source in self._values:
                return self._values[source]
            known = source.meta["val"]
            if not isinstance(known, Tensor):
                return self.size(known)
            return torch.zeros([self.size(dim) for dim in known.shape], dtype=known.dtype)

        if isinstance(fake, Tensor) and op_name(node) == "type_as":
            source = argument(node.args[0])  # type: ignore[arg-type]
            return source.float() if fake.is_floating_point() else source.to(fake.dtype)
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), argument)
        try:
            result = node.target(*args, **kwargs)  # type: ignore[operator]
        except (RuntimeError, IndexError, ValueError, TypeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UnknownMaskError(f"the mask could not be evaluated by itself: {reason}", node) from error
        return result.float() if isinstance(result, Tensor) and result.dtype in _HALF else result

    def _input(self, node: fx.Node, values: Values, length: int, turn: int, generator: torch.Generator) -> Tensor:
        fake = node.meta["val"]
        shape = [self.size(dim) for dim in fake.shape]
        if values == "counted" and shape:
            tensor = torch.arange(shape[-1]).expand(shape)
        elif values == "random":
            tensor = torch.randint(0, max(2, length), shape, generator=generator)
            chosen = self._likely[torch.randint(0, len(self._likely), shape, generator=generator)]
            tensor = torch.where(torch.rand(shape, generator=generator) < 0.5, tensor, chosen)
        else:
            tensor = torch.ones(shape)
            if values == "padded" and len(shape) == 2:
                amount = min(2, shape[1] - 1)
                for row in range(shape[0]):
                    if (row + turn) % 3 == 1:
                        tensor[row, :amount] = 0
                    elif (row + turn) % 3 == 2:
                        tensor[row, shape[1] - amount :] = 0
        return tensor.to(fake.dtype)


def read_by(node: fx.Node) -> list[fx.Node]:
    """The nodes whose values, and not only shapes, a node reads."""
    if not isinstance(node.meta.get("val"), Tensor | tuple | list) or node.op != "call_function":
        return []
    skipped = _SHAPE_ONLY.get(op_name(node))
    found: dict[fx.Node, None] = {}
    for place, argument in enumerate((*node.args, *node.kwargs.values())):
        if place != skipped:
            fx.map_arg(argument, lambda source: found.setdefault(source))
    return [source for source in found if isinstance(source.meta.get("val"), Tensor | tuple | list)]


def numbers_at(node: fx.Node) -> list[int]:
    """Numbers at a node that could be a window: among its arguments, or the size of a stored table."""
    if node.op == "get_attr":
        weight = stored_tensor(node)
        small = weight.numel() <= 16 and not weight.is_meta and bool(weight.isfinite().all())
        stored = [abs(math.ceil(value)) for value in weight.flatten().tolist()] if small else []
        return [size for size in weight.shape if size > 1] + [number for number in stored if number < _ENDLESS]
    if node.op != "call_function" or op_name(node) in _NO_WINDOW:
        return []
    values = [
        value
        for argument in (*node.args, *node.kwargs.values())
        for value in (argument if isinstance(argument, list | tuple) else (argument,))
    ]
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    # A division may be written as a product with what is less than one.
    numbers += [1 / value for value in numbers if isinstance(value, float) and 0 < abs(value) < 1]
    return [abs(math.ceil(value)) for value in numbers if abs(value) < _ENDLESS]


def stored_tensor(node: fx.Node) -> Tensor:
    owner = node.graph.owning_module
    if owner is None:
        raise TypeError("the graph has no module")
    path, _, leaf = str(node.target).rpartition(".")
    tensor: Tensor = getattr(owner.get_submodule(path), leaf)
    return tensor
