"""What low rank costs in quality, without any training: every method at equal shares of the linear parameters.

For each method and share: held-out perplexity over the dense model's, accuracy on multiple-choice questions, and the
loss that was predicted beside the loss that was measured, in nats per token. Then, for one recipe, predicted beside
measured for every matrix, each replaced alone. An encoder is measured by its embeddings instead.

The model is captured once, and the statistics of the dense model are gathered once. Rows are kept in the file of
`--rows` as they come, and those that stand there already, under equal settings, are not measured again.

    python benchmarks/quality/low_rank.py [--model stdlib-llama] [--keeps 0.9,0.8,0.6,0.4] [--only PATTERN]
        [--questions N] [--questions-at 0.8] [--matrices RECIPE] [--matrix-windows N] [--rows FILE] [--out FILE.md]
        [--known] [--threads N] [--json]
"""

import argparse
import inspect
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from skink.cli.quiet import quiet_transformers
from skink.compression.compress import captured
from skink.compression.layer_losses import layer_losses
from skink.compression.quality import encoder_quality
from skink.compression.texts import (
    HeldOutTexts,
    TextOptions,
    calibration_and_held_out,
    encoder_texts,
    longest_text,
    read_documents,
)
from skink.errors import SkinkError
from skink.evaluation import Accuracy, answer, machine, multiple_choice, paired, perplexity
from skink.evaluation.questions import KINDS
from skink.export.huggingface import load_source, to_huggingface
from skink.export.huggingface.loading import holds_encoder
from skink.export.huggingface.sentences import sentence_settings
from skink.graph.calibration import stream_covariances
from skink.graph.cost import program_cost
from skink.graph.gradients import stream_moments
from skink.graph.passes import LayerRecord, Pass
from skink.graph.pipeline import Pipeline
from skink.graph.program import Program, Stage
from skink.graph.windows import Windows
from skink.passes.canonicalize import Canonicalize
from skink.passes.decompose.selection import linear_layers
from skink.passes.recipe import load_recipe

# In tables, {keep} is the share of the linear parameters that stays.
METHODS: Mapping[str, str] = {
    "plain SVD, uniform": "low-rank{keep={keep},method=plain,baseline=false}",
    "ASVD, uniform": "low-rank{keep={keep},method=asvd,baseline=false}",
    "Fisher-weighted SVD, uniform": "low-rank{keep={keep},method=fisher,baseline=false}",
    "whitened, uniform": "low-rank{keep={keep},method=whitened,baseline=false}",
    "two-sided, uniform": "low-rank{keep={keep},allocation=uniform,form=thin,share_inputs=false,baseline=false}",
    "two-sided, global, two thin factors": "low-rank{keep={keep},form=thin,share_inputs=false,baseline=false}",
    "two-sided, global (default)": "low-rank{keep={keep},baseline=false}",
    "Tucker, plain, two factors": "tucker{rank={keep}}",
    "Tucker, plain, three factors": "tucker{rank={keep},factors=3}",
    "Tucker, two-sided, three factors": "tucker{rank={keep},factors=3,method=two-sided}",
    "Basis Sharing, as in the paper": "basis-sharing{keep={keep},method=whitened,allocation=uniform,refit=false}",
    "Basis Sharing, two-sided": "basis-sharing{keep={keep}}",
    "width, leverage, block influence": "reduce-width{keep={keep},method=leverage,allocation=block-influence}",
    "width, two-sided": "reduce-width{keep={keep}}",
    "whitened, measured, floor 0.5": "low-rank{keep={keep},method=whitened,allocation=measured,baseline=false}",
}
KEEPS = (0.9, 0.8, 0.6, 0.4)
MISSING = "-"


@dataclass(frozen=True)
class Subject:
    """The model, captured once, and what it is measured with."""

    name: str
    source: Any
    dense: Program
    calibration: Windows
    held_out: Windows | HeldOutTexts
    questions: tuple[Any, ...]
    pooling: Any

    @property
    def settings(self) -> dict[str, str]:
        """What a row depends on besides its recipe."""
        calibration, held_out = self.calibration, self.held_out
        shape = " x ".join(map(str, calibration.tokens.shape))
        judged = (
            f"{held_out.source}, {held_out.sha256[:12]}, {' x '.join(map(str, held_out.tokens.shape))} tokens"
            if isinstance(held_out, Windows)
            else f"{held_out.source}, {held_out.sha256[:12]}, {len(held_out.texts.mask)} texts"
        )
        return {
            "model": Path(self.name).name,
            "calibration": f"{calibration.source}, {calibration.sha256[:12]}, {shape} tokens",
            "held out": judged,
            "questions": ", ".join(f"{len(each)} {each.kind} ({each.sha256[:12]})" for each in self.questions)
            or "none",
            "dtype": str(self.dense.dtype).removeprefix("torch."),
            "torch": version("torch"),
        }

    def model(self, program: Program) -> Any:
        """A program as what transformers runs."""
        config, generation = self.source.config, getattr(self.source, "generation_config", None)
        return to_huggingface(program, config, generation, copy=False)


