"""What an export is checked on: inputs, and what the program computes for them in PyTorch."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from skink.export.onnx.prepare import cast_program
from skink.graph.program import PADDING_INPUT, Program
from skink.graph.propagate import propagate

GREEDY_TOKENS = 32

_PROMPT = 12
_LONGEST_RING = 512  # a longer window is not crossed in the check: it would take too long
_DECODER_INPUTS = {"input_ids", PADDING_INPUT, "position_ids"}


@dataclass(frozen=True)
class Case:
    """One sequence batch.

    Args:
        name: for messages.
        inputs: by name, for the whole sequence.
        outputs: what PyTorch computes.
        real: bool[B, T], False for padding.
        chunks: lengths in which the sequence is read; none where it is read at once.
        greedy_from: the first position that was generated greedily, if any was.
    """

    name: str
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    real: Tensor
    chunks: tuple[int, ...]
    greedy_from: int | None


def make_cases(full: Program, stepped: Program, dtype: torch.dtype, *, seed: int = 0) -> tuple[list[Case], list[str]]:
    """Cases for a program, and notes on what they leave out.

    Args:
        full: the program over the whole sequence, whose outputs are the truth.
        stepped: its step program, which generates the greedy tokens (the full one would take much longer).
        dtype: of the export; both programs are run in it.
        seed: of the tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    full, stepped = cast_program(full, dtype), cast_program(stepped, dtype)
    if not (stepped.state and {entry.name for entry in full.inputs} <= _DECODER_INPUTS and full.outputs == ("logits",)):
        read = any(entry.name == "input_ids" for entry in full.inputs)
        return [_encoder_case(full, generator) if read else _module_case(full, generator)], []
    vocabulary, longest = _limits(full)
    notes: list[str] = []
    cases = [
        _greedy_case("a padded batch, token by token", full, stepped, (0, 4, 7), vocabulary, longest, generator),
        _chunked_case("a padded batch, in chunks", full, (0, 3), min(longest, 24), vocabulary, generator),
    ]
    rings = sorted({state.limit for state in stepped.state if state.growth == "ring"})
    for limit in rings:
        length = 2 * limit + 10
        if limit > _LONGEST_RING or length > longest:
            notes.append(f"the check did not reach past the window of {limit + 1} tokens.")
        else:
            name = f"past the window of {limit + 1} tokens"
            cases.append(_chunked_case(name, full, (0, 2), length, vocabulary, generator))
    return cases, notes


def save_cases(cases: list[Case], path: Path) -> None:
    """Write cases as one safetensors file."""
    tensors: dict[str, Tensor] = {}
    described = []
    for index, case in enumerate(cases):
        tensors |= {f"{index}.input.{name}": tensor.contiguous() for name, tensor in case.inputs.items()}
        tensors |= {f"{index}.output.{name}": tensor.contiguous() for name, tensor in case.outputs.items()}
        tensors[f"{index}.real"] = case.real.contiguous()
        described.append(
            {
                "name": case.name,
                "inputs": list(case.inputs),
                "outputs": list(case.outputs),
                "chunks": list(case.chunks),
                "greedy_from": case.greedy_from,
            }
        )
    save_file(tensors, str(path), metadata={"cases": json.dumps(described)})


def _limits(program: Program) -> tuple[int, int]:
    """(token ids, tokens in a sequence) that the program's tables allow."""
    propagate(program)  # a program that was read from a file has no shapes yet
    names = {node: entry.name for node, entry in zip(program.graph.find_nodes(op="placeholder"), program.inputs)}
    logits: Any = program.graph.output_node().args[0][0]  # type: ignore[index]
    vocabulary = int(logits.meta["val"].shape[-1])
    longest = 1 << 30
    for node, rows in _tables(program):
        if names.get(node.args[1]) == "input_ids":
            vocabulary = min(vocabulary, rows)
        else:
            # A table of positions; some families leave its first rows unused.
            longest = min(longest, rows - 2)
    return vocabulary, longest


def _tables(program: Program) -> list[tuple[Any, int]]:
    """Every look-up in a table, and the table's rows."""
    lookups: list[Any] = program.graph.find_nodes(op="call_function", target=torch.ops.aten.embedding.default)
    return [(node, int(node.args[0].meta["val"].shape[0])) for node in lookups]


