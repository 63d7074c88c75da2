import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

from skink.errors import CalibrationError, GraphError, OptionError
from skink.evaluation.corpus import standard_library, token_windows
from skink.graph.capture import capture
from skink.graph.pipeline import Pipeline
from skink.passes.canonicalize import Canonicalize
from skink.passes.decompose import LowRank
from skink.passes.decompose.factorize.factorize import factorize, uniform_rank
from skink.passes.decompose.low_rank import low_rank
from skink.passes.decompose.low_rank import run as running
from tests.graph.programs import canonical
from tests.models import build
from tests.passes.decompose.programs import Block, captured, run, text

ASSET = Path(low_rank.__file__).parents[3] / "assets" / "stdlib-llama"


def test_a_rewritten_program_as_text():
    _, changed = run(captured(Block(), 3, 16), LowRank(keep=0.75, method="plain", targets=("first",)))
    expected = """
program rewritten(%x: f32[B,16])
  %linear_default : f32[B,7] = aten.linear(%x, @first.down.weight)  # linear-to-low-rank
  %linear_default_1 : f32[B,24] = aten.linear(%linear_default, @first.up.weight, @first.up.bias)  # linear-to-low-rank
  %relu : f32[B,24] = aten.relu(%linear_default_1)
  %linear_1 : f32[B,16] = aten.linear(%relu, @second.weight, @second.bias)
  return output_0=%linear_1
"""
    assert str(changed) == expected.strip()
    edit = changed.edits[-1]
    assert (edit.pass_name, edit.rule, edit.qualified_name) == ("low-rank", "linear-to-low-rank", "first")
    assert edit.detail.startswith("rank 7 of 16, relative error 0.")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("method", ["plain", "whitened"])
def test_it_computes_with_the_factors_of_each_weight(method, bias):
    block, x = Block(bias), torch.randn(50, 16)
    result, changed = run(captured(block, 3, 16), LowRank(keep=0.6, method=method), calibration=x)
    hidden = torch.relu(block.first(x)).detach()
    rank = uniform_rank(0.6, 24, 16)
    factors = []
    for layer, inputs in ((block.first, x), (block.second, hidden)):
        exact = inputs.double()
        right = exact.T @ exact if method == "whitened" else None
        factors.append(factorize(layer.weight.detach(), right=right, rank=rank))
    first, second = (entry.up @ entry.down for entry in factors)
    biases = (block.first.bias, block.second.bias)
    expected = nn.functional.linear(torch.relu(nn.functional.linear(x, first, biases[0])), second, biases[1])
    torch.testing.assert_close(changed(x)[0], expected.detach(), rtol=1e-4, atol=1e-5)
    assert dict(changed.weights()).keys() == {
        f"{layer}.{factor}.{kind}"
        for layer in ("first", "second")
        for factor, kind in (("down", "weight"), ("up", "weight"), ("up", "bias"))
        if bias or kind == "weight"
    }
    assert changed.weight("first.down.weight").shape == (rank, 16)
    assert changed.weight("first.up.weight").shape == (24, rank)
    assert [record.rank for record in result.layers] == [rank, rank]


def test_the_record_says_what_each_layer_lost():
    block, x = Block(), torch.randn(50, 16) * torch.logspace(-2, 1, 16)
    result, changed = run(captured(block, 3, 16), LowRank(keep=0.6, method="whitened"), calibration=x)
    record = result.layers[0]
    weight = block.first.weight.detach().double()
    kept = changed.weight("first.up.weight").double() @ changed.weight("first.down.weight").double()
    y = x.double() @ weight.T
    assert (record.name, record.kind, record.shape, record.decision) == ("first", "linear", (24, 16), "factored")
    assert record.predicted_error == pytest.approx(float((x.double() @ kept.T - y).norm() / y.norm()), rel=1e-6)
    assert record.weight_error == pytest.approx(float((weight - kept).norm() / weight.norm()), rel=1e-6)
    assert record.predicted_error < record.baseline_error
    assert (record.parameters_before, record.parameters_after) == (24 * 16, record.rank * 40)
    assert result.edits == 2
    assert not result.refused


def test_plain_needs_no_text_and_knows_no_output_error():
    options = LowRank(method="plain")
    result, _ = run(captured(Block(), 3, 16), options)
    assert not options.needs_calibration
    assert all(record.predicted_error is None and record.weight_error for record in result.layers)


