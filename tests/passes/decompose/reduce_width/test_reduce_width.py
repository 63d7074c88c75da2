import pytest
import torch

from skink.errors import BudgetError, CalibrationError, OptionError
from skink.export.huggingface import to_huggingface
from skink.export.onnx import export_onnx
from skink.graph.pipeline import Pipeline
from skink.graph.program import Stage
from skink.graph.state import derive_step
from skink.passes.decompose.low_rank import LowRank
from skink.passes.decompose.reduce_width import ReduceWidth
from skink.passes.decompose.selection import choose_layers
from skink.passes.recipe import parse_passes
from tests.graph.programs import canonical
from tests.models import VOCABULARY, tiny


def text(count=6, length=24, seed=4):
    return torch.randint(1, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed))


def run(program, options, *, calibration=None, verify=1, limit=None):
    """The pass on a clone of `program`: (result, rewritten program)."""
    changed = program.clone()
    pipeline = Pipeline((options,), start=Stage.CANONICAL)
    done = pipeline.attempt(
        changed, calibration=text() if calibration is None else calibration, verify=verify, limit=limit
    )
    if done.error is not None:
        raise done.error
    return done.result.passes[0].result, changed


def inputs(ids):
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "position_ids": torch.arange(ids.shape[1]).expand(ids.shape),
    }


def logits(program, ids):
    return program(**{entry.name: inputs(ids)[entry.name] for entry in program.inputs})[0]


def share(program, changed):
    """What the targets take afterwards, over before."""
    layers = list(choose_layers(program, "test", (), ())[0])
    after = {layer.weight: changed.weight(layer.weight).numel() for layer in layers}
    return sum(after.values()) / sum(layer.parameters for layer in layers)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "phi3"])
def test_it_meets_the_budget_and_says_what_it_did(family):
    program = canonical(family)
    result, changed = run(program, ReduceWidth(keep=0.6, multiple_of=1))
    assert 0.59 < share(program, changed) <= 0.6
    assert changed.stage is Stage.REWRITTEN
    assert result.edits == len([edit for edit in changed.edits if edit.pass_name == "reduce-width"])
    narrowed = {layer.name: layer for layer in result.layers if layer.decision == "narrowed"}
    for layer in result.layers:
        after = changed.weight(f"{layer.name}.weight").numel()
        assert layer.parameters_after == after
        assert (layer.name in narrowed) == (after < layer.parameters_before)
    losses = [layer.predicted_loss for layer in narrowed.values() if layer.predicted_loss is not None]
    assert losses
    assert all(0 <= loss < 1 for loss in losses)
    # No product, no attention and no turning was added.
    for kind in ("aten.linear.default", "skink.attention.default", "skink.rotary.default"):
        counts = [sum(str(node.target) == kind for node in entry.graph.nodes) for entry in (program, changed)]
        assert counts[0] == counts[1]


def test_all_of_it_kept_changes_nothing():
    program = canonical("llama")
    result, changed = run(program, ReduceWidth(keep=1.0))
    assert result.edits == 0
    assert str(changed).partition("\n")[2] == str(program).partition("\n")[2]
    torch.testing.assert_close(logits(changed, text()), logits(program, text()), rtol=0, atol=0)
    assert {layer.decision for layer in result.layers} == {"kept dense"}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_was_narrowed_generates_step_by_step(family):
    length = 8
    _, changed = run(canonical(family), ReduceWidth(keep=0.6))
    stepped = derive_step(changed)
    ids = text(2, length)
    whole = logits(changed, ids)
    state = {
        entry.name: torch.zeros(
            [2 if axis == 0 else 0 if isinstance(dim, str) else dim for axis, dim in enumerate(entry.shape)]
        )
        for entry in stepped.state
    }
    found = []
    for token in range(length):
        given = {
            "input_ids": ids[:, token : token + 1],
            "attention_mask": torch.ones(2, token + 1, dtype=torch.int64),
            "position_ids": torch.full((2, 1), token),
        }
        given = {entry.name: given[entry.name] for entry in stepped.inputs}
        result = stepped(**given, **state)
        found.append(result[0])
        state = dict(zip(state, result[1:], strict=True))
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=1e-4, atol=1e-4)
    widths = {entry.name.rpartition(".")[2]: entry.shape[-1] for entry in stepped.state}
    assert widths["key"] != widths["value"] or widths["key"] < 16


