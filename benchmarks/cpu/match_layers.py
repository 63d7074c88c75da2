"""What layer-by-layer matching holds in memory beside the model, for models of one width and more and more layers.

Each run is a process of its own: a LLaMA with random weights is captured, every linear layer is put into two random
factors (half of its parameters), and `match_layers` trains the factors for a few steps. "above" is the most that the
process held (VmHWM, reset when everything was loaded) less what it held at that moment, weights of both programs
included. It is compared with what the method should hold:

    state        float32 weights that train, gradients, two moments of AdamW: 16 bytes for each weight of the group
    held         the residual stream of the text, once
    activations  all that the layers of the group compute on one micro-batch, each value once

    python benchmarks/cpu/match_layers.py [--layers 8 32] [--at-once N] [--hidden 1024] [--inner 2816] [--json]
"""

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from skink.evaluation import machine
from skink.graph.capture import capture
from skink.graph.pipeline import Pipeline
from skink.graph.program import Program
from skink.graph.regions import plan_region
from skink.graph.rewriter import Rewriter
from skink.graph.windows import Windows
from skink.passes.canonicalize import Canonicalize
from skink.passes.decompose.factorize.factorize import uniform_rank
from skink.passes.decompose.replacement import replace_by_factors
from skink.passes.decompose.selection import choose_layers
from skink.training.layerwise.match_layers import match_layers
from skink.training.layerwise.pieces import Piece, cut_pieces
from skink.training.loop.options import TrainOptions
from skink.training.losses.objectives import Terms
from skink.training.weights.trainable import trainable_names

VOCABULARY = 512
LENGTH = 128
MIB = 2**20


@dataclass(frozen=True)
class Job:
    """What one process is told: sizes of the model, and windows of the text, of a step, of a micro-batch."""

    layers: int
    hidden: int
    inner: int
    at_once: int
    windows: int = 32
    batch: int = 8
    micro_batch: int = 2


@dataclass(frozen=True)
class Found:
    """Bytes, of which `layer` is one dense layer, and seconds."""

    layer: int
    loaded: int
    above: int
    state: int
    held: int
    activations: int
    seconds: float


def random_model(layers: int, hidden: int, inner: int) -> Program:
    """The canonical program of a LLaMA with random weights."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=LENGTH,
    )
    torch.manual_seed(0)
    program = capture(LlamaForCausalLM(config).eval())
    Pipeline((Canonicalize(),)).run(program, verify=0)
    return program


def factored(original: Program, keep: float) -> Program:
    """The program with two random factors in the place of each linear layer but the head."""
    program = original.clone()
    rewriter = Rewriter(program, "random-factors")
    for layer in choose_layers(program, "random-factors", (), ())[0]:
        out, inputs = layer.shape
        rank = uniform_rank(keep, out, inputs)
        up, down = (torch.randn(shape).mul_(0.02) for shape in ((out, rank), (rank, inputs)))
        replace_by_factors(program, rewriter, layer, up, down)
    rewriter.finish()
    return program


def activation_bytes(program: Program, piece: Piece, tokens: int) -> int:
    """Of what a piece computes on so many tokens: every value once, views of others not at all."""
    total = 0
    for node, _ in plan_region(program.graph, piece.end.student, piece.begin.student):
        value = node.meta.get("val")
        views = ("reshape", "transpose", "view")
        if (
            node.op == "call_function"
            and isinstance(value, Tensor)
            and not any(name in str(node.target) for name in views)
        ):
            total += 4 * tokens * value.shape[-1] * (value.shape[1] if value.dim() == 4 else 1)
    return int(total)


def status(field: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def run(job: Job) -> Found:
    """Match a model in this process."""
    small = random_model(1, 64, 128)
    text = Windows(torch.randint(VOCABULARY, (job.windows, LENGTH), generator=torch.Generator().manual_seed(0)))
    options = TrainOptions(batch=job.batch, micro_batch=job.micro_batch, steps=job.windows // job.batch)
    # What torch and its libraries load at first use is no part of it.
    match_layers(small, factored(small, 0.5), text, options, terms=Terms(hidden=1.0))
    original = random_model(job.layers, job.hidden, job.inner)
    program = factored(original, 0.5)
    pieces = cut_pieces(original, program, trainable_names(program, original, "new"))
    trained = [sum(program.weight(name).numel() for name in piece.trained) for piece in pieces]
    group = job.at_once or len(pieces)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    loaded, began = status("VmRSS"), time.perf_counter()
    match_layers(
        original, program, text, options, terms=Terms(hidden=1.0), layers_at_once=job.at_once, held_bytes=2**40
    )
    return Found(
        layer=sum(tensor.numel() * 4 for name, tensor in original.weights() if ".layers.0." in name),
        loaded=loaded,
        above=status("VmHWM") - loaded,
        state=16 * max(sum(trained[start : start + group]) for start in range(0, len(trained), group)),
        held=job.windows * LENGTH * job.hidden * 4,
        activations=activation_bytes(program, pieces[0], job.micro_batch * LENGTH),
        seconds=time.perf_counter() - began,
    )


def in_a_process(job: Job) -> Found:
    """The same in a fresh process, whose freed memory goes back to the system at once."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, "--job", json.dumps(asdict(job))]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return Found(**json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--inner", type=int, default=2816)
    parser.add_argument("--at-once", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.job:
        print(json.dumps(asdict(run(Job(**json.loads(given.job))))))
        return
    jobs = [Job(layers, given.hidden, given.inner, given.at_once) for layers in given.layers]
    rows = [(job, in_a_process(job)) for job in jobs]
    if given.json:
        print(json.dumps([{**asdict(job), **asdict(found)} for job, found in rows], indent=1))
        return
    print(machine())
    header = ("layers", "a layer", "loaded", "above", "state", "held", "activations", "above/sum", "seconds")
    print("  ".join(f"{name:>11}" for name in header))
    for job, found in rows:
        expected = found.state + found.held + found.activations
        sizes = (found.layer, found.loaded, found.above, found.state, found.held, found.activations)
        cells = [str(job.layers), *(f"{size / MIB:.0f} MiB" for size in sizes), f"{found.above / expected:.2f}"]
        cells.append(f"{found.seconds:.0f}")
        print("  ".join(f"{cell:>11}" for cell in cells))
    first, last = rows[0][1], rows[-1][1]
    print(f"above, {rows[-1][0].layers} layers / {rows[0][0].layers} layers: {last.above / first.above:.3f}")


if __name__ == "__main__":
    main()
