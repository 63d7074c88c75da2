"""The report is filled with what was measured, under the settings it was measured with."""

import pytest
import torch

from skink.compression import compress_program
from skink.compression.measure import DENSE, RESULT, Measured, build_report, savings, score, speed_notes
from skink.evaluation import Speed, Spread
from skink.graph.cost import program_cost
from skink.graph.windows import Windows
from tests.models import VOCABULARY, tiny


def windows(count: int = 4, length: int = 16) -> Windows:
    tokens = torch.randint(0, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(3))
    return Windows(tokens, "random tokens", "f" * 64)


@pytest.fixture(scope="module")
def done():
    return compress_program(tiny("llama"), "low-rank{keep=0.5}", calibration=windows().tokens)


def speed(decode: float) -> Speed:
    one = Spread(1.0, 1.0, 1.0)
    rate = Spread(decode, decode / 2, decode * 2)
    return Speed(rate, rate, Spread(0.25, 0.2, 0.3), one, Spread(1.5, 1.4, 1.6), "source", 1, 8, 4, 3, 0)


def report(done, **changes):
    forms = {
        "source": Measured(program_cost(done.dense), score(tiny("llama"), windows()), speed(100.0)),
        "result": Measured(program_cost(done.program)),
    }
    comparisons = {"other": forms["source"]}
    options = {"name": "tiny", "calibration": windows(), "seed": 5, "dtype": "float32", "notes": ["a note"]}
    return build_report(done, forms, comparisons, **(options | changes))


def test_sizes_are_those_of_the_programs(done) -> None:
    source, result = report(done).forms
    assert source.parameters == sum(parameter.numel() for parameter in tiny("llama").parameters())
    saved = sum(layer.parameters_before - layer.parameters_after for layer in done.result.layers)
    assert source.parameters - result.parameters == saved
    assert result.macs_per_token < source.macs_per_token


def test_what_is_saved_is_counted_in_every_unit_against_the_same_form(done) -> None:
    dense, small = program_cost(done.dense), program_cost(done.program)
    forms = {
        "source": Measured(dense, None, speed(1000.0)),
        DENSE: Measured(dense, None, speed(100.0), Spread(0.5, 0.4, 0.6)),
        RESULT: Measured(small, None, speed(200.0), Spread(0.25, 0.2, 0.3)),
    }
    params, size, work, latency = savings(forms)
    assert [each.unit for each in (params, size, work, latency)] == ["params", "bytes", "flops", "latency"]
    assert (params.linear.before.value, params.linear.after.value) == (dense.linear_parameters, small.linear_parameters)
    assert (params.model.before.value, params.model.after.value) == (dense.parameters, small.parameters)
    assert size.linear.after.value == 4 * small.linear_parameters
    assert work.linear.after.value == small.linear_macs_per_token
    assert work.settings == {"context": "512 tokens"}
    assert (latency.linear.before.value, latency.linear.after.value) == (0.5, 0.25)
    # A quarter of a second to the first token, and then 4 tokens at 100 and 200 a second; 50 to 200 and 100 to 400.
    assert latency.model.before.model_dump() == pytest.approx({"value": 0.29, "low": 0.22, "high": 0.38})
    assert latency.model.after.model_dump() == pytest.approx({"value": 0.27, "low": 0.21, "high": 0.34})
    assert latency.settings == {"batch": 1, "prompt": 8, "new_tokens": 4, "rounds": 3}


def test_without_speed_no_latency_is_claimed(done) -> None:
    cost = Measured(program_cost(done.dense))
    assert [each.unit for each in savings({DENSE: cost, RESULT: cost})] == ["params", "bytes", "flops"]
    assert savings({"source": cost}) == []


def test_what_single_layers_added_stands_beside_what_was_predicted(done) -> None:
    name = next(layer.name for layer in done.result.layers if layer.decision != "kept dense")
    found = {layer.name: layer.measured_loss for layer in report(done, layer_losses={name: 0.25}).layers}
    assert found.pop(name) == 0.25
    assert set(found.values()) == {None}


def test_what_passes_had_to_say_is_in_the_report(done) -> None:
    record = report(done).passes[-1]
    assert record.notes == list(done.result.passes[-1].result.notes)
    assert any(note.startswith("kept of ") for note in record.notes)


def test_perplexity_comes_with_its_settings(done) -> None:
    source, result = report(done).forms
    with torch.no_grad():
        ids = windows().tokens
        logits = tiny("llama")(input_ids=ids).logits.double()
    nats = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert source.perplexity is not None
    assert source.perplexity.nats == pytest.approx(float(nats), rel=1e-5)
    assert source.perplexity.settings["source"] == "random tokens"
    assert source.perplexity.settings["data_hash"] == "f" * 12
    assert source.perplexity.settings["windows"] == 4
    assert None not in source.perplexity.settings.values()
    assert result.perplexity is None


def test_speed_keeps_its_range_and_its_paired_ratios(done) -> None:
    measured = report(done).forms[0].speed
    assert measured is not None
    assert (measured.decode.median, measured.decode.min, measured.decode.max) == (100.0, 50.0, 200.0)
    assert measured.decode_ratio == 1.5
    assert measured.first_token_ms == 250.0
    assert measured.settings == {"batch": 1, "prompt": 8, "new_tokens": 4, "rounds": 3, "seed": 0}


def test_passes_and_layers_are_written_down(done) -> None:
    written = report(done)
    assert [entry.name for entry in written.passes] == ["canonicalize", "low-rank"]
    assert written.passes[1].options == "keep=0.5"
    assert written.passes[1].error == pytest.approx(done.result.passes[1].numbers.relative)
    assert [layer.name for layer in written.layers] == [layer.name for layer in done.result.layers]
    assert written.title == "tiny, low-rank{keep=0.5}"
    assert "keep=0.5,method=" in written.recipe.line
    assert written.notes == ["a note"]


def test_a_comparison_is_a_ratio_to_the_first_form(done) -> None:
    (row,) = report(done).comparisons
    assert row.ratio_to_dense == 1.0
    assert row.keep == 1.0


def test_without_calibration_there_is_none_in_the_report(done) -> None:
    assert report(done, calibration=None).calibration is None


@pytest.mark.parametrize(
    ("after", "said"),
    [
        (500.0, "the recipe makes it 5.00 times as fast"),
        (20.0, "the recipe gives no speed-up here, it is 0.20 times as fast"),
        (120.0, "no speed-up from the recipe can be told from noise here (1.20, with ranges that overlap)"),
    ],
)
def test_notes_say_whether_the_recipe_made_it_faster(done, after: float, said: str) -> None:
    cost = program_cost(done.dense)
    forms = {DENSE: Measured(cost, None, speed(100.0)), RESULT: Measured(cost, None, speed(after))}
    decode, prefill = speed_notes(forms)
    assert said in decode
    assert decode.startswith("decode: ")
    assert prefill.startswith("prefill: ")


def test_without_speed_nothing_is_said_of_it(done) -> None:
    cost = program_cost(done.dense)
    assert speed_notes({DENSE: Measured(cost), RESULT: Measured(cost)}) == []
