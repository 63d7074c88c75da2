"""Verification of a program after each pass: level 1 structure, level 2 numbers too, level 3 after every edit.

Level 1: the graph is legal at its stage (`legality.py` has the rules), its shapes propagate, and its results have the
shapes and dtypes they had. Level 2: it runs on seeded inputs and its results are compared with the captured model's; a
pass that calls itself exact may change them by rounding only. Level 3: the error after every single edit is measured.
It is always the result that is looked at, never what a pass says about it.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from skink.errors import VerifyError
from skink.graph.legality import illegal
from skink.graph.program import PADDING_INPUT, Edit, Program
from skink.graph.propagate import ShapeContext, propagate
from skink.graph.rewriter import check_well_formed, describe
from skink.graph.text import type_text

# Sizes of the seeded inputs of level 2.
_BATCH, _LENGTH = 2, 17

# What exact passes may change results by, relative to their largest absolute value: rounding of one more or one less
# intermediate result, per dtype of the weights.
EXACT_TOLERANCE: Mapping[torch.dtype, float] = {
    torch.float64: 1e-11,
    torch.float32: 2e-5,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
}

DEFECT = "this is a defect of the pass: report it."


@dataclass(frozen=True)
class Numbers:
    """How results differ from the captured model's on seeded inputs.

    Args:
        relative: Euclidean norm of the difference over that of the reference.
        largest: largest absolute difference over the reference's largest absolute value.
        divergence: Kullback-Leibler divergence of next-token distributions, in nats per token, for programs with one
            result of three dims.
    """

    relative: float
    largest: float
    divergence: float | None


def check_structure(program: Program, *, pass_name: str, edits: Sequence[Edit] = ()) -> None:
    """Level 1.

    Args:
        program: the result of a pass.
        pass_name: that pass.
        edits: what it did, to name the rules that touched the place.

    Raises:
        VerifyError: VERIFY-001.
    """
    check_well_formed(program, pass_name=pass_name)
    for breach in illegal(program):
        raise _broken(pass_name, breach.reason, breach.node, edits, why=f"rule of the stage: {breach.rule}.")
    before = _results(program)
    try:
        propagate(program)
    except Exception as error:
        reason = first_line(error)
        raise _broken(pass_name, "shapes do not fit together.", _misfit(program), edits, why=reason) from error
    after = _results(program)
    if before and before != after:
        what = f"results were {', '.join(before)} and became {', '.join(after)}."
        raise _broken(pass_name, what, program.graph.output_node(), edits)


def _results(program: Program) -> list[str]:
    value = program.graph.output_node().meta.get("val")
    context = program.graph_module.meta.get("shapes")
    return [type_text(entry, context) for entry in value] if isinstance(value, tuple | list) and context else []


def _broken(pass_name: str, what: str, node: fx.Node | None, edits: Sequence[Edit], *, why: str = "") -> VerifyError:
    return VerifyError(
        "VERIFY-001",
        f"after pass {pass_name}: {what}",
        where=describe(node) if node is not None and node.op != "output" else "",
        why="\n".join(line for line in (why, _blame(node, edits)) if line),
        fix=DEFECT,
    )


def _blame(node: fx.Node | None, edits: Sequence[Edit]) -> str:
    """The edits that touched a node; where none is known to, the pass's rules with how often each was used."""
    if not edits:
        return "the pass logged no edit: it went past the rewriter."
    touched = [edit for edit in edits if node is not None and _touched(edit, node)]
    if touched:
        named = ", ".join(f"{edit.index} ({edit.rule})" for edit in touched[-3:])
        return f"touched by edit{'s' if len(touched) > 1 else ''} {named}."
    return f"the pass's edits: {_rules(edits)}."


def _touched(edit: Edit, node: fx.Node) -> bool:
    if edit.node == node.name:
        return True
    came = (node.meta.get("rule"), node.meta.get("module", ""), node.meta.get("source", ""))
    return came == (edit.rule, edit.qualified_name, edit.source)


def _rules(edits: Sequence[Edit]) -> str:
    return ", ".join(f"{rule} {count} times" for rule, count in Counter(edit.rule for edit in edits).most_common())


