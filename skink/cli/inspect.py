"""`skink inspect`: what was captured and raised, by layer, and what was not."""

import re
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated

import typer
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from skink.cli.arguments import AsJson, Model
from skink.cli.console import Session, session_of

if TYPE_CHECKING:
    from skink.cli.inspection import Attention, Block, Inspection, Layer, Rotary
    from skink.cli.leftovers import Leftover

_PLACES_SHOWN = 3
_NUMBER = re.compile(r"\d+")


def inspect(
    context: typer.Context,
    model: Model,
    meta: Annotated[
        bool, typer.Option("--meta", help="Read the configuration only: shapes without weights, for large models.")
    ] = False,
    graph: Annotated[bool, typer.Option("--graph", help="Print the program itself.")] = False,
    attended: Annotated[
        int, typer.Option("--context", min=1, help="Tokens that a new token attends to, for its MACs.", metavar="N")
    ] = 512,
    as_json: AsJson = False,
) -> None:
    """Show what MODEL is made of: what was captured, what was raised, layer by layer, and what was not and why."""
    session = session_of(context)
    from skink.cli.quiet import quiet_transformers

    with quiet_transformers():
        from skink.cli import inspection as content
        from skink.cli.models import captured_program
        from skink.cli.progress import PhaseProgress

        with PhaseProgress(session) as progress:
            progress("capture", 0, 1)
            program = captured_program(model, meta=meta)
            progress("capture", 1, 1)
            progress("canonicalize", 0, 1)
            inspected = content.inspect_program(program, context=attended)
            progress("canonicalize", 1, 1)
    if session.as_json:
        text = {"graph": str(inspected.program)} if graph else {}
        session.emit({"model": model, **content.as_json(inspected), **text})
    elif graph:
        session.show(str(inspected.program))
    else:
        _show(session, model, inspected)


def _show(session: Session, name: str, inspected: "Inspection") -> None:
    from skink.export.report.formatting import count, size

    program, cost = inspected.program, inspected.cost
    title = Text(name, style="bold")
    kind = program.origin.get("model_type") or program.origin.get("class") or ""
    title.append(f"  {kind}, {str(program.dtype).removeprefix('torch.')}, {program.stage}", style="not bold dim")
    if program.is_meta:
        title.append(", weights not read", style="not bold dim")
    session.show(title)
    session.show(
        f"  {count(cost.parameters)} parameters ({count(cost.linear_parameters)} in linear layers), {size(cost.bytes)}",
        f"  {count(cost.macs_per_token)} MACs per token at {cost.context} tokens of context",
    )
    state = sum(_state_elements(layer) for layer in inspected.layers)
    if state:
        held = size(state * program.dtype.itemsize)
        session.show(f"  state: {held} per token and sequence while nothing is forgotten")
    session.show("")
    for numbers, layer in grouped(inspected.layers):
        _show_layer(session, numbers, layer)
    _show_refused(session, inspected)


def grouped(layers: "list[Layer]") -> "list[tuple[list[str], Layer]]":
    """Neighbouring layers that differ in their numbers alone, as one: (their names, the first of them)."""
    found: list[tuple[list[str], Layer]] = []
    previous: object = None
    for layer in layers:
        likeness = _likeness(layer)
        if found and layer.name and likeness == previous:
            found[-1][0].append(layer.name)
        else:
            found.append(([layer.name], layer))
        previous = likeness
    return found


def _likeness(layer: "Layer") -> object:
    inside = len(layer.name) + 1
    return (
        [*layer.attention],
        [(norm.name[inside:], norm.kind, norm.size, norm.eps, norm.offset) for norm in layer.norms],
        [*layer.rotary],
        [_block_text(block, layer.name) for block in layer.feed_forward],
        [(linear.name[inside:], linear.shape, linear.bias, linear.tied_to) for linear in layer.linear],
        [(other.name[inside:], other.shape) for other in layer.others],
        [(state.shape, state.growth, state.limit) for state in layer.state],
        layer.operators,
    )


def _show_layer(session: Session, names: list[str], layer: "Layer") -> None:
    from skink.export.report.formatting import count

    if not layer.name:
        heading = "outside the layers"
    elif len(names) == 1:
        heading = names[0]
    else:
        heading = f"{names[0]} to {names[-1].rpartition('.')[2]}, {len(names)} alike"
    title = Text(heading, style="bold")
    each = " each" if len(names) > 1 else ""
    title.append(f"  {count(layer.parameters)} parameters{each}", style="not bold dim")
    lines = [("attention", _attention_text(entry)) for entry in layer.attention]
    lines += [("rotary", _rotary_text(entry)) for entry in layer.rotary]
    lines += [_block_line(block, layer.name) for block in layer.feed_forward]
    lines += _weight_lines(layer)
    if layer.state:
        lines.append(("state", _state_text(layer)))
    if layer.operators:
        listed = ", ".join(f"{n} {name}" if n > 1 else name for name, n in sorted(layer.operators.items()))
        lines.append(("also", listed))
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in lines:
        table.add_row(label, Text(text, style="dim" if label == "also" else ""))
    session.show(title, Padding(table, (0, 0, 1, 2)))