def load(name: str, questions: int, text: str) -> Subject:
    """Load, capture and canonicalise a model, and cut its texts."""
    encoder = holds_encoder(name)
    source, tokenizer = load_source(name, encoders=encoder)
    settings = sentence_settings(name) if encoder else None
    longest = longest_text(source, tokenizer, settings.longest if settings else None)
    calibration: Windows | None
    held_out: Windows | HeldOutTexts | None
    calibration, held_out = (encoder_texts if encoder else calibration_and_held_out)(
        tokenizer, text, None, TextOptions(), longest=longest
    )
    if tokenizer is None or calibration is None or held_out is None:
        raise SystemExit(f"{name} has no tokenizer, or {text} no text to read")
    dense = captured(source)
    Pipeline((Canonicalize(),)).run(dense, verify=0)
    asked = []
    if questions and not encoder:
        documents = read_documents(text, split="held-out")
        asked = [multiple_choice(kind, documents, tokenizer, questions) for kind in KINDS]
    return Subject(name, source, dense, calibration, held_out, tuple(asked), settings.pooling if settings else None)


@contextmanager
def statistics_once(subject: Subject) -> Iterator[None]:
    """Statistics of the dense model are gathered once, and given again to every pass that asks for them.

    They take most of a row's time, and are the same in each. Passes import the two functions by name; so every module
    that did is given others meanwhile.
    """
    real: dict[str, Callable[..., Any]] = {"stream_moments": stream_moments, "stream_covariances": stream_covariances}
    known: dict[str, list[dict[str, Any]]] = {}

    def once(
        name: str, program: Program, windows: torch.Tensor, names: Any, **options: Any
    ) -> Iterator[dict[str, Any]]:
        progress = options.pop("progress", None)
        if len(program.edits) != len(subject.dense.edits) or options.get("follow_edits"):
            yield from real[name](program, windows, names, progress=progress, **options)
            return
        usual = inspect.signature(real[name]).parameters
        unusual = {option: value for option, value in options.items() if value is not usual[option].default}
        key = f"{name} {sorted((option, str(value)) for option, value in unusual.items())}"
        if key not in known:
            every = [layer.weight for layer in linear_layers(subject.dense)]
            known[key] = list(real[name](subject.dense, windows, every, progress=progress, **options))
        for group in known[key]:
            if asked := {weight: found for weight, found in group.items() if weight in set(names)}:
                yield asked

    with ExitStack() as stack:
        for module in [module for name, module in sys.modules.items() if name.startswith("skink.passes.")]:
            for name in real.keys() & vars(module).keys():
                stack.enter_context(patch.object(module, name, partial(once, name)))
        yield


def passes_of(recipe: str) -> tuple[Pass, ...]:
    """The passes of a recipe. Raises SkinkError where this Skink has none such."""
    return load_recipe(recipe).passes


def compressed(subject: Subject, recipe: str) -> tuple[Program, tuple[LayerRecord, ...]]:
    """What a recipe makes of the model."""
    program = subject.dense.clone()
    result = Pipeline(passes_of(recipe), start=Stage.CANONICAL).run(
        program, calibration=subject.calibration.tokens, padding=subject.calibration.padding, verify=0
    )
    return program, tuple(result.layers)


def quality(subject: Subject, program: Program, *, ask: bool) -> dict[str, Any]:
    """Perplexity and, where it is asked, accuracy of a decoder; agreement with the source of an encoder."""
    model = subject.model(program)
    if isinstance(subject.held_out, HeldOutTexts):
        embeds = program.outputs[0] == "last_hidden_state"
        models = {"source": subject.source, "result": model}
        found = encoder_quality(models, subject.held_out, subject.pooling, embeds=embeds)["result"]
        return {"measures": {entry.name: entry.value for entry in found}}
    measured = perplexity(model, subject.held_out.tokens)
    accuracies = {each.kind: asdict(answer(model, each)) for each in subject.questions if ask}
    return {"perplexity": measured.value, "nats": measured.nats_per_token, "accuracies": accuracies}


def measure(subject: Subject, recipe: str, *, ask: bool) -> dict[str, Any]:
    """One row: sizes, predicted loss and quality; `recipe` may be empty."""
    begun = time.perf_counter()
    program, layers = compressed(subject, recipe)
    edited = [layer for layer in layers if layer.decision != "kept dense"]
    known = [layer.predicted_loss for layer in edited if layer.predicted_loss is not None]
    dense, cost = program_cost(subject.dense), program_cost(program)
    return {
        "recipe": recipe,
        "settings": subject.settings,
        "kept": cost.linear_parameters / dense.linear_parameters,
        "macs": cost.linear_macs_per_token / dense.linear_macs_per_token,
        "predicted": sum(known) if known and len(known) == len(edited) else None,
        **quality(subject, program, ask=ask),
        "seconds": time.perf_counter() - begun,
    }


