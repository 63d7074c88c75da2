"""`export_onnx`: a program as a folder that ONNX Runtime runs, checked before it is there."""

import dataclasses
import json
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import onnx_ir as ir
import torch
from torch import nn

from skink.errors import ExportError
from skink.export.folder import output_folder
from skink.export.onnx import check as checking
from skink.export.onnx.cases import make_cases, save_cases
from skink.export.onnx.check import CheckResult
from skink.export.onnx.convert import OPSET, convert, interface
from skink.export.onnx.prepare import Prepared, export_dtype, prepare
from skink.export.onnx.session import DATA_FILE, MODEL_FILE
from skink.graph.capture import capture
from skink.graph.passes import Progress
from skink.graph.program import Program, Stage
from skink.graph.progress import silent
from skink.graph.state import derive_step
from skink.kernels import find_op

# The largest error allowed, as a share of the largest logit, by the dtype of the export: sums come in another order.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 2e-2}

_STEPS = 4  # prepared, converted, written, checked


class Saveable(Protocol):
    """A tokenizer, a configuration or a generation configuration of transformers."""

    def save_pretrained(self, save_directory: str | Path) -> Any:
        """Write its files into a folder."""


@dataclass(frozen=True)
class OnnxReport:
    """What was exported.

    Args:
        folder: where it is.
        opset: of the domain ai.onnx.
        dtype: of weights, state and logits.
        operators: nodes by `domain::operator` (without the domain for ai.onnx), constants aside.
        interface: names, dtypes and dims of inputs and outputs.
        bytes: of each file.
        check: what the check found, or None where there was none.
        notes: what the user should know.
        seconds: that the export took, the check included.
    """

    folder: Path
    opset: int
    dtype: str
    operators: Mapping[str, int]
    interface: Mapping[str, Any]
    bytes: Mapping[str, int]
    check: CheckResult | None
    notes: tuple[str, ...]
    seconds: float

    @property
    def nodes(self) -> int:
        """Nodes in the graph, constants aside."""
        return sum(self.operators.values())

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        values = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}
        return values | {
            "folder": str(self.folder),
            "notes": list(self.notes),
            "check": self.check.as_json() if self.check is not None else None,
            "nodes": self.nodes,
        }


def export_onnx(
    program_or_model: Program | nn.Module,
    folder: str | Path,
    *,
    tokenizer: Saveable | None = None,
    config: Saveable | Mapping[str, Any] | None = None,
    generation_config: Saveable | Mapping[str, Any] | None = None,
    check: bool = True,
    overwrite: bool = False,
    progress: Progress = silent,
) -> OnnxReport:
    """Write one ONNX graph for prefill and decode, with explicit state, and check it in a fresh process.

    The folder holds `model.onnx`, `model.onnx.data` with the weights, and `config.json`, `generation_config.json` and
    the tokenizer's files where they are given. It is there whole and checked, or not at all.

    Inputs are those of the step program: `input_ids` and `position_ids` int64[batch, sequence], `attention_mask`
    int64[batch, total] over past and new tokens, and `past_key_values.{i}.key|value` [batch, Hk, past, D], of length 0
    at first; outputs are `logits` [batch, sequence, V] and `present.{i}.key|value`, the next step's past. A layer with
    a window hands back its last `window - 1` tokens only. One more input, `num_logits_to_keep` int64[], may be left
    out: logits are then of every token, otherwise of so many last ones.

    Args:
        program_or_model: a program before it is stepped, a model that holds one, or a model to capture.
        folder: must not exist, unless `overwrite`.
        tokenizer: saved beside the graph.
        config: by default the model's own.
        generation_config: by default the model's own.
        check: compare logits and greedy tokens with PyTorch's.
        overwrite: replace a folder that exists, once the new one is whole.
        progress: called with (steps done, steps).

    Raises:
        ExportError: EXPORT-001 an operator without an ONNX form, -002 the check found a difference, -003 ONNX Runtime
            cannot load or run the graph.
        OutputError: OUTPUT-001 the folder exists, -002 it cannot be written.
        GraphError: GRAPH-002 weights on the meta device.
        StateError: STATE-001 the program cannot be stepped.
    """
    start = time.perf_counter()
    with output_folder(folder, overwrite=overwrite) as partial:
        program = _canonical(program_or_model)
        prepared = prepare(_with_state(program))
        progress(1, _STEPS)
        model = convert(prepared)
        progress(2, _STEPS)
        _write(model, prepared, partial)
        for name, value in (("config", config), ("generation_config", generation_config)):
            _write_config(
                value if value is not None else getattr(program_or_model, name, None), f"{name}.json", partial
            )
        if tokenizer is not None:
            tokenizer.save_pretrained(str(partial))
        progress(3, _STEPS)
        notes = list(prepared.notes)
        result = _check(program, prepared, partial, notes) if check else None
        if result is None:
            notes.append("not checked against PyTorch.")
        progress(_STEPS, _STEPS)
        files = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
    return OnnxReport(
        folder=Path(folder),
        opset=OPSET,
        dtype=str(prepared.dtype).removeprefix("torch."),
        operators=_operators(model),
        interface=interface(model),
        bytes=files,
        check=result,
        notes=tuple(notes),
        seconds=time.perf_counter() - start,
    )


