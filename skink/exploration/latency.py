"""How fast a point is: alone on the machine, in turn with the dense model."""

from typing import Any

from skink.errors import ModelError
from skink.evaluation import HuggingFaceTarget, machine, measure_generation
from skink.exploration.options import ExploreOptions

_DENSE, _POINT = "dense", "point"


def measure_latency(dense: Any, model: Any, options: ExploreOptions) -> dict[str, Any]:
    """Generation speed of a model beside the dense one's, both in Skink's form.

    Args:
        dense: the model without any pass.
        model: the point's.
        options: the workload, and the seed of its prompts.

    Returns:
        The record: `metrics` with `latency`, the time of a decoded token over the dense model's (median over rounds of
        the ratio within a round), and `details`: tokens per second and the spread of that ratio. Or `error`.
    """
    longest = getattr(model.config, "max_position_embeddings", None) or 1 << 30
    prompt = min(options.speed.prompt, max(1, longest // 2))
    try:
        speeds = measure_generation(
            {_DENSE: HuggingFaceTarget(dense), _POINT: HuggingFaceTarget(model)},
            batch=options.speed.batch,
            prompt=prompt,
            new_tokens=min(options.speed.new_tokens, max(2, longest - prompt - 1)),
            rounds=options.speed.rounds,
            seed=options.seed,
        )
    except ModelError as error:
        return {"error": error.as_json()}
    point, beside = speeds[_POINT], speeds[_DENSE]
    ratio = point.decode_ratio
    return {
        "metrics": {"latency": 1.0 / ratio.median},
        "details": {
            "decode": point.decode.median,
            "dense_decode": beside.decode.median,
            "latency_low": 1.0 / ratio.high,
            "latency_high": 1.0 / ratio.low,
            "prefill": point.prefill.median,
            "dense_prefill": beside.prefill.median,
            "threads": machine().threads,
        },
    }