def test_whitened_without_text():
    assert LowRank(method="whitened").needs_calibration
    program = canonical("llama").clone()
    with pytest.raises(CalibrationError, match="needs calibration text") as caught:
        LowRank(method="whitened").run(program, low_rank.Rewriter(program, "low-rank"), low_rank.Context())
    assert caught.value.code == "CALIBRATION-002"


def test_a_decoder():
    program = canonical("llama")
    before = {name: tensor.clone() for name, tensor in program.weights()}
    result, changed = run(program, LowRank(keep=0.9, method="whitened"), calibration=text())
    factored = {record.name for record in result.layers if record.decision == "factored"}
    assert len(factored) == 14
    assert [(entry.reason, entry.node.name) for entry in result.refused] == [
        ("it is the output head; name it in targets to factor it", "linear_14")
    ]
    # k and v of grouped-query attention are narrower, and factored where it saves.
    key = next(record for record in result.layers if record.name == "model.layers.0.self_attn.k_proj")
    assert (key.shape, key.rank) == ((32, 64), uniform_rank(0.9, 32, 64))
    assert sum(record.parameters_after for record in result.layers) < sum(
        record.parameters_before for record in result.layers
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in program.weights())
    ids = text(2, 9)
    arguments = (ids, torch.ones_like(ids), torch.arange(9).expand(2, 9))
    exact, near = program(*arguments)[0], changed(*arguments)[0]
    assert 1e-4 < float((exact - near).norm() / exact.norm()) < 0.7


@pytest.mark.parametrize(
    ("family", "layer", "shape"),
    [
        ("phi3", "model.layers.0.self_attn.qkv_proj", (128, 64)),
        ("gpt_neox", "gpt_neox.layers.0.attention.query_key_value", (192, 64)),
        ("gpt2", "transformer.h.0.attn.c_attn", (192, 64)),
    ],
)
def test_fused_projections(family, layer, shape):
    program = canonical(family)
    result, changed = run(program, LowRank(method="whitened"), calibration=text())
    record = next(record for record in result.layers if record.name == layer)
    rank = uniform_rank(0.8, *shape)
    assert (record.shape, record.rank) == (shape, rank)
    assert changed.weight(f"{layer}.down.weight").shape == (rank, shape[1])
    if family != "phi3":
        assert torch.equal(changed.weight(f"{layer}.up.bias"), program.weight(f"{layer}.bias"))


def test_a_tied_head_stays_and_says_why():
    result, changed = run(canonical("gpt2"), LowRank(targets=("*",), method="whitened"), calibration=text())
    record = next(record for record in result.layers if record.name == "transformer.wte")
    assert (record.decision, record.reason) == ("kept dense", "the weight is tied: embedding reads it too")
    assert record.parameters_after == record.parameters_before
    assert changed.aliases == {"lm_head.weight": "transformer.wte.weight"}


def test_an_untied_head_is_factored_when_named():
    result, changed = run(canonical("llama"), LowRank(targets=("lm_head",), method="whitened"), calibration=text())
    decisions = {record.name: (record.decision, record.reason) for record in result.layers}
    assert decisions.pop("lm_head")[0] == "factored"
    assert set(decisions.values()) == {("kept dense", "not among the targets")}
    assert not result.refused
    assert "lm_head.up.weight" in dict(changed.weights())


