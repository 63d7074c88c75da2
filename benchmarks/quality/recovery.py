"""What recovery wins back: losses compared at their own best learning rates, and the dense model trained equally long.

A model is compressed once. For each loss, short runs at several learning rates are judged by windows of the held-out
text that are judged on nowhere else; the best `--finalists` of them go the whole length, and all of these are shown,
since short runs like low rates better than long ones do. Text of the training split cannot
choose: the model that ships has read it before, and high rates look better there than they are. The dense model is
trained in the same way with cross-entropy: it improves by training too, and at its own best rate is what the result has
to be compared with. Perplexity is of the held-out windows that the other tables use; nothing is chosen by them.

Rows are kept in the file of `--rows` as they come, and those that stand there already are not trained again.

    python benchmarks/quality/recovery.py [--model stdlib-llama] [--recipe 'low-rank{keep=0.6}'] [--tokens 2000000]
        [--trial 150000] [--rates 1e-5,3e-5,1e-4] [--finalists 2] [--only PATTERN] [--train all]
        [--precision bfloat16] [--threads N] [--rows FILE] [--known] [--out FILE.md]
"""

import argparse
import json
import math
import platform
import sys
import time
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from skink.compression.compress import compress_program
from skink.compression.texts import TextOptions, calibration_and_held_out, read_documents
from skink.compression.training_texts import training_windows
from skink.evaluation import Documents, machine, perplexity
from skink.evaluation.corpus import token_stream
from skink.export.huggingface import load_source, to_huggingface
from skink.graph.pipeline import Pipeline
from skink.graph.program import Program
from skink.graph.windows import Windows
from skink.passes.recipe import parse_passes

# What each compared loss is, as options of `recover`.
LOSSES = {
    "cross-entropy": "ce=1",
    "KL to the original": "kl=1",
    "half of each": "ce=0.5,kl=0.5",
    "a quarter KL": "ce=0.75,kl=0.25",
    "reverse KL": "reverse_kl=1",
    "Jensen-Shannon": "js=1",
}
DENSE = "dense, cross-entropy"

LENGTH = 512
# Windows that rates are chosen by.
_VALIDATION = 48


@dataclass(frozen=True)
class Subject:
    """A model before and after compression, and its texts.

    Args:
        source: the model, of transformers.
        dense: its program.
        small: the compressed program.
        text: to train on.
        validation: to choose rates by.
        held_out: to judge on.
    """

    source: Any
    dense: Program
    small: Program
    text: Windows
    validation: Windows
    held_out: Windows

    def nats(self, program: Program, windows: Windows) -> float:
        """Nats per token."""
        model = to_huggingface(program, self.source.config, copy=False)
        return perplexity(model, windows.tokens).nats_per_token


def load(name: str, recipe: str, tokens: int) -> Subject:
    """Load and compress the model, and cut its texts."""
    source, tokenizer = load_source(name)
    source = source.float()
    calibration, held_out = calibration_and_held_out(tokenizer, "stdlib", None, TextOptions(), longest=LENGTH)
    text = training_windows(tokenizer, "stdlib", length=LENGTH, tokens=tokens)
    if calibration is None or held_out is None:
        raise SystemExit("there is no text")
    done = compress_program(source, recipe, calibration=calibration.tokens, progress=said)
    validation = Windows(between(read_documents("stdlib", split="held-out"), tokenizer, held_out), held_out.source)
    return Subject(source, done.dense, done.program, text, validation, held_out)


