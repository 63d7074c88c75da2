"""What recovery wins back: losses, what trains, and stages, each at its own best learning rates.

A model is compressed once. For each way to train it, short runs at several learning rates are judged by windows of the
held-out text that are judged on nowhere else; the best `--finalists` of them go the whole length, and all of these are
shown, since short runs like low rates better than long ones do. Text of the training split cannot choose: the model
that ships has read it before, and high rates look better there than they are. The dense model is trained in the same
way, on text alone and with itself as the teacher: it improves by training too, and at its own best is what the result
has to be compared with. Perplexity is of the held-out windows that the other tables use; nothing is chosen by them.

Rows are kept in the file of `--rows` as they come, and those that stand there already are not trained again.

    python benchmarks/quality/recovery.py [--model stdlib-llama] [--recipe 'low-rank{keep=0.6}'] [--tokens 2000000]
        [--trial 150000] [--finalists 5] [--only PATTERN] [--precision bfloat16] [--threads N] [--rows FILE]
        [--known] [--out FILE.md]
"""

import argparse
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
from rows import Rows, table

from skink.compression.compress import compress_program
from skink.compression.text_options import TextOptions
from skink.compression.texts import calibration_and_held_out, read_documents
from skink.compression.training_texts import training_windows
from skink.evaluation import Documents, machine, perplexity
from skink.evaluation.corpus import token_stream
from skink.export.huggingface import load_source, to_huggingface
from skink.graph.pipeline import Pipeline
from skink.graph.program import Program
from skink.graph.windows import Windows
from skink.passes.recipe import parse_passes


@dataclass(frozen=True)
class Way:
    """A way to train.

    Args:
        options: of `recover`.
        rates: learning rates that are tried.
        first: options of a stage before, which reads a quarter of all tokens; empty: there is none.
    """

    options: str
    rates: tuple[str, ...] = ("1e-5", "3e-5", "1e-4")
    first: str = ""


DENSE = "dense, "
_RATES = ("1e-5", "3e-5", "6e-5", "1e-4", "3e-4")
_OF_ADAPTERS = ("1e-4", "3e-4", "1e-3")
_BY_LAYER = "by=layer,train=all,learning_rate=3e-5"
WAYS = {
    DENSE + "cross-entropy": Way("ce=1,train=all", _RATES),
    DENSE + "half of each": Way("ce=0.5,kl=0.5,train=all", _RATES),
    "cross-entropy": Way("ce=1,train=all"),
    "KL to the original": Way("kl=1,train=all"),
    "half of each": Way("ce=0.5,kl=0.5,train=all", _RATES),
    "a quarter KL": Way("ce=0.75,kl=0.25,train=all"),
    "reverse KL": Way("reverse_kl=1,train=all"),
    "Jensen-Shannon": Way("js=1,train=all"),
    "cross-entropy, new weights": Way("ce=1,train=new"),
    "cross-entropy, adapters": Way("ce=1,train=lora", _OF_ADAPTERS),
    "KL, adapters": Way("kl=1,train=lora", _OF_ADAPTERS),
    "layer by layer": Way("by=layer,train=all"),
    "layer by layer, then cross-entropy": Way("ce=1,train=all", first=_BY_LAYER),
}

LENGTH = 512
_SHORT = "Learning rates, by nats per token of other text after the short run"
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


class Runs:
    """Finished runs by what they were.

    Args:
        subject: what trains.
        rows: where they are kept.
    """

    def __init__(self, subject: Subject, rows: Rows) -> None:
        self.subject, self.rows = subject, rows

    def get(self, start: str, stages: str, *, judge: bool) -> dict[str, Any]:
        """One run: nats per token of the text that rates are chosen by and, where asked, of the held-out text.

        Args:
            start: `dense` or `small`.
            stages: options of `recover`, of each stage, with " then " between; empty for no training.
            judge: whether to read the held-out text.
        """
        key = f"{start} {stages}"
        if key in self.rows and (not judge or "held_out" in self.rows[key]):
            return self.rows[key]
        subject = self.subject
        program = (subject.dense if start == "dense" else subject.small).clone()
        begun, training = time.perf_counter(), None
        if stages:
            passes = parse_passes(", ".join(map(recover, stages.split(" then "))))
            result = Pipeline(passes, start=program.stage).run(
                program, training=subject.text, original=subject.dense, verify=0, progress=said, status=status
            )
            training = result.passes[-1].result.training
        row: dict[str, Any] = {"seconds": time.perf_counter() - begun, "training": training}
        row["validation"] = subject.nats(program, subject.validation)
        if judge:
            row["held_out"] = subject.nats(program, subject.held_out)
        print(f"\n{key}: {row['validation']:.4f} in {row['seconds']:.0f} s", file=sys.stderr)
        return self.rows.add(key, row)