def test_more_kept_predicts_less_and_loses_less():
    program, found = canonical("llama"), []
    exact = logits(program, text(seed=9)).log_softmax(-1)
    for keep in (0.5, 0.7, 0.9):
        result, changed = run(program, ReduceWidth(keep=keep), calibration=text(48, 48))
        predicted = sum(layer.predicted_loss or 0 for layer in result.layers)
        measured = (exact.exp() * (exact - logits(changed, text(seed=9)).log_softmax(-1))).sum(-1).mean()
        found.append((predicted, float(measured)))
    assert sorted(found, reverse=True) == found
    # Both are nats per token; the prediction leaves out what several changes do to each other.
    for predicted, measured in found:
        assert 0.1 < measured / predicted < 10


@pytest.mark.parametrize("allocation", ["uniform", "block-influence"])
@pytest.mark.parametrize("method", ["one-sided", "leverage"])
def test_other_ways_need_no_gradients(allocation, method, monkeypatch):
    monkeypatch.setattr("skink.passes.decompose.reduce_width.reduce_width.stream_moments", None)
    options = ReduceWidth(keep=0.7, allocation=allocation, method=method, multiple_of=1)
    result, changed = run(canonical("llama"), options)
    assert 0.65 < share(canonical("llama"), changed) <= 0.7
    assert all(layer.predicted_loss is None for layer in result.layers)


@pytest.mark.parametrize("unit", ["bytes", "flops"])
def test_other_units_of_linear_layers_come_to_the_same(unit):
    program = canonical("llama")
    _, expected = run(program, ReduceWidth(keep=0.7))
    _, found = run(program, ReduceWidth(keep=0.7, budget=unit))
    assert str(found) == str(expected)


def test_widths_are_multiples_and_not_below_the_floor():
    program = canonical("llama")
    _, changed = run(program, ReduceWidth(keep=0.7, parts=("feed-forward",), multiple_of=24, floor=0.3))
    widths = [changed.weight(f"model.layers.{layer}.mlp.up_proj.weight").shape[0] for layer in range(2)]
    assert all(width in (48, 72, 96, 120, 128) for width in widths)
    with pytest.raises(BudgetError, match=r"BUDGET-001"):
        run(program, ReduceWidth(keep=0.5, floor=0.9))


@pytest.mark.parametrize("allocation", ["uniform", "block-influence"])
def test_a_floor_that_is_too_high_is_an_error_however_it_is_shared_out(allocation):
    with pytest.raises(BudgetError, match=r"BUDGET-001"):
        run(canonical("llama"), ReduceWidth(keep=0.5, floor=0.9, allocation=allocation))


def test_parts_that_were_not_asked_for_stay():
    program = canonical("llama")
    result, changed = run(program, ReduceWidth(keep=0.8, parts=("feed-forward",), multiple_of=1))
    assert 0.79 < share(program, changed) <= 0.8
    reasons = {layer.name: layer.reason for layer in result.layers if "self_attn" in layer.name}
    assert set(reasons.values()) == {"it is in none of the parts that were asked for"}
    assert not result.refused[1:]  # the output head alone


def test_targets_and_ignored_layers():
    program = canonical("llama")
    result, changed = run(program, ReduceWidth(keep=0.7, targets=("*.mlp.*",), ignore=("*.1.mlp.down_proj",)))
    widths = [changed.weight(f"model.layers.{layer}.mlp.up_proj.weight").shape[0] for layer in range(2)]
    assert widths[0] < 128
    assert widths[1] == 128
    reasons = {layer.name: layer.reason for layer in result.layers}
    assert reasons["model.layers.1.mlp.up_proj"] == "model.layers.1.mlp.down_proj beside it may not be changed"
    assert reasons["model.layers.0.self_attn.q_proj"] == "not among the targets"