def matrices(subject: Subject, recipe: str, windows: int) -> list[dict[str, Any]]:
    """Predicted beside measured for every matrix that a recipe changes, each replaced alone."""
    program, layers = compressed(subject, recipe)
    if not isinstance(subject.held_out, Windows):
        return []
    tokens = subject.held_out.tokens
    some = tokens[torch.linspace(0, len(tokens) - 1, min(windows, len(tokens))).long()]

    def nats(candidate: Program) -> float:
        return perplexity(subject.model(candidate), some).nats_per_token

    found = layer_losses(
        subject.dense, program, layers, nats, progress=lambda done, of: print(f"{done}/{of}", end="\r")
    )
    return [
        {"name": each.name, "shape": each.shape, "rank": each.rank, "predicted": each.predicted_loss,
         "measured": found[each.name]}
        for each in layers if each.name in found
    ]  # fmt: skip


class Rows:
    """Rows by recipe, kept in a file where one is named."""

    def __init__(self, path: Path | None, settings: Mapping[str, str]) -> None:
        self.path = path
        self.rows: dict[str, dict[str, Any]] = {}
        if path is not None and path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                if row["settings"] == settings:
                    self.rows[row["recipe"]] = row

    def get(self, subject: Subject, recipe: str, *, ask: bool) -> dict[str, Any]:
        """A row, measured if it is not known, or if questions should be asked and were not."""
        if recipe not in self.rows or (ask and not self.rows[recipe].get("accuracies", True)):
            self.rows[recipe] = measure(subject, recipe, ask=ask)
            if self.path is not None:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(self.rows[recipe]) + "\n")
        return self.rows[recipe]


def table(title: str, heads: list[str], rows: list[list[str]]) -> str:
    """A Markdown table under a heading."""
    lines = [f"## {title}", "", f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows), ""])


def added(row: Mapping[str, Any], dense: Mapping[str, Any]) -> str:
    """Predicted and measured nats per token."""
    predicted = MISSING if row["predicted"] is None else f"{row['predicted']:.4f}"
    return f"{predicted} / {row['nats'] - dense['nats']:.4f}"


def accuracy(row: Mapping[str, Any], dense: Mapping[str, Any], kind: str) -> str:
    """A percentage, and the paired difference to the dense model with its standard error."""
    if kind not in row["accuracies"]:
        return MISSING
    kinds = [each["accuracies"][kind] for each in (dense, row)]
    first, second = (Accuracy(**(found | {"correct": tuple(found["correct"])})) for found in kinds)
    difference = paired(first, second)
    return f"{100 * second.value:.1f} ({100 * difference.value:+.1f} ± {100 * difference.standard_error:.1f})"


def ratio(row: Mapping[str, Any], dense: Mapping[str, Any]) -> str:
    """The perplexity over the dense model's."""
    return f"{row['perplexity'] / dense['perplexity']:.4f}"


def agreement(row: Mapping[str, Any], name: str) -> str:
    """One measure of an encoder."""
    return f"{row['measures'][name]:.4f}"


def sections(dense: Mapping[str, Any], rows: Mapping[str, Mapping[float, Any]], keeps: list[float]) -> list[str]:
    """Every table of methods by shares."""

    def grid(title: str, cell: Callable[[Any], str]) -> str:
        lines = [[name, *(cell(row[keep]) if keep in row else MISSING for keep in keeps)] for name, row in rows.items()]
        return table(title, ["method", *(f"{keep:.0%}" for keep in keeps)], lines)

    found = []
    if "perplexity" in dense:
        found.append(
            grid(f"Held-out perplexity over the dense model's {dense['perplexity']:.4f}", partial(ratio, dense=dense))
        )
        found.append(grid("Loss added, predicted / measured, nats per token", partial(added, dense=dense)))
        for kind, known in dense["accuracies"].items():
            title = (
                f"Accuracy, {kind}, in per cent (dense {100 * known['value']:.1f}; in brackets the paired difference)"
            )
            found.append(grid(title, partial(accuracy, dense=dense, kind=kind)))
    found += [grid(name, partial(agreement, name=name)) for name in dense.get("measures", ())]
    return [*found, grid("Linear parameters kept", lambda row: f"{row['kept']:.1%}")]


