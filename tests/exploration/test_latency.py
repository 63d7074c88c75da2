from dataclasses import replace

import pytest
import torch

from skink.compression import SpeedOptions
from skink.exploration import latency
from skink.exploration.latency import measure_latency


def test_the_ratio_is_that_of_the_rounds(captured, options, monkeypatch):
    seen = []

    def measure(targets, **workload):
        from skink.evaluation import Speed, Spread

        seen.append((list(targets), workload))
        half, even = Spread(0.5, 0.4, 0.8), Spread(1.0, 1.0, 1.0)
        speed = {"baseline": "dense", "batch": 1, "prompt": 4, "new_tokens": 3, "rounds": 1, "seed": 0}
        rate = Spread(10.0, 9.0, 11.0)
        return {
            "dense": Speed(rate, rate, rate, even, even, **speed),
            "point": Speed(rate, rate, rate, even, half, **speed),
        }

    monkeypatch.setattr(latency, "measure_generation", measure)
    record = measure_latency(captured, captured, options)
    assert record["metrics"] == {"latency": 2.0}
    assert (record["details"]["latency_low"], record["details"]["latency_high"]) == (1.25, 2.5)
    assert seen == [(["dense", "point"], {"batch": 1, "prompt": 4, "new_tokens": 3, "rounds": 1, "seed": 0})]


def test_the_workload_fits_the_model_s_positions(captured, options):
    long = replace(options, speed=SpeedOptions(prompt=4096, new_tokens=4096, rounds=1))
    asked = {}

    class StopError(Exception):
        pass

    def measure(targets, **workload):
        asked.update(workload)
        raise StopError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency, "measure_generation", measure)
        with pytest.raises(StopError):
            measure_latency(captured, captured, long)
    assert asked["prompt"] + asked["new_tokens"] < 128


def test_a_model_without_a_cache_is_recorded(options):
    class Plain(torch.nn.Module):
        config = type("Config", (), {"vocab_size": 5, "max_position_embeddings": 9})()

        def forward(self, input_ids):
            return input_ids

    assert measure_latency(Plain(), Plain(), options)["error"]["code"] == "MODEL-004"
