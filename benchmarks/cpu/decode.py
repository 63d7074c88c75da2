"""One token at a time through a model of real size, dense and at half of its linear parameters, against transformers.

The weights are random numbers: this measures time, end to end with cache, attention and head, and says nothing about
quality. Forms that take turns in one process: the model in transformers; there with two `nn.Linear` in place of each
linear layer, which is what a factored checkpoint is to PyTorch; and in Skink's form dense, with two thin factors, and
with pivots. The limit is the time that memory takes to deliver the weights once, embeddings left out.

    python benchmarks/cpu/decode.py [--shape tinyllama-1.1b] [--dtypes bfloat16,float32] [--keep 0.5] [--layers N]
        [--prompt N] [--new-tokens N] [--rounds N] [--threads N] [--json]
"""

import argparse
import copy
import json
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from main_job import read_bandwidth
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from skink.compression.compress import captured
from skink.evaluation import HuggingFaceTarget, machine, measure_generation
from skink.export.huggingface import to_huggingface
from skink.graph.pipeline import Pipeline
from skink.graph.program import Program
from skink.graph.rewriter import Rewriter
from skink.passes.canonicalize import Canonicalize
from skink.passes.decompose.factorize.factorize import uniform_rank
from skink.passes.decompose.factorize.pivoted import Pivoted
from skink.passes.decompose.replacement import replace_by_factors, replace_by_pivots
from skink.passes.decompose.selection import choose_layers

SHAPES = {
    "tinyllama-1.1b": LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
        num_key_value_heads=4, tie_word_embeddings=False,
    ),
    "llama-3.2-3b": LlamaConfig(
        vocab_size=128256, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24,
        num_key_value_heads=8, tie_word_embeddings=True,
    ),
    "llama-2-7b": LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32, tie_word_embeddings=False,
    ),
}  # fmt: skip


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    """Weights of a usual size."""
    return torch.empty(shape, dtype=dtype).normal_(std=0.02)


def pivoted_rank(out: int, in_: int, keep: float) -> int:
    """Rank R at which R (out + in - R) is that share of the numbers."""
    both = out + in_
    return max(1, int((both - (both**2 - 4 * keep * out * in_) ** 0.5) / 2))


def with_pairs(model: LlamaForCausalLM, keep: float) -> LlamaForCausalLM:
    """The model with two linear layers for each, its other weights shared."""
    pairs = copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})
    for name, layer in list(pairs.model.layers.named_modules()):
        if isinstance(layer, nn.Linear):
            out, in_ = layer.weight.shape
            rank = uniform_rank(keep, out, in_)
            two = [nn.Linear(*sizes, bias=False, device="meta") for sizes in ((in_, rank), (rank, out))]
            for one in two:
                one.weight = nn.Parameter(random(*one.weight.shape, dtype=layer.weight.dtype))
            pairs.model.layers.set_submodule(name, nn.Sequential(*two))
    return pairs


def factored(dense: Program, keep: float, *, pivots: bool) -> Program:
    """The program with factors of random numbers in the place of every linear layer but the head."""
    program = dense.clone()
    rewriter = Rewriter(program, "decode")
    normal = partial(random, dtype=program.dtype)
    layers, _ = choose_layers(program, "decode", (), ())
    for layer in list(layers):
        out, in_ = layer.shape
        if pivots:
            rank = pivoted_rank(out, in_, keep)
            chosen = torch.randperm(out).split((rank, out - rank))
            form = Pivoted(normal(rank, in_), normal(out - rank, rank), *(part.sort().values for part in chosen))
            replace_by_pivots(program, rewriter, (layer,), form)
        else:
            rank = uniform_rank(keep, out, in_)
            replace_by_factors(program, rewriter, layer, normal(out, rank), normal(rank, in_))
    return program


def read_bytes(model: nn.Module) -> int:
    """Of the weights that one token reads: all but the rows of the embedding, unless the head reads them too."""
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    left_out = embedding.nbytes if head is None or head.weight is not embedding else 0
    return sum(weight.nbytes for weight in model.parameters()) - left_out


def measure(config: LlamaConfig, dtype: torch.dtype, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each form."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    dense = captured(model)
    Pipeline((Canonicalize(),)).run(dense, verify=0)
    programs = {
        "skink, dense": dense,
        "skink, thin": factored(dense, options.keep, pivots=False),
        "skink, pivoted": factored(dense, options.keep, pivots=True),
    }
    models = {"transformers": model, "transformers, pairs": with_pairs(model, options.keep)}
    models |= {name: to_huggingface(program, config, copy=False) for name, program in programs.items()}
    speeds = measure_generation(
        {name: HuggingFaceTarget(each) for name, each in models.items()},
        prompt=options.prompt,
        new_tokens=options.new_tokens,
        rounds=options.rounds,
    )
    bandwidth = read_bandwidth()
    return [
        {
            "form": name,
            "dtype": str(dtype).removeprefix("torch."),
            "bytes": read_bytes(models[name]),
            "limit": bandwidth / read_bytes(models[name]),
            **asdict(speed),
        }
        for name, speed in speeds.items()
    ]


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tinyllama-1.1b")
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--layers", type=int, help="fewer than the shape has, for little memory")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config = copy.deepcopy(SHAPES[options.shape])
    config.num_hidden_layers = options.layers or config.num_hidden_layers
    rows = [row for name in options.dtypes.split(",") for row in measure(config, getattr(torch, name), options)]
    if options.json:
        print(json.dumps({"machine": str(machine()), "threads": options.threads, "rows": rows}))
        return
    print(f"{machine()}, {options.threads} threads")
    print(f"{options.shape}, {config.num_hidden_layers} layers, {options.keep:.0%} of the linear parameters kept")
    print(f"batch 1, prompt {options.prompt}, new tokens {options.new_tokens}, medians of {options.rounds} rounds\n")
    print("dtype     form                    GB   decode tok/s  (range)        ratio   of limit   prefill tok/s  ratio")
    for row in rows:
        decode, prefill = row["decode"], row["prefill"]
        span = f"({decode['low']:.1f}-{decode['high']:.1f})"
        print(
            f"{row['dtype']:9} {row['form']:20} {row['bytes'] / 1e9:6.2f} {decode['median']:12.2f}  {span:14} "
            f"{row['decode_ratio']['median']:5.2f}x {decode['median'] / row['limit']:9.0%} {prefill['median']:14.0f} "
            f"{row['prefill_ratio']['median']:6.2f}x"
        )


if __name__ == "__main__":
    main()
