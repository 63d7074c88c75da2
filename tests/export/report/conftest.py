"""A report such as `skink compress` makes, small and with every part filled."""

from collections.abc import Callable
from math import log

import pytest

from skink.export.report import (
    Amount,
    Calibration,
    Comparison,
    Form,
    LayerRecord,
    PassRecord,
    Perplexity,
    Rate,
    Recipe,
    Rejection,
    Report,
    Saved,
    Saving,
    Source,
    Speed,
)

HELD_OUT = {"text": "held-out", "windows": 64, "window_length": 256}
TIMING = {"threads": 4, "prompt": 128, "output": 64, "repeats": 7}


def speed(prefill: float, decode: float, **ratios: float) -> Speed:
    def rate(median: float) -> Rate:
        return Rate(median=median, min=0.95 * median, max=1.02 * median)

    return Speed(prefill=rate(prefill), decode=rate(decode), first_token_ms=4e4 / prefill, settings=TIMING, **ratios)


def form(name: str, parameters: int, perplexity: float, measured: Speed) -> Form:
    return Form(
        name=name,
        parameters=parameters,
        linear_parameters=parameters - 2_000_000,
        bytes=4 * parameters,
        macs_per_token=parameters - 1_000_000,
        context=256,
        perplexity=Perplexity(value=perplexity, nats=log(perplexity), settings=HELD_OUT),
        speed=measured,
    )


def layer(name: str, dense: bool = False) -> LayerRecord:
    if dense:
        return LayerRecord(
            name=name,
            shape=(128, 256),
            decision="kept dense",
            parameters_before=32768,
            parameters_after=32768,
            reason="rank 80 saves less than 10%",
        )
    return LayerRecord(
        name=name,
        shape=(256, 256),
        decision="factored",
        rank=96,
        parameters_before=65536,
        parameters_after=49152,
        predicted_error=0.12,
        weight_error=0.31,
        baseline_error=0.2,
        predicted_loss=0.0005,
    )


def saved(before: float, after: float, spread: float = 0.0) -> Saved:
    ends = [
        Amount(value=each, low=each - spread if spread else None, high=each + spread if spread else None)
        for each in (before, after)
    ]
    return Saved(before=ends[0], after=ends[1])


SAVINGS = [
    Saving(unit="params", linear=saved(5_241_728, 4_193_152), model=saved(7_241_728, 6_193_152)),
    Saving(unit="bytes", linear=saved(20_966_912, 16_772_608), model=saved(28_966_912, 24_772_608)),
    Saving(
        unit="flops",
        linear=saved(5_241_728, 4_193_152),
        model=saved(6_241_728, 5_193_152),
        settings={"context": "256 tokens"},
    ),
    Saving(
        unit="latency",
        linear=saved(0.120, 0.100, 0.005),
        model=saved(0.305, 0.290, 0.010),
        settings={"batch": 1, "prompt": 128, "new_tokens": 64, "rounds": 7},
    ),
]


@pytest.fixture
def make_report() -> Callable[[int], Report]:
    def make(blocks: int) -> Report:
        layers = [
            layer(f"model.layers.{block}.{part}", dense=part.endswith("v_proj") and block == 0)
            for block in range(blocks)
            for part in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
        ]
        return Report(
            skink_version="0.1.0",
            created="2026-11-21T19:48:00+00:00",
            source=Source(name="stdlib-llama", model_type="llama"),
            title="stdlib-llama at keep 0.8",
            recipe=Recipe(line="canonicalize, low-rank{keep=0.8}", yaml="passes:\n  - low-rank:\n      keep: 0.8\n"),
            calibration=Calibration(
                source="calibration text", sha256="ab" * 32, windows=128, window_length=256, seed=3
            ),
            dtype="float32",
            machine={"cpu": "Example 9000", "cores": "4"},
            versions={"torch": "2.13.0"},
            seed=3,
            forms=[
                form("source (transformers)", 7_241_728, 4.3121, speed(3211.0, 182.3)),
                form("skink, empty recipe", 7_241_728, 4.3121, speed(3260.0, 241.8)),
                form("skink, compressed", 6_193_152, 4.3401, speed(3642.0, 287.1, decode_ratio=1.61)),
            ],
            savings=SAVINGS,
            passes=[
                PassRecord(name="canonicalize", options="", seconds=0.4, edits=58, error=2e-7, kl=0.0, verified=2),
                PassRecord(
                    name="low-rank",
                    options="keep=0.8",
                    seconds=73.2,
                    edits=5,
                    error=0.083,
                    kl=0.0064,
                    verified=1,
                    skipped=1,
                    rejections=[Rejection(where="model.layers.0.self_attn.v_proj", reason="saves less than 10%")],
                ),
            ],
            layers=[*layers, layer("lm_head", dense=True)],
            comparisons=[
                Comparison(
                    name="plain SVD", keep=0.8, perplexity=5.71, ratio_to_dense=5.71 / 4.3121, settings=HELD_OUT
                ),
                Comparison(name="whitened", keep=0.8, perplexity=4.34, ratio_to_dense=4.34 / 4.3121, settings=HELD_OUT),
            ],
            notes=["Four layers run as two matrix products."],
        )

    return make


@pytest.fixture
def report(make_report: Callable[[int], Report]) -> Report:
    return make_report(3)


@pytest.fixture
def bare(report: Report) -> Report:
    """The same report with nothing measured and nothing but the required fields."""
    required = {
        key: getattr(report, key) for key in ("skink_version", "created", "source", "title", "recipe", "dtype", "seed")
    }
    return Report(**required)
