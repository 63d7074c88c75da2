"""Verification of a program after each pass: level 1 structure, level 2 numbers too.

Level 1: the graph is well formed, its shapes propagate, its operators are legal at its stage, every weight it reads
exists and every weight that exists is read, and its results have the shapes and dtypes they had. Level 2: it runs on
seeded inputs and its results are compared with the captured model's; a pass that calls itself exact may change them by
rounding only.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from skink.errors import VerifyError
from skink.graph.operators import SIZE_FUNCTIONS
from skink.graph.pattern import op_name
from skink.graph.program import Program, Stage
from skink.graph.propagate import propagate
from skink.graph.rewriter import broken, check_well_formed
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

_IDIOMS_GONE_AFTER_CANONICAL = ("_assert_tensor_metadata", "_assert_scalar", "lift_fresh_copy", "detach_")


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


def check_structure(program: Program, *, pass_name: str) -> None:
    """Level 1; raises VERIFY-001."""
    graph = program.graph
    check_well_formed(program, pass_name=pass_name)
    _check_weights(program, pass_name)
    for node in graph.nodes:
        if node.op not in ("placeholder", "get_attr", "call_function", "output"):
            raise broken(pass_name, f"a node of kind {node.op!r} is not allowed.", "", node)
        if node.op == "call_function":
            reason = _illegal(node, program.stage)
            if reason:
                raise broken(pass_name, f"{reason} is not legal at stage {program.stage}.", "", node)
    before = _results(program)
    try:
        propagate(program)
    except Exception as error:
        raise broken(pass_name, "shapes do not fit together.", f"{type(error).__name__}: {error}") from error
    after = _results(program)
    if before and before != after:
        raise broken(pass_name, f"results were {', '.join(before)} and became {', '.join(after)}.", "")


def _illegal(node: fx.Node, stage: Stage) -> str:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        if target._schema.is_mutable:
            return f"{target}, which writes to its argument,"
        if target.namespace not in ("aten", "skink"):
            return f"{target}, an operator of {target.namespace},"
        if stage >= Stage.CANONICAL and op_name(node) in _IDIOMS_GONE_AFTER_CANONICAL:
            return str(target)
        return ""
    return "" if target in SIZE_FUNCTIONS.values() else f"the function {getattr(target, '__name__', target)}"


def _check_weights(program: Program, pass_name: str) -> None:
    stored = set(program.stored_weights())
    read = {str(node.target): node for node in program.graph.nodes if node.op == "get_attr"}
    for name, node in read.items():
        if name not in stored:
            raise broken(pass_name, f"the weight {name!r} is read and does not exist.", "", node)
    unused = sorted(stored - set(read))
    if unused:
        raise broken(pass_name, f"the weight {unused[0]!r} is kept and never read.", "")


def _results(program: Program) -> list[str]:
    value = program.graph.output_node().meta.get("val")
    context = program.graph_module.meta.get("shapes")
    return [type_text(entry, context) for entry in value] if isinstance(value, tuple | list) and context else []


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
        if entry.name == "attention_mask":
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


def compare(program: Program, reference: list[Tensor], inputs: list[Tensor]) -> Numbers:
    """How the program's results differ from `reference` on `inputs`."""
    results = [entry.double() for entry in program(*inputs)]
    wanted = [entry.double() for entry in reference]
    # Infinities and NaN of the reference are met by the same, not by a difference.
    same = [(one == other) | (one.isnan() & other.isnan()) for one, other in zip(results, wanted, strict=True)]
    off = [(one - other).masked_fill(equal, 0.0) for one, other, equal in zip(results, wanted, same, strict=True)]
    differences = torch.cat([entry.flatten() for entry in off])
    finite = torch.cat([entry[entry.isfinite()] for entry in wanted])
    norm, scale = float(finite.norm()), float(finite.abs().max()) if finite.numel() else 0.0
    difference, largest = float(differences.norm()), float(differences.abs().max()) if differences.numel() else 0.0
    divergence = None
    if len(wanted) == 1 and wanted[0].dim() == 3:
        log_reference, log_result = wanted[0].log_softmax(-1), results[0].log_softmax(-1)
        probability = log_reference.exp()
        parts = torch.where(probability > 0, probability * (log_reference - log_result), 0.0)
        divergence = float(parts.sum(-1).mean())
    return Numbers(difference / norm if norm else difference, largest / scale if scale else largest, divergence)


def check_exact(numbers: Numbers, program: Program, *, pass_name: str) -> None:
    """Level 2 for a pass that calls itself exact; raises VERIFY-002."""
    allowed = EXACT_TOLERANCE.get(program.dtype, EXACT_TOLERANCE[torch.float32])
    if not numbers.largest <= allowed:
        raise VerifyError(
            "VERIFY-002",
            f"pass {pass_name} calls itself exact and changed the results by {numbers.largest:.2e} of their largest "
            f"value; rounding would be at most {allowed:.0e}.",
            fix="this is a defect of the pass: report it, with SKINK_DUMP set to a folder and what it then holds.",
        )