def test_the_limit_of_edits_leaves_whole_blocks():
    program = canonical("llama")
    before = len(program.edits)
    for more in (1, 2):
        result, changed = run(program, ReduceWidth(keep=0.6), limit=before + more)
        assert result.edits == more
        assert logits(changed, text(2)).isfinite().all()
        names = {layer.name for layer in result.layers if layer.decision == "narrowed"}
        assert names


def test_factors_are_not_narrowed():
    program = canonical("llama").clone()
    Pipeline((LowRank(keep=0.5, method="plain", targets=("*.0.mlp.up_proj",)),), start=Stage.CANONICAL).run(program)
    result, _ = run(program, ReduceWidth(keep=0.9))
    reasons = {layer.name: layer.reason for layer in result.layers}
    assert reasons["model.layers.0.mlp.gate_proj"].endswith("beside it may not be changed")


def test_options_that_cannot_be():
    for options in ({"keep": 0.0}, {"keep": 1.5}, {"floor": -0.1}, {"multiple_of": 0}, {"smoothing": 0.0}):
        with pytest.raises(OptionError, match="OPTION-002"):
            ReduceWidth(**options)
    with pytest.raises(OptionError, match=r"OPTION-002.*parts=\['head'\]"):
        ReduceWidth(parts=("head",))
    with pytest.raises(OptionError, match="OPTION-003"):
        ReduceWidth(workload="much")
    with pytest.raises(CalibrationError, match="CALIBRATION-002"):
        Pipeline((ReduceWidth(),), start=Stage.CANONICAL).run(canonical("llama").clone())


def test_the_one_line_form_is_read_back():
    options = ReduceWidth(keep=0.7, parts=("feed-forward", "query-key"), allocation="uniform", multiple_of=4)
    assert parse_passes(str(options)) == (options,)


def test_sixteen_bits_stay_sixteen_bits():
    program = canonical("llama").with_dtype(torch.bfloat16)
    _, changed = run(program, ReduceWidth(keep=0.7))
    assert {tensor.dtype for name, tensor in changed.weights() if name not in changed.buffers} == {torch.bfloat16}
    assert logits(changed, text(2)).isfinite().all()


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_a_hugging_face_model_of_it_generates_with_its_cache(family):
    _, changed = run(canonical(family), ReduceWidth(keep=0.6, multiple_of=1))
    source = tiny(family)
    model = to_huggingface(changed, source.config, source.generation_config)
    options = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}
    expected = model.generate(text(2, 7), use_cache=False, **options)
    assert torch.equal(model.generate(text(2, 7), **options), expected)


def test_onnx_runtime_computes_the_same(tmp_path):
    # Fused projections and partial rotary, whose tables lose columns; the export is checked against the program.
    _, changed = run(canonical("gpt_neox"), ReduceWidth(keep=0.6, multiple_of=1))
    assert [name for name, _ in changed.weights() if "rotary_columns" in name]
    source = tiny("gpt_neox")
    report = export_onnx(changed, tmp_path / "onnx", config=source.config, generation_config=source.generation_config)
    assert report.operators["Attention"] == 2


def test_padding_does_not_count():
    short, program = text(6, 12), canonical("llama")
    padded = torch.cat((short, torch.zeros(6, 12, dtype=torch.int64)), 1)
    options = ReduceWidth(keep=0.7, method="one-sided", allocation="uniform")
    _, expected = run(program, options, calibration=short)
    changed = program.clone()
    mask = torch.cat((torch.ones_like(short), torch.zeros_like(short)), 1)
    Pipeline((options,), start=Stage.CANONICAL).run(changed, calibration=padded, padding=mask, verify=1)
    assert str(changed) == str(expected)
    torch.testing.assert_close(logits(changed, text(2)), logits(expected, text(2)), rtol=1e-3, atol=1e-4)


def test_too_little_text_is_noted():
    result, _ = run(canonical("llama"), ReduceWidth(keep=0.8, parts=("feed-forward",)), calibration=text(2, 24))
    assert [note for note in result.notes if "48 tokens of calibration text for 128 input features" in note]
    result, _ = run(canonical("llama"), ReduceWidth(keep=0.8, parts=("feed-forward",)), calibration=text(6, 24))
    assert not result.notes
