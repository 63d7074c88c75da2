"""`skink inspect`: what was captured and raised, by layer."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from skink.cli.arguments import AsJson, Model
from skink.cli.console import Session, session_of

if TYPE_CHECKING:
    from skink.cli.inspection import Attention, Inspection, Layer, Rotary

_PLACES_SHOWN = 3


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
    reasons: dict[str, list[str]] = {}
    for where, reason in inspected.refused:
        reasons.setdefault(reason, []).append(where)
    session.show(Text("Not raised", style="bold"))
    for reason, places in reasons.items():
        session.show(f"  {reason} ({len(places)} place{'s' * (len(places) != 1)})")
        for place in places[:_PLACES_SHOWN]:
            session.show(Text(f"    {place}", style="dim"))
        if len(places) > _PLACES_SHOWN:
            session.show(Text(f"    and {len(places) - _PLACES_SHOWN} more; --json lists all", style="dim"))
