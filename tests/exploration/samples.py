"""A map that nobody measured, with everything in it that a page shows."""

import math

from skink.exploration.result import Exploration, PointResult

DENSE = {
    "parameters": 1000.0,
    "linear_parameters": 800.0,
    "bytes": 2000.0,
    "macs_per_token": 900.0,
    "latency": 1.0,
    "perplexity": 8.0,
    "accuracy": 0.75,
}


def result(family: str, keep: float, perplexity: float, correct: str, latency: float = 1.0) -> PointResult:
    """A point that keeps a share of everything."""
    metrics = {name: value * keep for name, value in DENSE.items()}
    accuracy = correct.count("1") / len(correct)
    metrics |= {"perplexity": perplexity, "accuracy": accuracy, "latency": latency}
    details = {"questions": {"next-line": {"correct": correct}}, "predicted_loss": 0.01}
    return PointResult(family, {"keep": keep, "layers": [0, 2]}, f"low-rank{{keep={keep}}}", metrics, details)


def sample() -> Exploration:
    """Two families, a failure, and a model that was lost."""
    dense = PointResult("", {}, "", DENSE, {"questions": {"next-line": {"correct": "1101"}}})
    return Exploration(
        model={"name": "a <model>", "model_type": "llama", "fingerprint": "f" * 64},
        space={"name": "mine", "description": "What & why.", "yaml": "recipe: low-rank{keep=$keep}\n"},
        settings={"quality": {"perplexity": {"sha256": "0123456789abcdef"}}, "seed": 3, "latency": {"batch": 1}},
        machine={"processor": "a processor", "gpu": ""},
        versions={"torch": "2.13"},
        created="2026-11-22T02:30:00+00:00",
        dense=dense,
        points=(
            result("one", 0.9, 8.1, "1111", 0.95),
            result("one", 0.8, 9.0, "1100", 0.9),
            result("other", 0.8, 12.0, "1000", 1.1),
            result("other", 0.5, math.inf, "0000", 0.6),
            PointResult("one", {"keep": 2}, "low-rank{keep=2}", error={"code": "DEFECT-001", "what": "broke <here>"}),
        ),
    )
