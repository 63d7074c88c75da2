"""Statistics of a program's activations over calibration text.

    C = sum over tokens of x x^T,   x: the input of a linear layer

C is accumulated in float64, from products of float64 numbers: activations of language models span so many orders of
magnitude that a float32 sum loses the small directions, which are the ones that truncation decides about. Layers that
read one input (q, k and v; gate and up) share one C.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from skink.errors import CalibrationError
from skink.graph.passes import Progress, linear_weight
from skink.graph.program import Input, Program
from skink.graph.regions import run_regions
from skink.graph.rewriter import describe

# Columns of one strip of C. Only strips from the diagonal on are computed, which saves near half of the arithmetic.
_STRIP = 256
# Most numbers of the float64 copy of activations: 64 MiB.
_CHUNK = 2**23


@dataclass(frozen=True)
class Covariance:
    """Second moments of a layer's inputs, not centred.

    Args:
        total: float64[in, in], the sum of x x^T over all tokens.
        tokens: how many tokens.
    """

    total: Tensor
    tokens: int

    def __add__(self, other: "Covariance") -> "Covariance":
        return Covariance(self.total + other.total, self.tokens + other.tokens)


class _Accumulator:
    """C of one activation, as it grows; only the part from the diagonal's strips to the right is kept up to date."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.tokens = 0

    def add(self, activation: Tensor) -> bool:
        """Add tokens [..., in]; False where they are not all finite."""
        rows = activation.reshape(-1, activation.shape[-1])
        width = rows.shape[-1]
        if self.total is None:
            self.total = torch.zeros(width, width, dtype=torch.float64, device=rows.device)
        for chunk in rows.split(max(1, _CHUNK // width)):
            exact = chunk.double()
            for start in range(0, width, _STRIP):
                self.total[start : start + _STRIP, start:].addmm_(exact[:, start : start + _STRIP].mT, exact[:, start:])
        self.tokens += len(rows)
        return bool(torch.isfinite(self.total.diagonal()).all())

    def covariance(self) -> Covariance:
        """The whole matrix; in place, since it may fill most of the memory."""
        if self.total is None:
            raise RuntimeError("no activation was seen")
        for start in range(0, len(self.total), _STRIP):
            end = start + _STRIP
            self.total[end:, start:end] = self.total[start:end, end:].mT
        return Covariance(self.total, self.tokens)


def input_covariances(
    program: Program,
    windows: Tensor,
    names: Collection[str],
    *,
    batch: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Covariance]:
    """The covariance of each linear weight's inputs, all at once; arguments and errors as of `stream_covariances`."""
    return {
        name: covariance
        for found in stream_covariances(program, windows, names, batch=batch, progress=progress)
        for name, covariance in found.items()
    }


def stream_covariances(
    program: Program,
    windows: Tensor,
    names: Collection[str],
    *,
    batch: int | None = None,
    follow_edits: bool = False,
    progress: Progress | None = None,
) -> Iterator[dict[str, Covariance]]:
    """The covariances of linear weights, a few layers at a time, so that those of the whole model need not be held.

    What is yielded is complete: the layers that read those weights lie in the part of the graph that has run, and the
    caller may rewrite them before it goes on.

    Args:
        program: with linear layers in view, at stage canonical or rewritten.
        windows: see `token_batches`.
        names: qualified names of linear weights. A weight that several layers read gets the sum over them all; weights
            that read the same activations get one and the same object.
        batch: windows per run.
        follow_edits: whether layers further on see what the caller's rewrites made of those before.
        progress: called after each batch in each region of the graph.

    Raises:
        CalibrationError: CALIBRATION-001 no text, -003 activations that are not finite, -004 text that does not fit.
        GraphError: GRAPH-002 where weights are on the meta device.
    """
    batches = token_batches(program, windows, batch=batch)
    readers: dict[str, list[fx.Node]] = {program.aliases.get(name, name): [] for name in names}
    for node in program.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default):
        name = linear_weight(program, node)
        if name in readers:
            readers[name].append(node)
    for name, nodes in readers.items():
        if not nodes:
            raise KeyError(f"{name!r} is the weight of no linear layer")
    sources: dict[str, frozenset[object]] = {
        name: frozenset(node.args[0] for node in nodes) for name, nodes in readers.items()
    }
    accumulators = {node: _Accumulator() for nodes in sources.values() for node in nodes if isinstance(node, fx.Node)}
    where = {node.args[0]: node for nodes in reversed(readers.values()) for node in reversed(nodes)}

    def visit(node: fx.Node, activation: Tensor) -> None:
        if not accumulators[node].add(activation):
            raise CalibrationError(
                "CALIBRATION-003",
                "the activations of a layer are not finite on the calibration text.",
                where=describe(where[node]),
                why="some are NaN or infinite: weights are damaged, or too large for their dtype.",
                fix="check the checkpoint; load a float16 model in bfloat16 or float32.",
            )

    passed: set[fx.Node] = set()
    pending = dict(sources)
    for region in run_regions(
        program, batches, visit, wanted=accumulators, follow_edits=follow_edits, progress=progress
    ):
        passed |= region.nodes
        complete = [name for name in pending if passed.issuperset(readers[name])]
        if complete:
            yield _finished(complete, pending, accumulators)
    # Layers behind the last activation that was wanted: they did not need to run.
    if pending:
        yield _finished(list(pending), pending, accumulators)


def _finished(
    names: list[str], pending: dict[str, frozenset[object]], accumulators: dict[fx.Node, _Accumulator]
) -> dict[str, Covariance]:
    """The covariances of these weights, which go off `pending`; accumulators that no weight is left for are freed."""
    sources = {name: pending.pop(name) for name in names}
    totals: dict[frozenset[object], Covariance] = {}
    for nodes in sources.values():
        if nodes not in totals:
            first, *others = [accumulators[node].covariance() for node in accumulators if node in nodes]
            totals[nodes] = sum(others, start=first)
    kept = frozenset[object]().union(*pending.values())
    for node in [node for node in accumulators if node not in kept]:
        del accumulators[node]
    return {name: totals[nodes] for name, nodes in sources.items()}


def token_batches(program: Program, windows: Tensor, *, batch: int | None = None) -> list[dict[str, Tensor]]:
    """Windows of tokens as inputs of the program: every token attended to, positions from 0 on.

    Args:
        program: a decoder, with inputs `input_ids` and perhaps `attention_mask` and `position_ids`; or any program with
            one input.
        windows: int64[N, T], or N examples of what the one input takes.
        batch: windows at once; None: about 4,096 tokens.

    Raises:
        CalibrationError: CALIBRATION-001 where there is no token, -004 where windows do not fit the inputs.
    """
    if windows.dim() == 0 or windows.numel() == 0:
        raise CalibrationError(
            "CALIBRATION-001",
            f"calibration text of shape {list(windows.shape)} holds no token.",
            fix="give windows int64[N, T] with at least one token; skink.evaluation.token_windows cuts them.",
        )
    main = next((entry for entry in program.inputs if entry.name == "input_ids"), program.inputs[0])
    made = {"attention_mask", "position_ids"} if main.name == "input_ids" else set()
    others = [entry.name for entry in program.inputs if entry is not main and entry.name not in made]
    _check_fit(program, windows, main, others)
    device = next((tensor.device for _, tensor in program.weights()), windows.device)
    size = batch if batch is not None else max(1, 4096 // (windows.shape[1] if windows.dim() > 1 else 1))
    batches = []
    for part in windows.to(device).split(size):
        tensors = {main.name: part}
        if made:
            tensors["attention_mask"] = torch.ones_like(part)
            tensors["position_ids"] = torch.arange(part.shape[1], device=device).expand(part.shape)
        batches.append({entry.name: tensors[entry.name] for entry in program.inputs})
    return batches


def _check_fit(program: Program, windows: Tensor, main: Input, others: list[str]) -> None:
    why = ""
    if others:
        why = f"the program takes further inputs that no text can fill: {', '.join(others)}."
    elif windows.dim() != len(main.dims) or windows.is_floating_point() != main.dtype.is_floating_point:
        why = f"{main.name} is {_describe(main.dtype)} with dims {list(main.dims)}."
    elif not windows.is_floating_point():
        rows = _table_rows(program, main)
        low, high = int(windows.min()), int(windows.max())
        if rows is not None and not (low >= 0 and high < rows):
            why = f"tokens run from {low} to {high}, and the model knows 0 to {rows - 1}."
    if why:
        raise CalibrationError(
            "CALIBRATION-004",
            f"calibration windows {_describe(windows.dtype)}{list(windows.shape)} do not fit the model's input.",
            why=why,
            fix="cut windows with the model's own tokenizer.",
        )


def _describe(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _table_rows(program: Program, main: Input) -> int | None:
    """Rows of the embedding table that the input indexes, where there is one."""
    placeholders: Mapping[str, fx.Node] = dict(
        zip((entry.name for entry in program.inputs), program.graph.find_nodes(op="placeholder"), strict=True)
    )
    for user in placeholders[main.name].users:
        if user.target is torch.ops.aten.embedding.default and user.args[1] is placeholders[main.name]:
            table = user.args[0]
            if isinstance(table, fx.Node):
                return int(table.meta["val"].shape[0])
    return None