class _Watched(fx.Interpreter):
    """Runs a graph node by node, and knows where it is."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.graph_module)
        self.node: fx.Node | None = None

    def run_node(self, n: fx.Node) -> Any:
        self.node = n
        return super().run_node(n)


class _WatchedShapes(_Watched):
    """The same on shapes alone."""

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self._program, self._context = program, ShapeContext(program)
        dims = [(entry.dims, entry.dtype) for entry in program.inputs]
        dims += [(entry.shape, program.dtype) for entry in program.state]
        self.inputs = [self._context.fake_input(*entry) for entry in dims]

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self._context.fake_weight(self._program.weight(target))

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self._context.call(target, args, kwargs)


def _stops_at(watched: _Watched, inputs: Sequence[Tensor]) -> fx.Node | None:
    """The node at which a run fails."""
    try:
        with torch.no_grad():
            watched.run(*inputs, enable_io_processing=False)
    except Exception:  # whatever it is, it was met before, and its node is what is wanted
        return watched.node
    return None


def _misfit(program: Program) -> fx.Node | None:
    """The node whose arguments have shapes that do not fit."""
    watched = _WatchedShapes(program)
    return _stops_at(watched, watched.inputs)


def run_results(
    program: Program, inputs: Sequence[Tensor], *, pass_name: str, edits: Sequence[Edit] = ()
) -> list[Tensor]:
    """What the program computes; for level 2.

    Raises:
        VerifyError: VERIFY-001 where it does not run.
    """
    try:
        return results_of(program, inputs)
    except Exception as error:
        reason = first_line(error)
        raise _broken(
            pass_name, "the program does not run.", _stops_at(_Watched(program), inputs), edits, why=reason
        ) from error


def results_of(program: Program, inputs: Sequence[Tensor]) -> list[Tensor]:
    """What the program computes, for comparison: results at padding, which nobody reads, are left out of it.

    A query that is padding sees no key, and what an attention makes of that is its own affair: some give the mean of
    all values, some no number.
    """
    padding = next(
        (value for entry, value in zip(program.inputs, inputs, strict=False) if entry.name == PADDING_INPUT), None
    )
    results: list[Tensor] = list(program(*inputs))
    if padding is None:
        return results
    return [
        result[padding.bool()][None] if result.dim() > 2 and result.shape[:2] == padding.shape else result
        for result in results
    ]


def seeded_inputs(program: Program, *, seed: int, vocabulary: int | None = None) -> list[Tensor]:
    """Inputs for level 2: random tokens (some left padding in the first sequence), or normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    # A table of learned positions may be shorter than the length wanted; OPT's has two rows that are no positions.
    rows = _smallest_table(program)
    length = _LENGTH if rows is None else max(1, min(_LENGTH, rows - 2))
    sizes = {"B": _BATCH, "T": length}
    inputs: list[Tensor] = []
    mask = torch.ones(_BATCH, length, dtype=torch.int64)
    mask[0, : min(3, length - 1)] = 0
    for entry in program.inputs:
        shape = [sizes.get(dim, 5) if isinstance(dim, str) else dim for dim in entry.dims]
        if entry.name == PADDING_INPUT:
            inputs.append(mask)
        elif entry.name == "position_ids":
            inputs.append((mask.cumsum(1) - 1).clamp(min=0))
        elif entry.dtype.is_floating_point:
            inputs.append(torch.randn(shape, generator=generator).to(entry.dtype))
        elif entry.dtype is torch.bool:
            inputs.append(torch.ones(shape, dtype=torch.bool))
        else:
            inputs.append(torch.randint(0, vocabulary or rows or 2, shape, generator=generator))
    return inputs


def _smallest_table(program: Program) -> int | None:
    """The smallest embedding's number of rows: token ids below it are valid everywhere."""
    rows = [
        int(node.args[0].meta["val"].shape[0])
        for node in program.graph.nodes
        if node.target is torch.ops.aten.embedding.default
    ]
    return min(rows, default=None)


def difference(found: Sequence[Tensor], reference: Sequence[Tensor]) -> Numbers:
    """How results differ from `reference`."""
    results = [entry.double() for entry in found]
    wanted = [entry.double() for entry in reference]
    # Infinities and NaN of the reference are met by the same, not by a difference.
    same = [(one == other) | (one.isnan() & other.isnan()) for one, other in zip(results, wanted, strict=True)]
    off = [(one - other).masked_fill(equal, 0.0) for one, other, equal in zip(results, wanted, same, strict=True)]
    differences = torch.cat([entry.flatten() for entry in off])
    finite = torch.cat([entry[entry.isfinite()] for entry in wanted])
    norm, scale = float(finite.norm()), float(finite.abs().max()) if finite.numel() else 0.0
    distance, largest = float(differences.norm()), float(differences.abs().max()) if differences.numel() else 0.0
    divergence = None
    if len(wanted) == 1 and wanted[0].dim() == 3:
        log_reference, log_result = wanted[0].log_softmax(-1), results[0].log_softmax(-1)
        probability = log_reference.exp()
        parts = torch.where(probability > 0, probability * (log_reference - log_result), 0.0)
        divergence = float(parts.sum(-1).mean())
    return Numbers(distance / norm if norm else distance, largest / scale if scale else largest, divergence)


def check_exact(
    numbers: Numbers, program: Program, *, pass_name: str, edits: Sequence[Edit] = (), before: float = 0.0
) -> None:
    """Level 2 for a pass that calls itself exact.

    Args:
        numbers: the difference that the pass added.
        program: the result.
        pass_name: that pass.
        edits: what it did, to name its rules; where level 3 measured them, the one that added most.
        before: the relative error before the first of them.

    Raises:
        VerifyError: VERIFY-002.
    """
    allowed = EXACT_TOLERANCE.get(program.dtype, EXACT_TOLERANCE[torch.float32])
    if numbers.largest <= allowed:
        return
    worst = worst_edit(edits, before=before)
    raise VerifyError(
        "VERIFY-002",
        f"pass {pass_name} calls itself exact and changed the results by {numbers.largest:.2e} of their largest "
        f"value; rounding would be at most {allowed:.0e}.",
        where=describe_edit(worst) if worst is not None else "",
        why=f"the pass's edits: {_rules(edits)}." if edits else "the pass logged no edit: it went past the rewriter.",
        fix=DEFECT,
    )


def worst_edit(edits: Sequence[Edit], *, before: float = 0.0) -> Edit | None:
    """The edit that raised the error most, of those that were measured."""
    worst, most, last = None, -math.inf, before
    for edit in edits:
        if edit.error is not None:
            # The first that makes it NaN is the worst there is.
            step = math.inf if math.isnan(edit.error) and not math.isnan(last) else edit.error - last
            if step > most:
                worst, most = edit, step
            last = edit.error
    return worst


def describe_edit(edit: Edit) -> str:
    """`edit 12, linear-to-low-rank of %linear_3, model.layers.0.mlp.up_proj (modeling_llama.py:41)`."""
    module = f", {edit.qualified_name}" if edit.qualified_name else ""
    return f"edit {edit.index}, {edit.rule} of %{edit.node}{module}" + (f" ({edit.source})" if edit.source else "")


def first_line(error: BaseException) -> str:
    """An exception in one line: its type, and the first line of what it says."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
