"""The main job on the model that ships: what low rank costs and gains, against transformers in the same run.

Prints, from one report: held-out perplexity of the whitened and of the plain truncation as ratios to the dense model,
and prefill and decode speed of the captured and of the compressed model as ratios to transformers, medians of
interleaved rounds with their range. The limit beside decode is the time that memory needs to carry the weights once
per token.

    python benchmarks/cpu/main_job.py [--keep 0.8] [--rounds N] [--threads N] [--json]
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

from skink.compression import CompressOptions, SpeedOptions, compress_to_folder
from skink.evaluation import machine
from skink.export.report import Report


def read_bandwidth(seconds: float = 0.5) -> float:
    """Bytes per second that this machine's threads read from memory: the best of repeated sums over 512 MiB."""
    data = torch.ones(128 << 20, dtype=torch.float32)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        begun = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - begun)
    return data.numel() * data.element_size() / best


def run(keep: float, rounds: int) -> Report:
    """The report of one compression at `keep`."""
    options = CompressOptions(speed=SpeedOptions(rounds=rounds), overrides={"low-rank.keep": keep})
    with tempfile.TemporaryDirectory() as folder:
        return compress_to_folder("stdlib-llama", "quickstart", Path(folder) / "result", options)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=float, default=0.8)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    report = run(arguments.keep, arguments.rounds)
    bandwidth = read_bandwidth()
    if arguments.json:
        print(json.dumps({"report": json.loads(report.to_json()), "read_bandwidth": bandwidth}))
        return
    print(f"{machine()}\nmemory reads {bandwidth / 1e9:.1f} GB/s on {arguments.threads} threads\n")
    for entry in report.comparisons:
        print(f"perplexity {entry.perplexity:.4f}, {entry.ratio_to_dense:.4f} of dense, {entry.name}")
    print()
    for form in report.forms:
        if form.speed is None:
            continue
        # Weights are in float32 while running here, whatever they are stored in.
        limit = bandwidth / (4 * form.macs_per_token)
        print(
            f"{form.name:<24} prefill {form.speed.prefill.median:9.0f} tok/s ({form.speed.prefill_ratio:.2f}x)   "
            f"decode {form.speed.decode.median:7.1f} tok/s ({form.speed.decode_ratio:.2f}x), "
            f"{form.speed.decode.median / limit:.0%} of the memory's limit"
        )


if __name__ == "__main__":
    main()