def matrix_section(recipe: str, found: list[dict[str, Any]], windows: int) -> str:
    """The table of single matrices, and how well the prediction orders and sizes them."""
    rows = [
        [entry["name"], " x ".join(map(str, entry["shape"])), str(entry["rank"]),
         MISSING if entry["predicted"] is None else f"{entry['predicted']:.6f}", f"{entry['measured']:.6f}"]
        for entry in found
    ]  # fmt: skip
    pairs = [(entry["predicted"], entry["measured"]) for entry in found if entry["predicted"] is not None]
    text = table(f"Every matrix alone: `{recipe}`", ["matrix", "out x in", "rank", "predicted", "measured"], rows)
    if len(pairs) > 2:
        both = torch.tensor(pairs, dtype=torch.float64)
        ranks = both.argsort(dim=0).argsort(dim=0).double()
        order = float(torch.corrcoef(ranks.T)[0, 1])
        total = both.sum(dim=0)
        text += (
            f"\nNats per token on {windows} of the held-out windows. Sums: predicted {total[0]:.4f}, measured "
            f"{total[1]:.4f}. Rank correlation over {len(pairs)} matrices: {order:.3f}.\n"
        )
    return text


def command(arguments: argparse.Namespace) -> str:
    """The command line that gives this table, without files of this machine."""
    line = f"python benchmarks/quality/low_rank.py --model {Path(arguments.model).name} --keeps {arguments.keeps}"
    line += f" --questions {arguments.questions} --threads {arguments.threads}"
    line += f" --questions-at {arguments.questions_at}" if arguments.questions_at else ""
    return line + f" --matrices {arguments.matrices!r} --matrix-windows {arguments.matrix_windows}"


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="stdlib-llama")
    parser.add_argument("--text", default="stdlib", help="to calibrate on; a part is held out")
    parser.add_argument("--keeps", default=",".join(map(str, KEEPS)))
    parser.add_argument("--only", default="*", help="shell-style pattern on the methods' names")
    parser.add_argument("--questions", type=int, default=100, help="of each kind; 0: none")
    parser.add_argument("--questions-at", help="shares of --keeps that questions are asked at; all by default")
    parser.add_argument("--matrices", default="low-rank{keep=0.6,allocation=uniform}", help="empty: none")
    parser.add_argument("--matrix-windows", type=int, default=16)
    parser.add_argument("--rows", type=Path, help="a file of rows, one JSON object a line")
    parser.add_argument("--known", action="store_true", help="measure no row that the file of rows lacks")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keeps = [float(keep) for keep in arguments.keeps.split(",")]
    asked = keeps if arguments.questions_at is None else [float(keep) for keep in arguments.questions_at.split(",")]
    asked = asked if arguments.questions else []
    with quiet_transformers(), ExitStack() as stack:
        subject = load(arguments.model, arguments.questions, arguments.text)
        stack.enter_context(statistics_once(subject))
        kept = Rows(arguments.rows, subject.settings)
        dense = kept.get(subject, "", ask=bool(asked) and not arguments.known)
        rows: dict[str, dict[float, Any]] = {}
        notes: list[str] = []
        for name, template in METHODS.items():
            if not fnmatchcase(name, arguments.only):
                continue
            for keep in keeps:
                recipe = template.replace("{keep}", f"{keep:g}")
                if arguments.known and recipe not in kept.rows:
                    notes.append(f"Not measured yet: {name} at {keep:g}.")
                    continue
                try:
                    row = kept.get(subject, recipe, ask=keep in asked and not arguments.known)
                except SkinkError as error:
                    notes.append(f"Left out: {name} at {keep:g}: {error.what}")
                    continue
                rows.setdefault(name, {})[keep] = row
                summary = f"{row['perplexity'] / dense['perplexity']:.4f}" if "perplexity" in row else row["measures"]
                print(f"{name:<36} {keep:g}  kept {row['kept']:.3f}  {summary}  in {row['seconds']:.1f} s", flush=True)
        single = matrices(subject, arguments.matrices, arguments.matrix_windows) if arguments.matrices else []
    if arguments.json:
        print(json.dumps({"dense": dense, "rows": rows, "matrices": single, "notes": notes}))
        return
    here = machine()
    about = [*subject.settings.items(), ("machine", str(here)), ("threads", str(arguments.threads))]
    text = "\n".join(
        [
            f"# Low rank without training: {Path(arguments.model).name}", "",
            f"    {command(arguments)}", "",
            "Columns: the share of the linear layers' parameters that was asked for.", "",
            *sections(dense, rows, keeps),
            *([matrix_section(arguments.matrices, single, arguments.matrix_windows)] if single else []),
            *(f"{note}\n" for note in notes),
            table("Recipes", ["method", "recipe"], [[name, f"`{METHODS[name]}`"] for name in rows]),
            table("Measured with", ["what", "value"], [list(pair) for pair in about]),
        ]
    )  # fmt: skip
    if arguments.out is not None:
        arguments.out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