def test_targets_and_ignore():
    options = LowRank(targets=("*.mlp.*",), ignore=("*.0.*", "*.nowhere"), method="plain")
    result, _ = run(canonical("llama"), options)
    factored = [record.name for record in result.layers if record.decision == "factored"]
    assert factored == [f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")]
    reasons = {record.name: record.reason for record in result.layers}
    assert reasons["model.layers.0.mlp.up_proj"] == "ignored, as asked"
    assert result.notes[0] == "no linear layer is named like '*.nowhere'."


def test_targets_that_match_nothing():
    with pytest.raises(OptionError, match="match none of the 15 linear layers") as caught:
        run(canonical("llama"), LowRank(targets=("*.ffn.*",), method="plain"))
    assert caught.value.code == "OPTION-002"
    assert "model.layers.0.self_attn.q_proj" in caught.value.why


def test_keep_of_one_leaves_every_layer_dense():
    result, changed = run(canonical("llama"), LowRank(keep=1.0, method="plain"))
    assert result.edits == 0
    assert {record.decision for record in result.layers} == {"kept dense"}
    reason = next(record.reason for record in result.layers if record.shape == (128, 64))
    assert reason == "keep=1 takes nothing away"
    assert dict(changed.weights()).keys() == dict(canonical("llama").weights()).keys()


def test_a_layer_too_narrow_for_any_rank_stays():
    program = captured(nn.Sequential(nn.Linear(16, 1), nn.ReLU(), nn.Linear(1, 16)), 3, 16)
    result, _ = run(program, LowRank(method="plain"))
    assert {record.reason for record in result.layers} == {
        "no rank of 1x16 saves anything",
        "no rank of 16x1 saves anything",
    }


@pytest.mark.parametrize("method", ["plain", "whitened"])
def test_a_second_run_changes_nothing(method):
    options = LowRank(method=method, ignore=("lm_head",))
    _, once = run(canonical("llama"), options, calibration=text())
    result, twice = run(once, options, calibration=text())
    assert result.edits == 0
    assert {entry.reason for entry in result.refused} == {"it is already one of two thin factors"}
    assert str(once) == str(twice)


class Twice(nn.Module):
    """One layer on two inputs, and a second layer tied to it with a bias of its own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.tied = nn.Linear(16, 16, bias=False), nn.Linear(16, 16)
        self.tied.weight = self.layer.weight

    def forward(self, x):
        return self.tied(torch.relu(self.layer(torch.relu(self.layer(x)))))


def test_a_weight_that_several_layers_read_is_factored_once():
    model, x = Twice(), torch.randn(64, 16)
    result, changed = run(captured(model, 3, 16), LowRank(keep=0.5, method="whitened"), calibration=x)
    first = torch.relu(model.layer(x))
    second = torch.relu(model.layer(first))
    inputs = torch.cat([x, first, second]).detach().double()
    factors = factorize(model.layer.weight.detach(), right=inputs.T @ inputs, rank=4)
    torch.testing.assert_close(
        changed.weight("layer.up.weight") @ changed.weight("layer.down.weight"),
        factors.up @ factors.down,
        rtol=1e-4,
        atol=1e-5,
    )
    assert [record.name for record in result.layers] == ["layer"]
    assert result.edits == 3
    assert not changed.aliases
    assert dict(changed.weights()).keys() == {"layer.down.weight", "layer.up.weight", "tied.bias"}
    product = factors.up @ factors.down
    expected = torch.relu(torch.relu(x @ product.T) @ product.T) @ product.T + model.tied.bias
    torch.testing.assert_close(changed(x)[0], expected.detach(), rtol=1e-3, atol=1e-4)


class Plain(nn.Module):
    """A matrix that is no module's `weight`, beside a parameter where its factors would go."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.matrix = nn.Parameter(torch.randn(16, 16))
        self.register_buffer("fixed", torch.randn(16, 16))
        self.layer = nn.Linear(16, 16)
        self.layer.down = nn.Linear(16, 16, bias=False)

    def forward(self, x):
        x = torch.relu(nn.functional.linear(torch.relu(nn.functional.linear(x, self.matrix)), self.fixed))
        return self.layer.down(torch.relu(self.layer(x)))


def test_factors_take_no_name_that_is_in_use():
    program = captured(Plain(), 3, 16)
    _, changed = run(program, LowRank(method="plain", keep=0.5))
    assert list(dict(changed.weights())) == [
        "matrix_factored.down.weight",
        "matrix_factored.up.weight",
        "fixed_factored.down.weight",
        "fixed_factored.up.weight",
        "layer_factored.down.weight",
        "layer_factored.up.weight",
        "layer_factored.up.bias",
        "layer.down.down.weight",
        "layer.down.up.weight",
    ]
    assert changed.buffers == {"fixed_factored.down.weight", "fixed_factored.up.weight"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_factors_have_the_weights_dtype(dtype):
    program = captured(Block().to(dtype), 3, 16)
    result, changed = run(program, LowRank(method="whitened"), calibration=torch.randn(40, 16, dtype=dtype))
    assert {tensor.dtype for _, tensor in changed.weights()} == {dtype}
    assert all(0 < record.predicted_error < 1 for record in result.layers)


def test_fewer_tokens_than_features_are_noted():
    result, _ = run(captured(Block(), 3, 16), LowRank(method="whitened"), calibration=torch.randn(20, 16))
    assert result.notes[0] == (
        "second: 20 tokens of calibration text for 24 input features; "
        "directions that they do not reach are kept by the weight's size."
    )


def test_a_weight_that_is_not_finite_stays():
    block = Block()
    with torch.no_grad():
        block.second.weight[2, 2] = torch.nan
    result, _ = run(captured(block, 3, 16), LowRank(method="whitened"), calibration=torch.randn(40, 16))
    assert [record.decision for record in result.layers] == ["factored", "kept dense"]
    assert result.layers[1].reason == "the weight is not finite"
    assert [entry.reason for entry in result.refused] == ["the weight is not finite"]


@pytest.mark.parametrize("method", ["plain", "whitened"])
def test_weights_without_values(method):
    with torch.device("meta"):
        block = Block()
    program = captured(block, 3, 16)
    with pytest.raises(GraphError, match=r"'first\.weight' is on the meta device") as caught:
        run(program, LowRank(method=method), calibration=torch.randn(40, 16))
    assert caught.value.code == "GRAPH-002"


@pytest.mark.parametrize("keep", [0.0, -0.1, 1.01, float("nan")])
def test_keep_out_of_range(keep):
    with pytest.raises(OptionError, match="keep") as caught:
        LowRank(keep=keep)
    assert caught.value.code == "OPTION-002"


def test_options_in_one_line():
    assert str(LowRank()) == "low-rank"
    assert str(LowRank(method="whitened")) == "low-rank{method=whitened}"
    assert str(LowRank(keep=0.5, targets=("*.mlp.*", "a"))) == 'low-rank{keep=0.5,targets=["*.mlp.*",a]}'
    with pytest.raises(OptionError, match="none of its choices"):
        LowRank.from_options({"method": "whited"})


def test_progress_counts_up_to_its_total():
    steps = []
    run(
        canonical("llama"),
        LowRank(method="whitened"),
        calibration=text(),
        progress=lambda name, done, total: steps.append((done, total)),
    )
    counted = steps[1:-1]
    assert [done for done, _ in counted] == sorted(done for done, _ in counted)
    assert counted[-1][0] == counted[-1][1]
    assert len({total for _, total in counted}) == 1


@pytest.mark.parametrize("method", ["whitened", "fisher"])
def test_no_more_covariances_are_alive_than_one_region_reads(monkeypatch, method):
    alive, most = [], []
    original = running.candidate

    def watched(program, stack, known, *arguments, **options):
        covariance = known[0][0].total
        if not any(reference() is covariance for reference in alive):
            alive.append(weakref.ref(covariance))
        most.append(sum(reference() is not None for reference in alive))
        return original(program, stack, known, *arguments, **options)

    monkeypatch.setattr(running, "candidate", watched)
    run(canonical("llama", num_hidden_layers=4), LowRank(method=method), calibration=text())
    assert len(alive) == 16
    # Attention and FFN of a layer read two inputs each.
    assert max(most) <= 2


def test_whitened_loses_less_than_plain_on_a_trained_model():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(ASSET, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(ASSET)
    program = capture(model)
    Pipeline((Canonicalize(),)).run(program, verify=0)
    calibration = token_windows(standard_library("calibration"), tokenizer, length=256, count=16, over="sample")
    held_out = token_windows(standard_library("held-out"), tokenizer, length=256, count=8, over="sample")

    def loss(subject):
        positions = torch.arange(256).expand(held_out.shape)
        logits = subject(held_out, torch.ones_like(held_out), positions)[0]
        return float(nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), held_out[:, 1:].flatten()))

    dense = loss(program)
    result, whitened_program = run(program, LowRank(keep=0.6, method="whitened"), calibration=calibration)
    _, plain_program = run(program, LowRank(keep=0.6, method="plain"))
    factored = [record for record in result.layers if record.decision == "factored"]
    assert len(factored) == 56
    assert all(record.predicted_error < record.baseline_error for record in factored)
    lost, lost_by_plain = loss(whitened_program) - dense, loss(plain_program) - dense
    # Over all the text: 0.081 and 0.114.
    assert 0.02 < lost < 0.9 * lost_by_plain


def test_it_is_listed():
    from skink.passes import find_pass

    assert find_pass("low-rank") is LowRank


def test_a_model_of_one_key_head():
    program = capture(build("llama", num_key_value_heads=1, head_dim=2, hidden_size=64, num_attention_heads=4))
    Pipeline((Canonicalize(),)).run(program, verify=0)
    result, _ = run(program, LowRank(method="whitened"), calibration=text())
    key = next(record for record in result.layers if record.name.endswith("0.self_attn.k_proj"))
    assert (key.shape, key.rank) == ((2, 64), 1)
