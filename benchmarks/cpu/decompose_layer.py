"""Decomposing the seven matrices of one LLaMA-7B-sized layer: Skink's pass beside other packages, in one run.

Each side runs in a process of its own, in turn, on the same random weights and covariances of inputs; models are built
and captured before the clock starts. Peak memory is the most that the process held from then on, weights and
covariances included.

| side           | what runs                                                                                      |
| skink whitened | the pass low-rank{method=whitened,allocation=uniform,multiple_of=1,baseline=false}, edits too  |
| svd-llm        | `profle_svdllm` (its Cholesky factors; covariances are given) and `whitening` of a checkout of |
|                | github.com/AIoT-MLSys-Lab/SVD-LLM, which is not part of this repository: --svd-llm PATH        |
| peft corda     | `collect_eigens` and `crop_corda_eigens` of PEFT: an SVD of W C, which is another optimum      |
| skink plain    | the pass with method=plain                                                                     |
| peft pissa     | `get_peft_model` with init_lora_weights="pissa": the SVD of W                                  |

"of GEMM" is the least arithmetic that the method needs by its formulas in float64 (products, Cholesky factors, the
reduction to tridiagonal form and the way back) at the speed of a matrix product, over the processor time that was used.
Where the machine is busy with other things, processor time ("CPU s", of all threads) says more than wall time.
"output error" is ||X (W - W')^T|| / ||X W^T||, averaged over q, gate and down.

    python benchmarks/cpu/decompose_layer.py [--svd-llm PATH] [--rounds N] [--threads N] [--only SIDE ...] [--json]
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from skink.evaluation import machine
from skink.evaluation.machine import peak_memory

SIDES = ("skink whitened", "svd-llm", "peft corda", "skink plain", "peft pissa")
# Layers that read one input, in the order of a decoder layer.
GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
CHECKED = ("self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj")
NAMES = tuple(name for group in GROUPS for name in group)
PREFIX = "model.layers.0."

Weights = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Job:
    """What one process is told."""

    side: str
    hidden: int
    inner: int
    keep: float
    dtype: str
    threads: int
    svd_llm: str

    def rank(self, name: str) -> int:
        """The rank at which a matrix keeps its share."""
        out, width = self.shape(name)
        return int(out * width * self.keep / (out + width))

    def shape(self, name: str) -> tuple[int, int]:
        """[out, in]."""
        if name == "mlp.down_proj":
            return self.hidden, self.inner
        return (self.inner if name.startswith("mlp.") else self.hidden), self.hidden


def covariance(width: int, seed: int) -> Tensor:
    """Of features whose sizes span decades and that share a sixteenth as many factors: float64[width, width]."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.randn(width, 1, dtype=torch.float64, generator=generator).exp()
    shared = torch.randn(width, max(1, width // 16), dtype=torch.float64, generator=generator) * scale
    result = torch.zeros(width, width, dtype=torch.float64)
    result.diagonal().copy_(scale.squeeze(1).square())
    return result.addmm_(shared, shared.T)


def model(job: Job) -> nn.Module:
    """A decoder of one layer with random weights."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=128,
        hidden_size=job.hidden,
        intermediate_size=job.inner,
        num_hidden_layers=1,
        num_attention_heads=max(1, job.hidden // 128),
        max_position_embeddings=64,
        pretraining_tp=1,
    )
    torch.manual_seed(0)
    result: nn.Module = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, job.dtype)).eval()
    return result


def skink(job: Job, covariances: list[Tensor]) -> tuple[Callable[[], None], Callable[[], Weights]]:
    """Our pass, with its calibration replaced by the given covariances."""
    from skink.graph.calibration import Covariance
    from skink.graph.capture import capture
    from skink.graph.passes import Context
    from skink.graph.pipeline import Pipeline
    from skink.graph.rewriter import Rewriter
    from skink.passes.canonicalize import Canonicalize
    from skink.passes.decompose.low_rank import LowRank
    from skink.passes.decompose.low_rank import candidates as low_rank_candidates

    program = capture(model(job))
    Pipeline((Canonicalize(),)).run(program, verify=0)

    def given(*_: Any, **__: Any) -> Iterator[dict[str, Covariance]]:
        for group in GROUPS:
            found = Covariance(covariances.pop(0), 4 * job.inner)
            result = {f"{PREFIX}{name}.weight": found for name in group}
            del found
            yield result

    low_rank_candidates.stream_covariances = given
    method: Any = job.side.split()[1]
    chosen = LowRank(keep=job.keep, method=method, allocation="uniform", multiple_of=1, baseline=False)
    context = Context(calibration=torch.zeros(1, 8, dtype=torch.int64))

    def run() -> None:
        chosen.run(program, Rewriter(program, "low-rank"), context)

    def factors() -> Weights:
        stored = dict(program.weights())
        return {name: (stored[f"{PREFIX}{name}.up.weight"], stored[f"{PREFIX}{name}.down.weight"]) for name in NAMES}

    return run, factors


def svd_llm(job: Job, covariances: list[Tensor]) -> tuple[Callable[[], None], Callable[[], Weights]]:
    """SVD-LLM's own functions; its sums of x x^T, which it keeps in float32, are given in place of a forward."""
    sys.path.insert(0, job.svd_llm)
    # Its loaders of texts import this; none is used here.
    _stand_in("datasets", load_dataset=None)
    import SVDLLM

    source = model(job)
    totals = {name: covariances[index].float() for index, group in enumerate(GROUPS) for name in group}
    covariances.clear()

    class Calibrated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.config = source.model, source.config

        def forward(self, **_: Any) -> None:
            for name in NAMES:
                self.model.layers[0].get_submodule(name).raw_scaling_diag_matrix = totals.pop(name)

    subject = Calibrated()

    def run() -> None:
        found = SVDLLM.profle_svdllm("llama", subject, [{}], "cpu")
        SVDLLM.whitening("llama", subject, found, job.keep, "cpu")

    def factors() -> Weights:
        layer = subject.model.layers[0]
        return {
            name: tuple(layer.get_submodule(name.replace("_proj", f"_{side}_proj")).weight.data for side in "uv")
            for name in NAMES
        }

    return run, factors


def _stand_in(name: str, **members: Any) -> None:
    """A module of this name with these members, unless it is installed."""
    if importlib.util.find_spec(name) is None:
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(members)


def corda(job: Job, covariances: list[Tensor]) -> tuple[Callable[[], None], Callable[[], Weights]]:
    """PEFT's CorDA, from its covariances on, which it keeps in float32."""
    # PEFT takes it from attrs, without saying that it needs them.
    _stand_in("attr", dataclass=dataclass)
    from peft import LoraConfig
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import collect_eigens, crop_corda_eigens

    subject = model(job)
    config = LoraConfig(target_modules=list(NAMES), corda_config=CordaConfig(corda_method="ipm"))
    layer = subject.model.layers[0]
    for group in GROUPS:
        total = covariances.pop(0).float()
        for name in group:
            module = layer.get_submodule(name)
            module.covariance_matrix, module.rank, module.corda_method = total, job.rank(name), "ipm"

    def run() -> None:
        collect_eigens(subject, config, False)
        crop_corda_eigens(subject, config)

    def factors() -> Weights:
        eigens = {name: layer.get_submodule(name).eigens for name in NAMES}
        return {name: (found.U_WC * found.S_WC, found.V_WC.T) for name, found in eigens.items()}

    return run, factors


def pissa(job: Job, covariances: list[Tensor]) -> tuple[Callable[[], None], Callable[[], Weights]]:
    """PEFT's PiSSA, as its users call it."""
    from peft import LoraConfig, get_peft_model

    covariances.clear()
    subject = model(job)
    ranks = {name.split(".")[1]: job.rank(name) for name in NAMES}
    config = LoraConfig(
        init_lora_weights="pissa",
        target_modules=list(ranks),
        r=1,
        lora_alpha=1,
        rank_pattern=ranks,
        alpha_pattern=ranks,
    )

    def run() -> None:
        get_peft_model(subject, config)

    def factors() -> Weights:
        layer = subject.model.layers[0]
        modules = {name: layer.get_submodule(name) for name in NAMES}
        return {
            name: (module.lora_B["default"].weight.data, module.lora_A["default"].weight.data)
            for name, module in modules.items()
        }

    return run, factors


def output_errors(job: Job, factors: Weights) -> float:
    """The mean relative error of the outputs of three matrices."""
    layer = model(job).get_submodule(PREFIX.rstrip("."))
    errors = []
    for index, group in enumerate(GROUPS):
        name = group[0]
        if name not in CHECKED:
            continue
        weight = layer.get_submodule(name).weight.data.double()
        metric = covariance(job.shape(name)[1], index)
        up, down = (factor.double() for factor in factors[name])
        difference = torch.addmm(weight, up, down, alpha=-1)
        errors.append(float(((difference @ metric) * difference).sum() / ((weight @ metric) * weight).sum()) ** 0.5)
    return sum(errors) / len(errors)


def child(job: Job) -> None:
    """Run one side and print what it took as a line of JSON."""
    torch.set_num_threads(job.threads)
    kinds = {"skink": skink, "svd-llm": svd_llm, "peft corda": corda, "peft pissa": pissa}
    make = kinds[job.side if job.side in kinds else job.side.split()[0]]
    plain = job.side in ("skink plain", "peft pissa")
    covariances = [] if plain else [covariance(job.shape(group[0])[1], seed) for seed, group in enumerate(GROUPS)]
    with torch.no_grad():
        run, factors = make(job, covariances)
        # What making the inputs took does not count.
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        before = peak_memory()
        begun, used = time.perf_counter(), time.process_time()
        run()
        seconds, processor = time.perf_counter() - begun, time.process_time() - used
        peak = peak_memory()
        error = None if plain else output_errors(job, factors())
    ranks = {name: up.shape[1] for name, (up, _) in factors().items()}
    if ranks != {name: job.rank(name) for name in NAMES}:
        raise SystemExit(f"{job.side} took other ranks: {ranks}")
    print(json.dumps({"seconds": seconds, "processor": processor, "before": before, "peak": peak, "error": error}))


def least_operations(job: Job, *, whitened: bool) -> float:
    """Floating-point operations of Skink's formulas for all seven; see the module."""
    total = 0.0
    for name in NAMES:
        out, width = job.shape(name)
        n, other, rank = min(out, width), max(out, width), job.rank(name)
        if whitened:
            # W C, or the Cholesky factor of C and W L (a triangle).
            total += 2 * out * width * width if out <= width else width**3 / 3 + out * width * width
        # The Gram matrix is symmetric. Then tridiagonal form, eigenvectors from there, and the thin factor.
        total += n * n * other + 4 / 3 * n**3 + 2 * n * n * rank + 2 * n * other * rank
    return total


def gemm_speed(size: int = 2048) -> float:
    """Floating-point operations of a float64 matrix product per second of processor time: the best of several."""
    a, b = torch.randn(2, size, size, dtype=torch.float64)
    best = float("inf")
    for _ in range(5):
        begun = time.process_time()
        a @ b
        best = min(best, time.process_time() - begun)
    return 2 * size**3 / best


def measure(job: Job) -> dict[str, Any]:
    """What a child says of one side."""
    fields = [f"--{name.replace('_', '-')}={value}" for name, value in vars(job).items()]
    done = subprocess.run(
        [sys.executable, __file__, "--child", *fields],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(job.threads), "TQDM_DISABLE": "1"},
    )
    if done.returncode:
        raise SystemExit(f"{job.side} failed")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Run and print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--svd-llm", default="", help="a checkout of SVD-LLM")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", nargs="*", default=SIDES, choices=SIDES)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--inner", type=int, default=11008)
    parser.add_argument("--keep", type=float, default=0.8)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--side", default="", help=argparse.SUPPRESS)
    given = parser.parse_args()

    def job(side: str) -> Job:
        return Job(side, given.hidden, given.inner, given.keep, given.dtype, given.threads, given.svd_llm)

    if given.child:
        child(job(given.side))
        return
    if sys.platform != "linux":
        raise SystemExit("peak memory of a part of a process can be read on Linux only")
    sides = [side for side in given.only if side != "svd-llm" or given.svd_llm]
    torch.set_num_threads(given.threads)
    results: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    speeds, loads = [], []
    for _ in range(given.rounds):
        for side in sides:
            speeds.append(gemm_speed())
            loads.append(os.getloadavg()[0])
            results[side].append(measure(job(side)))
            if not given.json:
                print(f"  {side}: {results[side][-1]}", file=sys.stderr, flush=True)
    speed, load = statistics.median(speeds), statistics.median(loads)
    if given.json:
        print(json.dumps({"machine": vars(machine()), "gemm": speed, "load": load, "results": results}, indent=2))
        return
    print(
        f"{machine()}\nseven matrices, {given.hidden} and {given.inner} wide, {given.dtype}, keep {given.keep:g}; "
        f"medians of {given.rounds} rounds; float64 products {speed / 1e9:.0f} GFLOP per CPU second; "
        f"load average {load:.1f}\n"
    )
    if "svd-llm" in given.only and not given.svd_llm:
        print("svd-llm is missing: give a checkout of github.com/AIoT-MLSys-Lab/SVD-LLM by --svd-llm PATH\n")
    print(
        f"{'side':16} {'seconds':>9} {'range':>15} {'CPU s':>8} {'peak GiB':>9} {'inputs':>7} {'output error':>13} "
        f"{'of GEMM':>8}"
    )
    for side, found in results.items():
        seconds = [entry["seconds"] for entry in found]
        median = statistics.median(seconds)
        processor = statistics.median(entry["processor"] for entry in found)
        peak, before = (statistics.median(entry[key] for entry in found) / 2**30 for key in ("peak", "before"))
        error = "" if found[0]["error"] is None else f"{found[0]['error']:.5f}"
        limit = ""
        if side.startswith("skink"):
            least = least_operations(job(side), whitened=side == "skink whitened")
            limit = f"{least / speed / processor:.0%}"
        spread = f"{min(seconds):.1f} to {max(seconds):.1f}"
        print(f"{side:16} {median:9.1f} {spread:>15} {processor:8.1f} {peak:9.2f} {before:7.2f} {error:>13} {limit:>8}")


if __name__ == "__main__":
    main()