def status(text: str) -> None:
    """What a run is at, on one line."""
    print(f"\r{text}   ", end="", file=sys.stderr)


def recover(options: str) -> str:
    """A stage as a line of a recipe, that chooses nothing by the held-out text."""
    return f"recover{{{options}}}" if "by=layer" in options else f"recover{{{options},evaluate_every=0}}"


def stages_of(way: Way, precision: str, rate: str, tokens: int) -> str:
    """The stages of a run, as `Rows.get` takes them."""
    common = f"precision={precision}"
    if not way.first:
        return f"{way.options},{common},learning_rate={rate},tokens={tokens}"
    first = tokens // 4
    return (
        f"{way.first},{common},tokens={first} then {way.options},{common},learning_rate={rate},tokens={tokens - first}"
    )


def by_short_runs(done: Runs, start: str, way: Way, arguments: argparse.Namespace) -> dict[str, float]:
    """Nats per token of other text after a short run at each rate, the best first."""
    runs = {rate: stages_of(way, arguments.precision, rate, arguments.trial) for rate in way.rates}
    found = {
        rate: float(done.get(start, stages, judge=False)["validation"])
        for rate, stages in runs.items()
        if not arguments.known or f"{start} {stages}" in done.rows
    }
    return dict(sorted(found.items(), key=lambda entry: entry[1]))


def report(arguments: argparse.Namespace, done: Runs, runs: list[dict[str, Any]], trials: list[list[str]]) -> str:
    """The page, as Markdown."""
    untrained, small = done.get("dense", "", judge=True), done.get("small", "", judge=True)
    dense = [row for row in runs if row["name"].startswith(DENSE)]
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
            f"--finalists {arguments.finalists} --precision {arguments.precision} --threads {arguments.threads}",
            "",
            table("", heads, lines),
            table(_SHORT, ["model and loss", "rate: nats"], trials),
            f"Trained on {done.subject.text.source}; judged on {done.subject.held_out.source}, "
            f"{' x '.join(map(str, done.subject.held_out.tokens.shape))} tokens. {computer.processor}, "
            f"{computer.threads} threads, {computer.python}, PyTorch {computer.torch}.",
            "",
        ]
    )


def main() -> None:
    """Runs what is asked for and prints the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="stdlib-llama")
    parser.add_argument("--recipe", default="low-rank{keep=0.6}")
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--trial", type=int, default=150_000, help="tokens of the short runs")
    parser.add_argument("--finalists", type=int, default=5, help="how many rates go the whole length; by default all")
    parser.add_argument("--only", default="*", help="shell-style pattern on the names of ways")
    parser.add_argument("--precision", default="bfloat16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rows", type=Path, help="a file of rows, one JSON object a line")
    parser.add_argument("--known", action="store_true", help="what the file of rows has, and no more")
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
    kept = Rows(arguments.rows, settings, "key")
    done = Runs(subject, kept)
    runs: list[dict[str, Any]] = []
    trials: list[list[str]] = []
    for name, way in WAYS.items():
        if not name.startswith(DENSE) and not fnmatchcase(name, arguments.only):
            continue
        start = "dense" if name.startswith(DENSE) else "small"
        found = by_short_runs(done, start, way, arguments)
        if found:
            trials.append([name, ", ".join(f"{rate}: {found[rate]:.4f}" for rate in way.rates if rate in found)])
        for rate in way.rates if arguments.known else list(found)[: arguments.finalists]:
            stages = stages_of(way, arguments.precision, rate, arguments.tokens)
            if not arguments.known or f"{start} {stages}" in done.rows:
                runs.append({**done.get(start, stages, judge=True), "name": name, "rate": rate})
    page = report(arguments, done, runs, trials)
    print(page)
    if arguments.out is not None:
        arguments.out.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
