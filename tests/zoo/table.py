"""The page docs/zoo.md: made of rows, and read back."""

import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import transformers

from tests.zoo.trial import NEW_TOKENS, Row

PAGE = Path(__file__).parents[2] / "docs" / "zoo.md"
_DECODER_COLUMNS = ("captured", "raised", "stepped", "onnx")
_UNTRIED = "-"
_ENCODER_COLUMNS = ("captured", "raised")

_TEXT = """\
# The zoo

Every class of decoder that transformers loads with `AutoModelForCausalLM`, and every encoder that it loads with
`AutoModelForMaskedLM`, built from a tiny random configuration and put through Skink. `make zoo` writes this page:

```sh
make zoo
```

Versions: {versions}.

- *captured*: `capture` gives a graph whose logits, on a batch padded on the left, are those of transformers'
  eager model.
- *raised*: after `canonicalize` every attention in it is one `attention` operator.
- *stepped*: `derive_step` gives a graph with explicit state whose {tokens} greedy tokens, one at a time, are those of
  transformers' `generate`.
- *onnx*: so are those of ONNX Runtime on the exported graph.

Where something is not so, the last column says why: the first error's code and reason.

## Decoders

{decoder_counts}

{decoders}

## Encoders

They see all tokens at once, so there is nothing to step.

{encoder_counts}

{encoders}
"""


def versions() -> str:
    """What the page's rows depend on."""
    return f"PyTorch {torch.__version__.partition('+')[0]}, transformers {transformers.__version__}"


def render(decoders: Sequence[Row], encoders: Sequence[Row]) -> str:
    """The page."""
    return _TEXT.format(
        versions=versions(),
        tokens=NEW_TOKENS,
        decoder_counts=_counts(decoders, _DECODER_COLUMNS),
        decoders=_table(decoders, _DECODER_COLUMNS),
        encoder_counts=_counts(encoders, _ENCODER_COLUMNS),
        encoders=_table(encoders, _ENCODER_COLUMNS),
    )


def _counts(rows: Sequence[Row], columns: Sequence[str]) -> str:
    built = [row for row in rows if row.captured]
    counts = ", ".join(f"{sum(asdict(row)[name] == 'yes' for row in rows)} {name}" for name in columns)
    return f"{len(rows)} model types, {len({row.cls for row in rows})} classes, {len(built)} built: {counts}."


def _table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    lines = ["| " + " | ".join(("model type", "class", *columns, "why not")) + " |"]
    lines.append("|" + " --- |" * (len(columns) + 3))
    for row in rows:
        marks = (asdict(row)[name] or _UNTRIED for name in columns)
        lines.append("| " + " | ".join((row.model_type, row.cls, *marks, escape(row.why))) + " |")
    return "\n".join(lines)


def escape(text: str) -> str:
    """Text for a cell: no mark of it is read as Markdown."""
    return re.sub(r"([\\|*_\[\]<`])", r"\\\1", text)


def _unescape(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text)


def read(text: str) -> tuple[dict[str, Row], dict[str, Row]]:
    """(decoders, encoders) by model type, from a page."""
    decoders, encoders = text.split("\n## Encoders\n")
    return _rows(decoders, _DECODER_COLUMNS), _rows(encoders, _ENCODER_COLUMNS)


def _rows(text: str, columns: Sequence[str]) -> dict[str, Row]:
    found: dict[str, Row] = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) == len(columns) + 3 and cells[0] not in ("model type", "---"):
            marks = {name: mark.replace(_UNTRIED, "") for name, mark in zip(columns, cells[2:-1])}
            found[cells[0]] = Row(cells[0], cells[1], **marks, why=_unescape(cells[-1]))
    return found
