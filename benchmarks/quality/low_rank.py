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
import json
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from low_rank_subject import Subject, load, statistics_once
from low_rank_tables import matrix_section, sections
from rows import Rows, table

from skink.cli.quiet import quiet_transformers
from skink.compression.layer_losses import layer_losses
from skink.compression.quality import encoder_loss, encoder_quality
from skink.compression.texts import HeldOutTexts
from skink.errors import SkinkError
from skink.evaluation import answer, machine, perplexity
from skink.graph.cost import program_cost
from skink.graph.objective import loss_unit
from skink.graph.passes import LayerRecord, Pass
from skink.graph.pipeline import Pipeline
from skink.graph.program import Program, Stage
from skink.graph.windows import Windows
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
        models = {"source": subject.model(subject.dense), "result": model}
        found = encoder_quality(models, subject.held_out, subject.pooling, program.outputs)["result"]
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
        "kept": cost.linear_parameters / dense.linear_parameters,
        "macs": cost.linear_macs_per_token / dense.linear_macs_per_token,
        "predicted": sum(known) if known and len(known) == len(edited) else None,
        **quality(subject, program, ask=ask),
        "seconds": time.perf_counter() - begun,
    }


def row_of(rows: Rows, subject: Subject, recipe: str, *, ask: bool) -> dict[str, Any]:
    """A row, measured if it is not known, or if questions should be asked and were not."""
    if recipe in rows and (not ask or rows[recipe].get("accuracies", True)):
        return rows[recipe]
    return rows.add(recipe, measure(subject, recipe, ask=ask))


def matrices(subject: Subject, recipe: str, windows: int) -> list[dict[str, Any]]:
    """Predicted beside measured for every matrix that a recipe changes, each replaced alone."""
    program, layers = compressed(subject, recipe)
    source = subject.model(subject.dense)

    def loss(candidate: Program) -> float:
        model = subject.model(candidate)
        if isinstance(subject.held_out, HeldOutTexts):
            return encoder_loss(source, model, subject.held_out, candidate.outputs)
        return perplexity(model, some_windows(subject.held_out, windows)).nats_per_token

    found = layer_losses(
        subject.dense, program, layers, loss, progress=lambda done, of: print(f"{done}/{of}", end="\r")
    )
    return [
        {"name": each.name, "shape": each.shape, "rank": each.rank, "predicted": each.predicted_loss,
         "measured": found[each.name]}
        for each in layers if each.name in found
    ]  # fmt: skip


def some_windows(held_out: Windows, count: int) -> torch.Tensor:
    """That many windows, evenly spaced: int64[count, T], fewer where there are fewer."""
    tokens = held_out.tokens
    return tokens[torch.linspace(0, len(tokens) - 1, min(count, len(tokens))).long()]


def matrices_about(subject: Subject, windows: int) -> str:
    """In what and on what single matrices are measured, in words that go after a number."""
    text = "all held-out texts" if isinstance(subject.held_out, HeldOutTexts) else f"{windows} held-out windows"
    return f"{loss_unit(subject.dense)}, on {text}"


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
        kept = Rows(arguments.rows, subject.settings, "recipe")
        dense = row_of(kept, subject, "", ask=bool(asked) and not arguments.known)
        rows: dict[str, dict[float, Any]] = {}
        notes: list[str] = []
        for name, template in METHODS.items():
            if not fnmatchcase(name, arguments.only):
                continue
            for keep in keeps:
                recipe = template.replace("{keep}", f"{keep:g}")
                if arguments.known and recipe not in kept:
                    notes.append(f"Not measured yet: {name} at {keep:g}.")
                    continue
                try:
                    row = row_of(kept, subject, recipe, ask=keep in asked and not arguments.known)
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
            *([matrix_section(arguments.matrices, single, matrices_about(subject, arguments.matrix_windows))]
              if single else []),
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
