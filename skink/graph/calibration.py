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
from skink.graph.program import PADDING_INPUT, Input, Program
from skink.graph.regions import run_regions
from skink.graph.rewriter import describe

# Columns of one strip of C. Only strips from the diagonal on are computed, which saves near half of the arithmetic.
_STRIP = 256
# Most numbers of the float64 copy of activations: 64 MiB.
_CHUNK = 2**23


@dataclass(frozen=True)
class Covariance:
    """Second moments of a layer's inputs (or of the gradients at its outputs), not centred.

    Args:
        total: float64[n, n], the sum of x x^T over all tokens.
        tokens: how many tokens; padding is none.
        absolute: float64[n], the sum of |x|; None where it is not known.
    """

    total: Tensor
    tokens: int
    absolute: Tensor | None = None

    def __add__(self, other: "Covariance") -> "Covariance":
        absolute = None if self.absolute is None or other.absolute is None else self.absolute + other.absolute
        return Covariance(self.total + other.total, self.tokens + other.tokens, absolute)


class Accumulator:
    """The second moments of one value, as they grow; only what lies right of the diagonal's strips is up to date."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.absolute: Tensor | None = None
        self.tokens = 0

    def add(self, value: Tensor, counted: Tensor | None = None) -> bool:
        """Add tokens [..., n], of whose rows bool[...] may name those that count; False where they are not finite."""
        rows = value.reshape(-1, value.shape[-1])
        rows = rows if counted is None else rows[counted]
        width = rows.shape[-1]
        if self.total is None or self.absolute is None:
            self.total = torch.zeros(width, width, dtype=torch.float64, device=rows.device)
            self.absolute = torch.zeros(width, dtype=torch.float64, device=rows.device)
        for chunk in rows.split(max(1, _CHUNK // width)):
            exact = chunk.double()
            # vector_norm(ord=1, dim=0) of float64 is several times slower.
            self.absolute += exact.abs().sum(0)
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
        return Covariance(self.total, self.tokens, self.absolute)


def input_covariances(
    program: Program,
    windows: Tensor,
    names: Collection[str],
    *,
    batch: int | None = None,
    progress: Progress | None = None,
    padding: Tensor | None = None,
) -> dict[str, Covariance]:
    """The covariance of each linear weight's inputs, all at once; arguments and errors as of `stream_covariances`."""
    return {
        name: covariance
        for found in stream_covariances(program, windows, names, batch=batch, progress=progress, padding=padding)
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
    padding: Tensor | None = None,
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
        padding: see `token_batches`; tokens that are padding do not count.

    Raises:
        CalibrationError: CALIBRATION-001 no text, -003 activations that are not finite, -004 text that does not fit.
        GraphError: GRAPH-002 where weights are on the meta device.
    """
    batches = token_batches(program, windows, batch=batch, padding=padding)
    counted = [real_tokens(entry) if padding is not None else None for entry in batches]
    readers = linear_readers(program, names)
    sources = {name: frozenset(node.all_input_nodes[0] for node in nodes) for name, nodes in readers.items()}
    accumulators = {node: Accumulator() for nodes in sources.values() for node in nodes}
    where = {node.args[0]: node for nodes in reversed(readers.values()) for node in reversed(nodes)}
    seen = dict.fromkeys(accumulators, 0)

    def visit(node: fx.Node, activation: Tensor) -> None:
        rows = counted_rows(activation, counted[seen[node]])
        seen[node] += 1
        if not accumulators[node].add(activation, rows):
            raise not_finite("activations of a layer", where[node])

    passed: set[fx.Node] = set()
    pending = dict(sources)
    for region in run_regions(
        program, batches, visit, wanted=accumulators, follow_edits=follow_edits, progress=progress
    ):
        passed |= region.nodes
        complete = [name for name in pending if passed.issuperset(readers[name])]
        if complete:
            yield finished(complete, pending, accumulators)
    # Layers behind the last activation that was wanted: they did not need to run.
    if pending:
        yield finished(list(pending), pending, accumulators)


def linear_readers(program: Program, names: Collection[str]) -> dict[str, list[fx.Node]]:
    """The linear layers that read each of these weights, in order; tied weights go by the name in the graph."""
    readers: dict[str, list[fx.Node]] = {program.aliases.get(name, name): [] for name in names}
    for node in program.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default):
        name = linear_weight(program, node)
        if name in readers:
            readers[name].append(node)
    for name, nodes in readers.items():
        if not nodes:
            raise KeyError(f"{name!r} is the weight of no linear layer")
    return readers


def not_finite(values: str, node: fx.Node) -> CalibrationError:
    """CALIBRATION-003: `values` (the activations, the gradients) are not finite at this linear layer."""
    return CalibrationError(
        "CALIBRATION-003",
        f"the {values} are not finite on the calibration text.",
        where=describe(node),
        why="some are NaN or infinite: weights are damaged, or too large for their dtype.",
        fix="check the checkpoint; load a float16 model in bfloat16 or float32.",
    )


def finished(
    names: list[str], pending: dict[str, frozenset[fx.Node]], accumulators: dict[fx.Node, Accumulator]
) -> dict[str, Covariance]:
    """The covariances of these weights, which go off `pending`; accumulators that no weight is left for are freed."""
    sources = {name: pending.pop(name) for name in names}
    totals: dict[frozenset[fx.Node], Covariance] = {}
    for nodes in sources.values():
        if nodes not in totals:
            first, *others = [accumulators[node].covariance() for node in accumulators if node in nodes]
            totals[nodes] = sum(others, start=first)
    kept = frozenset[fx.Node]().union(*pending.values())
    for node in [node for node in accumulators if node not in kept]:
        del accumulators[node]
    return {name: totals[nodes] for name, nodes in sources.items()}


def real_tokens(batch: Mapping[str, Tensor]) -> Tensor | None:
    """Which tokens of a batch are text: bool[B, T]; None where all are."""
    if PADDING_INPUT not in batch:
        return None
    real = batch[PADDING_INPUT] != 0
    return None if bool(real.all()) else real


def counted_rows(value: Tensor, real: Tensor | None) -> Tensor | None:
    """Which rows of a value belong to text: bool over its axes but the last, flattened; None where all do.

    A value of one row per window (a pooled one) has no padding.
    """
    if real is None:
        return None
    leading = value.shape[:-1]
    if leading[:2] == real.shape:
        return real.reshape(*real.shape, *[1] * (len(leading) - 2)).expand(leading).reshape(-1)
    return real.reshape(-1) if leading == (real.numel(),) else None


def token_batches(
    program: Program, windows: Tensor, *, batch: int | None = None, padding: Tensor | None = None
) -> list[dict[str, Tensor]]:
    """Windows of tokens as inputs of the program: positions from 0 on, every token attended to that is no padding.

    Args:
        program: a decoder or encoder, with inputs `input_ids` and perhaps `attention_mask`, `position_ids` and
            `token_type_ids` (all 0); or any program with one input.
        windows: int64[N, T], or N examples of what the one input takes.
        batch: windows at once; None: about 4,096 tokens.
        padding: int64[N, T] in the form of an attention mask, 1 for text and 0 for padding; None: all is text. Padding
            may lie on either side; positions count text only.

    Raises:
        CalibrationError: CALIBRATION-001 where there is no token, -004 where windows do not fit the inputs.
    """
    if windows.dim() == 0 or windows.numel() == 0 or (padding is not None and not bool(padding.any())):
        raise CalibrationError(
            "CALIBRATION-001",
            f"calibration text of shape {list(windows.shape)} holds no token.",
            fix="give windows int64[N, T] with at least one token; skink.evaluation.token_windows cuts them.",
        )
    main = next((entry for entry in program.inputs if entry.name == "input_ids"), program.inputs[0])
    made = {PADDING_INPUT, "position_ids", "token_type_ids"} if main.name == "input_ids" else set()
    others = [entry.name for entry in program.inputs if entry is not main and entry.name not in made]
    _check_fit(program, windows, main, others, padding)
    device = next((tensor.device for _, tensor in program.weights()), windows.device)
    size = batch if batch is not None else max(1, 4096 // (windows.shape[1] if windows.dim() > 1 else 1))
    masks = (padding if padding is not None else torch.ones((), dtype=torch.int64).expand(windows.shape)).to(device)
    batches = []
    for part, mask in zip(windows.to(device).split(size), masks.split(size), strict=True):
        tensors = {main.name: part}
        if made:
            tensors[PADDING_INPUT] = mask.to(torch.int64).contiguous()
            tensors["position_ids"] = (tensors[PADDING_INPUT].cumsum(1) - 1).clamp(min=0)
            tensors["token_type_ids"] = torch.zeros_like(part)
        batches.append({entry.name: tensors[entry.name] for entry in program.inputs})
    return batches


def _check_fit(program: Program, windows: Tensor, main: Input, others: list[str], padding: Tensor | None) -> None:
    why = ""
    if others:
        why = f"the program takes further inputs that no text can fill: {', '.join(others)}."
    elif padding is not None and PADDING_INPUT not in {entry.name for entry in program.inputs}:
        why = f"padding was given, and the program has no input {PADDING_INPUT!r} to be told of it."
    elif padding is not None and padding.shape != windows.shape:
        why = f"padding is {_describe(padding.dtype)}{list(padding.shape)}: it needs one number for each token."
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
