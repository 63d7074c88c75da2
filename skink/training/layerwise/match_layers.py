"""Train a program layer by layer, each on what the original's layer receives and gives.

The text goes through the original once, layer after layer; between layers only the values that the next ones read are
held, for the whole text (`streams`). Where a group of layers is reached, each of its layers in the program is trained
to turn what the original's layer receives into what it gives (`layer`); then the original's values go on. No layer
waits for another: they could train in any order, and in several processes each takes its share of the groups.

So memory holds, beside the weights of both programs: float32 weights, gradients and AdamW's state of one group, the
insides of one layer for one micro-batch, and the values between two layers.

Sources: Romero et al. 2014 (arXiv 1412.6550, section 2.2: hints, a layer of the student held to one of the teacher);
Bick et al. 2024 (arXiv 2408.10189, hidden-state alignment: each block from the teacher's own input).
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from skink.errors import OptionError, RecoveryError, check_range
from skink.graph.program import Program
from skink.graph.windows import Windows
from skink.training.layerwise.layer import hidden_targets, reaching, targets_among
from skink.training.layerwise.pieces import cut_pieces
from skink.training.layerwise.record import KINDS, MatchingRecord
from skink.training.layerwise.run import Job, LayerRun
from skink.training.loop.options import TrainOptions
from skink.training.loop.processes import processes
from skink.training.loop.steps import check_text
from skink.training.losses.objectives import Terms
from skink.training.losses.places import corresponding
from skink.training.weights.trainable import trainable_names


def match_layers(
    original: Program,
    program: Program,
    text: Windows,
    options: TrainOptions,
    *,
    terms: Terms,
    train: str | Sequence[str] = "new",
    ignore: Sequence[str] = (),
    patterns: Sequence[str] = (),
    layers_at_once: int = 1,
    held_bytes: int = 2 * 2**30,
    checkpoints: Path | None = None,
    identity: str = "",
    progress: Callable[[int, int], None] | None = None,
    status: Callable[[str], None] | None = None,
) -> MatchingRecord:
    """Train weights of `program` to let each layer do what the original's does; their new values are put in place.

    Embeddings, heads, and whatever else lies outside the layers or is read in more than one part of the model, stay.

    Args:
        original: canonical; runs as it is.
        program: what has become of it.
        text: windows; those that the steps read.
        options: how long and how, for each layer; evaluation is left out. `micro_batch=0` is the whole batch.
        terms: weights of `hidden` and `attention`.
        train: see `trainable_names`.
        ignore: likewise.
        patterns: of the places to match, see `places.corresponding`; layers without one stay as they are.
        layers_at_once: layers that train in one reading of the text, each with its own optimizer; 0: all. It decides
            about memory and time, and changes numbers by rounding only.
        held_bytes: most bytes of values between layers that are held in memory; others are in temporary files.
        checkpoints: the folder in which the run has its own; None: nothing is kept. Each layer that is finished is
            there, and a run that begins again goes on behind it.
        identity: of all that the run's numbers hang on, in hexadecimal; needed with `checkpoints`.
        progress: told (done, to do), in micro-batches, in process 0.
        status: told the layer, its loss and the time left, in process 0.

    Raises:
        OptionError: OPTION-002 for other terms, or sharding.
        OutputError: OUTPUT-002 where there is no space for values or checkpoints.
        RecoveryError: RECOVER-001 where nothing trains, -003 not finite, -004 no checkpoint that can be read, -007 no
            layers that correspond, -008 no text, -010 a weight beyond its dtype.
    """
    _check(terms, options, layers_at_once, held_bytes)
    check_text(text)
    if checkpoints is not None and not identity:
        raise ValueError("checkpoints of layers need an identity")
    names = trainable_names(program, original, train, ignore=ignore)
    jobs = _jobs(original, program, names, terms, patterns)
    device = next((tensor.device for _, tensor in program.weights()), torch.device("cpu"))
    with processes(device, "none") as group:
        folder = checkpoints / f"recover-{identity[:12]}" if checkpoints else None
        weights = (terms.hidden, terms.attention)
        run = LayerRun(original, program, text, options, weights, jobs, group, held_bytes, folder, identity)
        if group.main:
            run.progress, run.status = progress, status
        return run.go(layers_at_once or len(jobs))


def _check(terms: Terms, options: TrainOptions, layers_at_once: int, held_bytes: int) -> None:
    check_range("layers_at_once", layers_at_once, low=0, high=1 << 20)
    check_range("held_bytes", held_bytes, low=0, high=float("inf"))
    others = [name for name in terms.weights() if name not in KINDS]
    if others:
        raise OptionError(
            "OPTION-002",
            f"layer by layer there is no {others[0]}: single layers give no logits.",
            fix="give weights to hidden and attention only, or do not train layer by layer.",
        )
    if options.sharding != "none":
        raise OptionError(
            "OPTION-002",
            f"layer by layer, sharding={options.sharding} has no use: processes take layers in turn.",
            fix="leave sharding out.",
        )


def _jobs(
    original: Program, program: Program, names: Sequence[str], terms: Terms, patterns: Sequence[str]
) -> list[Job]:
    attention = corresponding(original, program, "attention", patterns) if terms.attention else []
    # Without patterns every layer is held to all that it hands on.
    hidden = corresponding(original, program, "hidden", patterns) if terms.hidden and patterns else []
    jobs = []
    for piece in cut_pieces(original, program, names):
        targets = targets_among(original, piece, hidden, 0) if patterns or not terms.hidden else hidden_targets(piece)
        targets += targets_among(original, piece, attention, 1)
        jobs.append(Job(reaching(program, piece, targets), targets))
    while jobs and not jobs[-1].trains:
        jobs.pop()
    if not jobs:
        raise RecoveryError(
            "RECOVER-001",
            "layer by layer there is nothing to train: what may train lies outside the layers, or is shared with it.",
            why=f"it is {', '.join(names[:6])}{', ...' if len(names) > 6 else ''}.",
            fix="choose weights of the layers, or train on the logits: kl.",
        )
    return jobs