def _canonical(program_or_model: Program | nn.Module) -> Program:
    """The canonical or rewritten full-sequence program of what was given."""
    from skink.passes.canonicalize import Canonicalize

    held = program_or_model if isinstance(program_or_model, Program) else getattr(program_or_model, "program", None)
    program = held if isinstance(held, Program) else capture(program_or_model)  # type: ignore[arg-type]
    if program.stage >= Stage.STEPPED:
        raise ExportError(
            "EXPORT-001",
            f"a program at stage {program.stage} has no ONNX form.",
            why="Its operators are bound to this machine's kernels, or its state is already explicit.",
            fix="export the program as it was before it was stepped or lowered.",
        )
    if program.stage is not Stage.CAPTURED:
        return program
    from skink.graph.pipeline import Pipeline

    canonical = program.clone()
    Pipeline((Canonicalize(),)).run(canonical)
    return canonical


def _with_state(program: Program) -> Program:
    """The step program; where no op looks back only (an encoder), there is nothing to carry and the program itself."""
    owners = [(node, op) for node in program.graph.nodes if (op := find_op(node.target)) is not None and op.state]
    if any(op.bind(node.args, node.kwargs).get("causal", True) for node, op in owners):
        return derive_step(program)
    return program


def _write(model: ir.Model, prepared: Prepared, folder: Path) -> None:
    state = [
        {"name": entry.name, "growth": entry.growth, "axis": entry.axis, "limit": entry.limit}
        for entry in prepared.program.state
    ]
    model.metadata_props["skink.state"] = json.dumps(state)
    ir.save(model, folder / MODEL_FILE, external_data=DATA_FILE)


def _write_config(value: Saveable | Mapping[str, Any] | None, name: str, folder: Path) -> None:
    if value is None:
        return
    if isinstance(value, Mapping):
        (folder / name).write_text(json.dumps(dict(value), indent=2, sort_keys=True) + "\n", encoding="utf-8")
    else:
        value.save_pretrained(str(folder))


def _check(program: Program, prepared: Prepared, folder: Path, notes: list[str]) -> CheckResult:
    cases, left_out = make_cases(program, prepared.source, export_dtype(program))
    notes.extend(left_out)
    workspace = Path(tempfile.mkdtemp(prefix="skink-check-"))
    try:
        path = workspace / "cases.safetensors"
        save_cases(cases, path)
        result = checking.check_in_fresh_process(folder, path, TOLERANCES[prepared.dtype])
    finally:
        shutil.rmtree(workspace, ignore_errors=True)
    failures = result.failures()
    if failures:
        raise ExportError(
            "EXPORT-002",
            "the exported graph computes something else than the model.",
            why="\n".join(failures[:10] + ([f"and {len(failures) - 10} more."] if len(failures) > 10 else [])),
            fix="report this with the model's configuration; nothing was written.",
        )
    if result.ties:
        notes.append(
            f"{result.ties} of {result.tokens} greedy tokens differed where logits were equal within rounding."
        )
    return result


def _operators(model: ir.Model) -> dict[str, int]:
    counts: dict[str, int] = {}
    for node in model.graph:
        if node.op_type != "Constant":
            name = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
            counts[name] = counts.get(name, 0) + 1
    return dict(sorted(counts.items()))
