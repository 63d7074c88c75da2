"""One layer of the original, and what has become of it in the program, run and trained on the original's values.

    loss = sum over tokens of |y' - y|^2 / (sum over tokens of |y - x|^2 / tokens)

x is what the original's layer receives, y what it hands on, y' what the program's layer makes of the same x. |y - x| is
what the layer changes: the residual stream that runs past it is far larger and would drown every error. So 0 is the
original's layer, and 1 a layer that does nothing. For attention outputs, and where y has not the shape of x, the
measure is |y| itself.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from skink.graph.calibration import counted_rows
from skink.graph.program import Program
from skink.graph.regions import plan_region, run_plan
from skink.training.layerwise.pieces import Piece
from skink.training.loop.breakdown import damaged
from skink.training.loop.options import Precision


@dataclass(frozen=True)
class Target:
    """One value that a layer is held to.

    Args:
        teacher: the original's.
        student: the program's.
        kind: which term of the loss it belongs to, 0 for `hidden`, 1 for `attention`.
        share: of that term; the shares of one kind add up to 1.
        change: its place among the values that the layer receives, where it is one of these, changed; otherwise None.
    """

    teacher: fx.Node
    student: fx.Node
    kind: int
    share: float
    change: int | None = None


def hidden_targets(piece: Piece) -> list[Target]:
    """What the piece hands on, less what only passes by."""
    pairs = [
        (one, two)
        for one, two in zip(piece.end.teacher, piece.end.student, strict=True)
        if one not in piece.begin.teacher and one.meta["val"].is_floating_point()
    ]
    return [Target(one, two, 0, 1 / len(pairs), _changed(piece, one)) for one, two in pairs]


def targets_among(
    original: Program, piece: Piece, pairs: Sequence[tuple[fx.Node, fx.Node]], kind: Literal[0, 1]
) -> list[Target]:
    """Those of corresponding (original's, program's) values that lie in the piece: all of one kind, see `Target`."""
    inside = {node for node, _ in plan_region(original.graph, piece.end.teacher, piece.begin.teacher)}
    here = [(one, two) for one, two in pairs if one in inside]
    return [Target(one, two, kind, 1 / len(here), None if kind else _changed(piece, one)) for one, two in here]


def reaching(program: Program, piece: Piece, targets: Sequence[Target]) -> Piece:
    """The piece with those of its trained weights that the targets depend on."""
    plan = plan_region(program.graph, [target.student for target in targets], piece.begin.student)
    read = {str(node.target) for node, _ in plan if node.op == "get_attr"}
    return replace(piece, trained=tuple(name for name in piece.trained if name in read))


def _changed(piece: Piece, node: fx.Node) -> int | None:
    """Which of the values that the piece receives it hands on as `node`."""
    entry, exit_ = piece.begin.teacher, piece.end.teacher
    alike = [_shape(one) for one in entry] == [_shape(one) for one in exit_]
    return exit_.index(node) if alike and node in exit_ else None


class Half:
    """One program's part of a piece, to be run on batches.

    Args:
        program: whose part.
        entry: the values that come in.
        results: the values that are wanted.
        weight: the tensor of a weight, by name; asked once for each.
    """

    def __init__(
        self,
        program: Program,
        entry: Sequence[fx.Node],
        results: Sequence[fx.Node],
        weight: Callable[[str], Tensor],
    ) -> None:
        self._program, self._entry, self._results = program, tuple(entry), tuple(results)
        self._placeholders = dict(
            zip((given.name for given in program.inputs), program.graph.find_nodes(op="placeholder"), strict=True)
        )
        reads = [node for node, _ in plan_region(program.graph, self._results, self._entry) if node.op == "get_attr"]
        tensors = {str(node.target): weight(str(node.target)) for node in reads}
        self._weights = {node: tensors[str(node.target)] for node in reads}
        self._plan = plan_region(program.graph, self._results, {*self._entry, *reads})

    def run(self, inputs: Mapping[str, Tensor], entry: Sequence[Tensor], *, training: bool = False) -> list[Any]:
        """The results, in order.

        Args:
            inputs: the program's, by name.
            entry: the values that come in.
            training: let gradients flow.
        """
        values: dict[fx.Node, Any] = {self._placeholders[name]: value for name, value in inputs.items()}
        values.update(self._weights)
        values.update(zip(self._entry, entry, strict=True))
        found = run_plan(self._program, self._plan, values, self._results, training=training)
        return [found[node] for node in self._results]


def weights_for(program: Program, precision: Precision) -> Callable[[str], Tensor]:
    """How frozen weights are read: with precision float32 all but buffers are float32, otherwise as they are."""

    def weight(name: str) -> Tensor:
        tensor = program.weight(name).detach()
        wide = precision == "float32" and tensor.is_floating_point() and name not in program.buffers
        return tensor.float() if wide else tensor

    return weight


class Layer:
    """A layer in training, with float32 weights of its own.

    Args:
        original: runs as it is, without gradients.
        program: its part is trained; its own tensors are left alone.
        piece: which part.
        targets: what it is held to, one at least.
        precision: what the program's products are computed in; the original's have float32 or the dtype of its weights.

    Attributes:
        weights: those that train, float32 by name.
    """

    def __init__(
        self, original: Program, program: Program, piece: Piece, targets: Sequence[Target], precision: Precision
    ) -> None:
        self.piece, self._targets, self._precision = piece, targets, precision
        self._original, self._program = original, program
        self.weights = {
            name: nn.Parameter(program.weight(name).detach().to(torch.float32, copy=True)) for name in piece.trained
        }
        frozen = weights_for(program, precision)
        # What the next layer receives stands first.
        wanted = (*piece.end.teacher, *(target.teacher for target in targets))
        self._teacher = Half(original, piece.begin.teacher, wanted, weights_for(original, precision))
        made = [target.student for target in targets]
        self._student = Half(
            program,
            piece.begin.student,
            made,
            lambda name: self.weights[name] if name in self.weights else frozen(name),
        )

    def begin_again(self) -> None:
        """Give the weights that train the values that they had at first."""
        for name, weight in self.weights.items():
            weight.data.copy_(self._program.weight(name))

    def damaged(self) -> str:
        """Which weight is the first that was not finite before training, a sentence; empty where all were."""
        made = [target.student for target in self._targets]
        return damaged(_read(self._original, self.piece.end.teacher, ()), "the teacher's") or damaged(
            _read(self._program, made, self.piece.begin.student)
        )

    def exact(self, inputs: Mapping[str, Tensor], entry: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The original's values: what the next layer receives, and what the program's layer is held to."""
        found = self._teacher.run(inputs, entry)
        count = len(self.piece.end.teacher)
        return found[:count], found[count:]

    def squares(
        self,
        inputs: Mapping[str, Tensor],
        entry: Sequence[Tensor],
        exact: Sequence[Tensor],
        real: Tensor | None,
        *,
        training: bool = False,
    ) -> Tensor:
        """Of each target, the sum of |y' - y|^2 over the tokens that count: float32[targets].

        Args:
            inputs: the program's, by name.
            entry: what the original's layer receives.
            exact: what it makes of that, see `exact`.
            real: bool[B, T], which tokens count; None: all.
            training: let gradients flow.
        """
        dtype = None if self._precision == "float32" else getattr(torch, self._precision)
        with torch.autocast(exact[0].device.type, dtype, enabled=dtype is not None):
            made = self._student.run(inputs, entry, training=training)
        return torch.stack([_square(one, two, real) for one, two in zip(made, exact, strict=True)])

    def sizes(self, entry: Sequence[Tensor], exact: Sequence[Tensor], real: Tensor | None) -> Tensor:
        """Of each target, the sum of what its errors are measured against: float64[targets]."""
        bases = [None if target.change is None else entry[target.change] for target in self._targets]
        return torch.stack([_square(y, x, real).double() for y, x in zip(exact, bases, strict=True)])

    def factors(self, sizes: Tensor, tokens: int) -> Tensor:
        """What turns squares into the relative error of each kind, summed over tokens: float32[2, targets].

        Args:
            sizes: see `sizes`.
            tokens: over how many they were summed.
        """
        # A layer that changes nothing at all has no measure; its errors count as they are.
        measures = torch.where(sizes > 0, sizes / tokens, 1.0)
        result = torch.zeros(2, len(sizes), device=sizes.device)
        for index, target in enumerate(self._targets):
            result[target.kind, index] = target.share / measures[index]
        return result


def _read(program: Program, results: Sequence[fx.Node], entry: Sequence[fx.Node]) -> Iterator[tuple[str, Tensor]]:
    """The weights that results depend on, buffers aside, which may hold a mask."""
    names = [str(node.target) for node, _ in plan_region(program.graph, results, entry) if node.op == "get_attr"]
    return ((name, program.weight(name)) for name in names if name not in program.buffers)


def _square(one: Tensor, two: Tensor | None, real: Tensor | None) -> Tensor:
    """|one - two|^2, or |one|^2, over the tokens that count, in float32."""
    difference = one.float() if two is None else one.float() - two.float()
    rows = counted_rows(difference, real)
    difference = difference.reshape(-1, difference.shape[-1])
    if rows is not None:
        # Not times 0, which would not be 0 where padding holds NaN.
        difference = difference.masked_fill(~rows[:, None], 0.0)
    return difference.square().sum()


def _shape(node: fx.Node) -> list[str]:
    return [str(size) for size in node.meta["val"].shape]