def _encoder_case(full: Program, generator: torch.Generator) -> Case:
    """A batch of token ids, padded behind and read at once; of token types as many as the model knows."""
    propagate(full)
    placeholders = dict(zip(full.graph.find_nodes(op="placeholder"), full.inputs))
    rows = {placeholders[node.args[1]].name: count for node, count in _tables(full) if node.args[1] in placeholders}
    shape = (3, 7)
    mask = torch.ones(shape, dtype=torch.int64)
    mask[1, 4:], mask[2, 1:] = 0, 0
    inputs = {
        entry.name: mask
        if entry.name == PADDING_INPUT
        else torch.randint(0, rows.get(entry.name, 1), shape, generator=generator)
        for entry in full.inputs
    }
    outputs = dict(zip(full.outputs, full(**inputs)))
    return Case("a padded batch", inputs, outputs, mask.bool(), (), None)


def _prompt(
    padding: tuple[int, ...], length: int, vocabulary: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, vocabulary, (len(padding), length), generator=generator)
    mask = torch.ones_like(ids)
    for row, count in enumerate(padding):
        mask[row, : min(count, length - 1)] = 0
    return ids, mask


def _positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)


def _finish(
    name: str, full: Program, ids: Tensor, mask: Tensor, chunks: tuple[int, ...], greedy_from: int | None
) -> Case:
    inputs = {"input_ids": ids, PADDING_INPUT: mask, "position_ids": _positions(mask)}
    inputs = {entry.name: inputs[entry.name] for entry in full.inputs}
    return Case(name, inputs, {"logits": full(**inputs)[0]}, mask.bool(), chunks, greedy_from)


def _chunked_case(
    name: str, full: Program, padding: tuple[int, ...], length: int, vocabulary: int, generator: torch.Generator
) -> Case:
    ids, mask = _prompt(padding, length, vocabulary, generator)
    first = max(1, length // 3)
    chunks = [first, 1, 1]
    while sum(chunks) < length:
        chunks.append(min(5, length - sum(chunks)))
    return _finish(name, full, ids, mask, tuple(chunks), None)


def _greedy_case(
    name: str,
    full: Program,
    stepped: Program,
    padding: tuple[int, ...],
    vocabulary: int,
    longest: int,
    generator: torch.Generator,
) -> Case:
    prompt = min(_PROMPT, longest // 2)
    tokens = min(GREEDY_TOKENS, longest - prompt)
    ids, mask = _prompt(padding, prompt, vocabulary, generator)
    sizes = {"B": len(padding)}  # all other dims that have names are of the past, and there is none
    shapes = [[dim if isinstance(dim, int) else sizes.get(dim, 0) for dim in entry.shape] for entry in stepped.state]
    state = [torch.zeros(shape, dtype=stepped.dtype) for shape in shapes]
    start = 0
    for _ in range(tokens):
        inputs: dict[str, Any] = {
            "input_ids": ids[:, start:],
            PADDING_INPUT: mask,
            "position_ids": _positions(mask)[:, start:],
        }
        logits, *state = stepped(*(inputs[entry.name] for entry in stepped.inputs), *state)
        token = logits[:, -1, :vocabulary].argmax(-1, keepdim=True)
        start = ids.shape[1]
        ids, mask = torch.cat([ids, token], 1), torch.cat([mask, mask.new_ones(len(padding), 1)], 1)
    return _finish(name, full, ids, mask, (prompt, *[1] * tokens), prompt)


def _module_case(full: Program, generator: torch.Generator) -> Case:
    """Any other program: random numbers, the sequence read at once.

    A mask of integers is one, other integers are zero, the one value that is always allowed.
    """
    sizes: dict[str, int] = {}
    inputs = {}
    for entry in full.inputs:
        shape = [dim if isinstance(dim, int) else sizes.setdefault(dim, 3 + len(sizes)) for dim in entry.dims]
        if entry.dtype.is_floating_point:
            inputs[entry.name] = torch.randn(shape, generator=generator).to(entry.dtype)
        else:
            inputs[entry.name] = torch.full(shape, int("mask" in entry.name)).to(entry.dtype)
    outputs = dict(zip(full.outputs, full(**inputs)))
    return Case("random inputs", inputs, outputs, torch.ones(1, dtype=torch.bool), (), None)