def _weight_lines(layer: "Layer") -> list[tuple[str, str]]:
    """Norms, linear layers and other weights, in columns: what, name, shape, parameters."""
    from skink.export.report.formatting import TIMES, count

    inside = len(layer.name) + 1 if layer.name else 0
    rows: list[tuple[str, str, str, str]] = []
    for norm in layer.norms:
        offset = f", weight offset {norm.offset:g}" if norm.offset else ""
        kind = norm.kind.removeprefix("aten.")
        rows.append((kind, norm.name[inside:], str(norm.size), f"eps {norm.eps:g}{offset}"))
    for linear in layer.linear:
        bias = ", bias" if linear.bias else ""
        size = f"tied to {linear.tied_to}" if linear.tied_to else count(linear.parameters)
        rows.append(("linear", linear.name[inside:], f"{linear.shape[0]} {TIMES} {linear.shape[1]}", size + bias))
    for other in layer.others:
        shape = f" {TIMES} ".join(str(dim) for dim in other.shape)
        embedding = other.used_by == "aten.embedding"
        reader = "" if embedding else f", read by {other.used_by}"
        name = other.name[inside:].removesuffix(".weight")
        rows.append(("embedding" if embedding else "weight", name, shape, count(other.parameters) + reader))
    names = max((len(row[1]) for row in rows), default=0)
    shapes = max((len(row[2]) for row in rows), default=0)
    return [(what, f"{name:<{names}}  {shape:>{shapes}}  {rest}") for what, name, shape, rest in rows]


def _rotary_text(rotary: "Rotary") -> str:
    part = (
        f"{rotary.rotated} dims"
        if rotary.rotated == rotary.head_size
        else f"{rotary.rotated} of {rotary.head_size} dims"
    )
    pairs = "interleaved pairs" if rotary.interleaved else "half-split pairs"
    return f"{rotary.count} tensors, {part}, {pairs}"


def _block_line(block: "Block", layer: str) -> tuple[str, str]:
    return ("experts" if block.kind == "experts" else "feed-forward", _block_text(block, layer))


def _block_text(block: "Block", layer: str) -> str:
    from skink.export.report.formatting import count

    kind = f"gated {block.activation}" if block.gated else block.activation
    text = f"{kind}, {count(block.width)} wide"
    if block.kind != "experts":
        return text
    parts = [f"{block.experts}, {block.chosen} for each token", text]
    if block.router:
        parts.append(f"chosen by {block.router.removeprefix(f'{layer}.')}")
    parts += [f"and for every token {_block_text(shared, layer)}" for shared in block.shared]
    return ", ".join(parts)


def _attention_text(attention: "Attention") -> str:
    heads = f"{attention.heads} heads of {attention.head_size}"
    if attention.kv_heads != attention.heads:
        heads += f", {attention.kv_heads} key/value heads"
    parts = [heads, "causal" if attention.causal else "both ways"]
    if attention.window:
        parts.append(f"window {attention.window}")
    if attention.softcap:
        parts.append(f"soft cap {attention.softcap:g}")
    if attention.sinks:
        parts.append("sinks")
    if attention.alibi:
        parts.append("ALiBi")
    return ", ".join(parts)


def _state_text(layer: "Layer") -> str:
    texts = []
    for state in layer.state:
        shape = ",".join(str(dim) for dim in state.shape)
        limit = f" of the last {state.limit} tokens" if state.growth == "ring" else ""
        texts.append(f"{state.name.rpartition('.')[2]} [{shape}] {state.growth}{limit}")
    return ", ".join(texts)


def _state_elements(layer: "Layer") -> int:
    """Numbers that a layer keeps for one more token of one sequence."""
    total = 0
    for state in layer.state:
        if state.growth == "fixed":
            continue
        each = 1
        for axis, dim in enumerate(state.shape):
            if axis != state.axis and isinstance(dim, int):
                each *= dim
        total += each
    return total


def _show_refused(session: Session, inspected: "Inspection") -> None:
    if inspected.no_state:
        session.show(Text("Cannot be stepped:", style="bold red"), inspected.no_state, "")
    if not inspected.refused:
        session.show(Text("Nothing that looked like a known idiom was left unraised.", style="dim"))
        return
    reasons: dict[tuple[str, str], list[Leftover]] = {}
    for entry in inspected.refused:
        subject = f"{entry.operator}: " if entry.what else ""
        # Names of nodes are numbered through the whole graph.
        reasons.setdefault((subject, re.sub(r"%\w+", "%...", entry.reason)), []).append(entry)
    session.show(Text("Not raised", style="bold"))
    for (subject, reason), entries in reasons.items():
        session.show(Text(f"  {subject}{reason} ({len(entries)} place{'s' * (len(entries) != 1)})"))
        places = folded_places(entries)
        for place in places[:_PLACES_SHOWN]:
            session.show(Text(f"    {place}", style="dim"))
        if len(places) > _PLACES_SHOWN:
            session.show(Text(f"    and {len(places) - _PLACES_SHOWN} more; --json lists all", style="dim"))


def folded_places(entries: "list[Leftover]") -> list[str]:
    """Where the entries are; those whose layers alone differ are one: `model.layers.0 to 31.mlp (x.py:7)`."""
    numbers: dict[tuple[str, str, str], list[int]] = {}
    for entry in entries:
        name = entry.module or entry.where
        found = _NUMBER.search(name) if entry.module else None
        before, after = (name[: found.start()], name[found.end() :]) if found else (name, "")
        source = f" ({entry.source})" if entry.source and entry.module else ""
        numbers.setdefault((before, after, source), []).append(int(found.group()) if found else -1)
    return [f"{before}{_ranges(layers)}{after}{source}" for (before, after, source), layers in numbers.items()]


def _ranges(numbers: list[int]) -> str:
    """`0 to 3, 5`; empty for what has no number."""
    ordered = sorted(set(numbers) - {-1})
    if not ordered:
        return ""
    breaks = [index for index, (one, next_) in enumerate(pairwise(ordered), start=1) if next_ != one + 1]
    runs = [ordered[begin:end] for begin, end in pairwise([0, *breaks, len(ordered)])]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs)
