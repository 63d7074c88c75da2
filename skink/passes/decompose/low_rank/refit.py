"""Fit factors anew to what compressed layers before them really deliver.

With x what a layer reads in the dense model and x' what it reads in the compressed one, the loss of a layer's outputs
at given `up` is least for

    down' = (up^T G up)^-1 up^T G W C_xx' C_x'x'^-1 = down C_xx' C_x'x'^-1        C_xx' = sum over tokens of x x'^T

since `down` of two-sided factors is (up^T G up)^-1 up^T G W already: it reads the dense x, as well as x' can tell it.
Layers go in the order of what they read, each after those that this depends on are fitted. A ridge, added to the
diagonals of both, draws what the text says little about to down' = down. Where tokens are few for the features, how
large it is, or whether to fit at all, is told by the text: what is fitted to one half of it has to read the other half
better (two-fold cross-validation, Stone 1974).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, fx

from skink.graph.calibration import counted_rows, real_tokens, token_batches
from skink.graph.passes import Context, linear_weight
from skink.graph.program import Program
from skink.graph.regions import inputs_of, plan_region, run_plan

# The ridge where there are at least so many tokens for each feature, as a share of the mean diagonal of C_x'x'. There
# the errors of single layers, which are all that cross-validation sees, say too little about the model's.
_RIDGE, _PLENTY = 1e-3, 16
# Ridges that are tried where there are fewer, likewise of one half of the text.
_RIDGES = (1e-3, 1e-2, 1e-1, 1.0)
_ROUNDING = 1e-9
# Tokens of calibration text that are read: at least so many, and so many for each feature of the widest input. The
# values that later layers read are kept for all of them.
_TOKENS = 2**14
_TOKENS_PER_FEATURE = 8


def refit(dense: Program, program: Program, replaced: Mapping[str, str], context: Context) -> tuple[int, int]:
    """Fit the first factors of `program`, in place of its weights; returns how many, and how many were looked at.

    Args:
        dense: the program as it was.
        program: with factors in the place of some weights.
        replaced: the name of each first factor -> the name of a dense weight that read the same.
        context: its calibration text.
    """
    windows = context.calibration_for("refit")
    pairs = _inputs(dense, program, replaced)
    width = max((program.weight(name).shape[1] for name, _, _ in pairs), default=0)
    picked = spread_windows(windows, context.padding, max(_TOKENS, _TOKENS_PER_FEATURE * width))
    padding = None if context.padding is None else context.padding[picked]
    batches = token_batches(dense, windows[picked], padding=padding)
    counted = [real_tokens(batch) for batch in batches]
    sizes = [len(next(iter(batch.values()))) for batch in batches]
    starts = list(accumulate(sizes, initial=0))
    before = _Stepwise(dense, batches, [one for _, one, _ in pairs])
    after = _Stepwise(program, batches, [two for _, _, two in pairs])
    changed = 0
    read, halves = None, _no_text(0)
    for name, one, two in pairs:
        down = program.weight(name)
        # Layers that read one input, as q, k and v, are told the same by it.
        if read != (one, two):
            read, halves = (one, two), _no_text(down.shape[1], down.device)
            for index, real in enumerate(counted):
                exact, delivered = before.value(one, index), after.value(two, index)
                rows = counted_rows(exact, real)
                x, y = (value.reshape(-1, value.shape[-1]) for value in (exact, delivered))
                second = _in_second_half(x, starts[index], len(picked), sizes[index])
                for half, part in zip(halves, (~second, second), strict=True):
                    chosen = part if rows is None else part & rows
                    half.add(x[chosen], y[chosen])
        found = fitted(down, *halves)
        if found is not None:
            program.set_weight(name, found, buffer=name in program.buffers)
            changed += 1
    return changed, len(pairs)


def _in_second_half(rows: Tensor, start: int, windows: int, here: int) -> Tensor:
    """Which rows [N, in] of a batch are of the text's second half: those of every other window, bool[N].

    Halves do not hang on how windows fall into batches, and no window lies in both, unless there is one.

    Args:
        rows: as many of each window.
        start: windows in earlier batches.
        windows: in all batches.
        here: in this one.
    """
    place = torch.arange(len(rows), device=rows.device)
    if windows == 1 or len(rows) % here:
        return place >= len(rows) // 2
    return (place // (len(rows) // here) + start) % 2 == 1


def spread_windows(windows: Tensor, padding: Tensor | None, tokens: int) -> Tensor:
    """Indices of windows, evenly spread, that hold about so many tokens that are no padding; all where there are fewer.

    Args:
        windows: int64[N, T], or N examples of what a program's one input takes.
        padding: int64[N, T], 1 for text and 0 for padding; None: all is text.
        tokens: > 0.
    """
    count = len(windows)
    if padding is not None:
        held = int((padding != 0).sum())
    else:
        held = windows[..., 0].numel() if windows.is_floating_point() else windows.numel()
    wanted = min(count, math.ceil(tokens * count / max(1, held)))
    return torch.linspace(0, count - 1, wanted).round().long()


@dataclass
class Half:
    """What half of the text says of an input: the second moments of x with x' and of x' with itself.

    Args:
        cross: float64[in, in], the sum of x x'^T.
        own: float64[in, in], the sum of x' x'^T.
        tokens: how many.
    """

    cross: Tensor
    own: Tensor
    tokens: int = 0

    def add(self, exact: Tensor, delivered: Tensor) -> None:
        """Count tokens: both [N, in]."""
        x, y = exact.double(), delivered.double()
        self.cross.addmm_(x.mT, y)
        self.own.addmm_(y.mT, y)
        self.tokens += len(y)

    def error(self, down: Tensor, read: Tensor) -> float:
        """The sum of (read x' - down x)^2, less what does not depend on `read`: all float64."""
        return float(((read @ self.own - 2.0 * (down @ self.cross)) * read).sum())


def fitted(down: Tensor, first: Half, second: Half) -> Tensor | None:
    """down C_xx' C_x'x'^-1 in the dtype of `down` [R, in]; None where little text does not help itself."""
    exact = down.double()
    if first.tokens + second.tokens >= _PLENTY * down.shape[1]:
        ridge: float | None = _RIDGE * float((first.own + second.own).diagonal().mean())
    else:
        ridge = _validated(exact, first, second)
    if ridge is None:
        return None
    read = _read(exact, first.cross + second.cross, first.own + second.own, ridge)
    return None if read is None else read.to(down.dtype).contiguous()


def _validated(exact: Tensor, first: Half, second: Half) -> float | None:
    """The ridge with which each half reads the other best; None where no fit at all does."""
    best, ridge = first.error(exact, exact) + second.error(exact, exact), None
    # What cannot be told from rounding is no gain.
    best -= _ROUNDING * abs(best)
    for share in _RIDGES:
        shift = share * 0.5 * float((first.own + second.own).diagonal().mean())
        reads = [_read(exact, half.cross, half.own, shift) for half in (first, second)]
        if reads[0] is None or reads[1] is None:
            continue
        error = second.error(exact, reads[0]) + first.error(exact, reads[1])
        if error < best:
            best, ridge = error, shift
    return ridge


def _read(down: Tensor, cross: Tensor, own: Tensor, shift: float) -> Tensor | None:
    """down (C_xx' + shift) (C_x'x' + shift)^-1; None where that is no positive definite matrix."""
    damped, target = own.clone(), cross.clone()
    damped.diagonal().add_(shift)
    target.diagonal().add_(shift)
    lower, failed = torch.linalg.cholesky_ex(damped)
    return None if failed or not shift > 0 else torch.cholesky_solve((down @ target).mT, lower).mT


def _no_text(features: int, device: torch.device | None = None) -> tuple[Half, Half]:
    zeros = [torch.zeros(features, features, dtype=torch.float64, device=device) for _ in range(4)]
    return Half(zeros[0], zeros[1]), Half(zeros[2], zeros[3])


def _inputs(dense: Program, program: Program, replaced: Mapping[str, str]) -> list[tuple[str, fx.Node, fx.Node]]:
    """(factor, what the dense weight reads, what the factor reads) for factors with one reader, by where the last is.

    So whatever it depends on is fitted before, and where layers stand side by side nothing is computed twice.
    """
    readers: dict[str, list[fx.Node]] = {}
    for node in dense.graph.nodes:
        name = linear_weight(dense, node)
        if name is not None:
            readers.setdefault(name, []).append(node)
    found = []
    for node in program.graph.nodes:
        factor = linear_weight(program, node)
        if factor is not None and factor in replaced and len(readers[replaced[factor]]) == 1:
            found.append((factor, readers[replaced[factor]][0].all_input_nodes[0], node.all_input_nodes[0]))
    order = {node: index for index, node in enumerate(program.graph.nodes)}
    return sorted(found, key=lambda entry: order[entry[2]])


class _Stepwise:
    """A program run up to one node after the other, all batches each time; weights may change in between.

    Args:
        program: what is run; its graph stays as it is.
        batches: inputs by name.
        stops: nodes in the graph's order.
    """

    def __init__(self, program: Program, batches: Sequence[Mapping[str, Tensor]], stops: Sequence[fx.Node]) -> None:
        self._program = program
        self._inputs = inputs_of(program, batches)
        self._live: list[dict[fx.Node, object]] = [{} for _ in self._inputs]
        order = {node: index for index, node in enumerate(program.graph.nodes)}
        needed = {node for node, _ in plan_region(program.graph, stops, ())}
        self._last = {node: max([order[user] for user in node.users if user in needed], default=-1) for node in needed}
        self._order = order
        self._at: list[fx.Node | None] = [None for _ in self._inputs]

    def value(self, stop: fx.Node, batch: int) -> Tensor:
        """The value of a node, which is the last one asked for or after it."""
        inputs, live = self._inputs[batch], self._live[batch]
        if self._at[batch] is not stop:
            results = {stop} | {
                node
                for node, last in self._last.items()
                if node.op == "call_function" and self._order[node] <= self._order[stop] < last
            }
            plan = plan_region(self._program.graph, results, live)
            live = self._live[batch] = run_plan(self._program, plan, {**inputs, **live}, results)
            self._at[batch] = stop
        value = live[stop]
        if not isinstance(value, Tensor):
            raise RuntimeError(f"{stop.name} is no tensor")
        return value