def between(documents: Documents, tokenizer: Any, held_out: Windows) -> torch.Tensor:
    """Windows of held-out text that share no token with those that are judged on: int64[N, LENGTH]."""
    stream = token_stream(documents, tokenizer)
    windows = stream[: len(stream) // LENGTH * LENGTH].view(-1, LENGTH)
    # They were cut from the same stream, evenly spaced.
    count = len(held_out.tokens)
    starts = [index * (len(stream) - LENGTH) // (count - 1) for index in range(count)]
    if not all(torch.equal(stream[at : at + LENGTH], row) for at, row in zip(starts, held_out.tokens, strict=True)):
        raise SystemExit("the windows that are judged on lie elsewhere than expected")
    touched = {at // LENGTH + step for at in starts for step in (0, 1)}
    free = [index for index in range(len(windows)) if index not in touched]
    return windows[free[:: len(free) // _VALIDATION][:_VALIDATION]]


def said(name: str, done: int, total: int) -> None:
    """Progress, on one line."""
    print(f"\r{name} {done}/{total}   ", end="", file=sys.stderr)


class Rows:
    """Finished runs by what they were, kept in a file where one is named."""

    def __init__(self, subject: Subject, path: Path | None, settings: dict[str, str]) -> None:
        self.subject, self.path, self.settings = subject, path, settings
        self.rows: dict[str, dict[str, Any]] = {}
        for line in path.read_text(encoding="utf-8").splitlines() if path is not None and path.exists() else ():
            row = json.loads(line)
            if row["settings"] == settings:
                self.rows[row["key"]] = row

    def get(self, start: str, options: str, *, judge: bool) -> dict[str, Any]:
        """One run: nats per token of the text that rates are chosen by and, where asked, of the held-out text.

        Args:
            start: `dense` or `small`.
            options: of `recover`; empty for no training.
            judge: whether to read the held-out text.
        """
        key = f"{start} {options}"
        row = self.rows.get(key)
        if row is not None and (not judge or "held_out" in row):
            return row
        subject = self.subject
        program = (subject.dense if start == "dense" else subject.small).clone()
        begun, training = time.perf_counter(), None
        if options:
            passes = parse_passes(f"recover{{{options},evaluate_every=0}}")
            result = Pipeline(passes, start=program.stage).run(
                program, training=subject.text, original=subject.dense, verify=0, progress=said, status=status
            )
            training = result.passes[-1].result.training
        seconds = time.perf_counter() - begun
        row = {"key": key, "settings": self.settings, "seconds": seconds, "training": training}
        row["validation"] = subject.nats(program, subject.validation)
        if judge:
            row["held_out"] = subject.nats(program, subject.held_out)
        self.rows[key] = row
        print(f"\n{key}: {row['validation']:.4f} {row.get('held_out', math.nan):.4f} {seconds:.0f} s", file=sys.stderr)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        return row


def status(text: str) -> None:
    """What a run is at, on one line."""
    print(f"\r{text}   ", end="", file=sys.stderr)


def by_short_runs(rows: Rows, start: str, loss: str, common: str, rates: list[str], trial: int) -> dict[str, float]:
    """Nats per token of other text after a short run at each rate, the best first."""
    found = {
        rate: rows.get(start, f"{loss},{common},learning_rate={rate},tokens={trial}", judge=False)["validation"]
        for rate in rates
    }
    return dict(sorted(found.items(), key=lambda entry: entry[1]))


def report(arguments: argparse.Namespace, rows: Rows, runs: list[dict[str, Any]], trials: list[list[str]]) -> str:
    """The page, as Markdown."""
    untrained, small = rows.get("dense", "", judge=True), rows.get("small", "", judge=True)
    dense = [row for row in runs if row["name"] == DENSE]
    fair = min(dense, key=lambda row: float(row["validation"]), default=untrained)

    def cells(name: str, row: dict[str, Any], rate: str, tokens: int) -> list[str]:
        ratios = [math.exp(row["held_out"] - other["held_out"]) for other in (untrained, fair)]
        values = [f"{math.exp(row['held_out']):.4f}", *(f"{ratio:.4f}" for ratio in ratios)]
        return [name, rate, f"{tokens:,}", *values, f"{row['validation']:.4f}", f"{row['seconds']:.0f}"]

    lines = [
        cells("dense, as it ships", untrained, "-", 0),
        cells(f"`{arguments.recipe}`", small, "-", 0),
        *(cells(row["name"], row, row["rate"], arguments.tokens) for row in runs),
    ]
    heads = ["model and loss", "rate", "tokens", "perplexity", "over dense", "over dense trained equally long"]
    heads += ["nats of other text", "s"]
    computer = machine()
    return "\n".join(
        [
            f"# Recovery of {Path(arguments.model).name}",
            "",
            "    python benchmarks/quality/recovery.py "
            f"--recipe '{arguments.recipe}' --tokens {arguments.tokens} --trial {arguments.trial} "
            f"--rates {arguments.rates} --finalists {arguments.finalists} --train {arguments.train} "
            f"--precision {arguments.precision} --threads {arguments.threads}",
            "",
            *table(heads, lines),
            "## Learning rates, by nats per token of other text after the short run",
            "",
            *table(["model and loss", *arguments.rates.split(",")], trials),
            f"Trained on {rows.subject.text.source}; judged on {rows.subject.held_out.source}, "
            f"{' x '.join(map(str, rows.subject.held_out.tokens.shape))} tokens. {computer.processor}, "
            f"{computer.threads} threads, {computer.python}, PyTorch {computer.torch}.",
            "",
        ]
    )


def table(heads: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table, and a blank one."""
    lines = [heads, ["---"] * len(heads), *rows]
    return [*(f"| {' | '.join(line)} |" for line in lines), ""]


def main() -> None:
    """Runs what is asked for and prints the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="stdlib-llama")
    parser.add_argument("--recipe", default="low-rank{keep=0.6}")
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--trial", type=int, default=150_000, help="tokens of the short runs")
    parser.add_argument("--rates", default="1e-5,3e-5,1e-4")
    parser.add_argument("--finalists", type=int, default=2, help="how many rates go the whole length")
    parser.add_argument("--only", default="*", help="shell-style pattern on the losses' names")
    parser.add_argument("--train", default="all", help="all, new or lora")
    parser.add_argument("--precision", default="bfloat16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rows", type=Path, help="a file of rows, one JSON object a line")
    parser.add_argument("--known", action="store_true", help="no long run that the file of rows lacks")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    subject = load(arguments.model, arguments.recipe, arguments.tokens)
    settings = {
        "recipe": arguments.recipe,
        "text": f"{subject.text.sha256[:12]} {subject.text.tokens.numel()}",
        "torch": version("torch"),
        "python": platform.python_version(),
    }
    rows = Rows(subject, arguments.rows, settings)
    rates = arguments.rates.split(",")
    runs: list[dict[str, Any]] = []
    trials: list[list[str]] = []
    for name, loss in {DENSE: "ce=1", **LOSSES}.items():
        if name != DENSE and not fnmatchcase(name, arguments.only):
            continue
        start = "dense" if name == DENSE else "small"
        # The dense model has no new parameters: all of it trains, unless adapters do.
        train = "all" if name == DENSE and arguments.train == "new" else arguments.train
        common = f"train={train},precision={arguments.precision}"
        found = by_short_runs(rows, start, loss, common, rates, arguments.trial)
        trials.append([name, *(f"{found[rate]:.4f}" for rate in rates)])
        for rate in list(found)[: arguments.finalists]:
            options = f"{loss},{common},learning_rate={rate},tokens={arguments.tokens}"
            if not arguments.known or f"{start} {options}" in rows.rows:
                runs.append({**rows.get(start, options, judge=True), "name": name, "rate": rate})
    page = report(arguments, rows, runs, trials)
    print(page)
    if arguments.out is not None:
        arguments.out.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
