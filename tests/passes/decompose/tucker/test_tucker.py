import pytest
import torch
from torch import nn

from skink.errors import CalibrationError, GraphError, OptionError
from skink.graph.capture import capture
from skink.graph.passes import Context
from skink.graph.pipeline import Pipeline
from skink.graph.program import Stage
from skink.graph.rewriter import Rewriter
from skink.passes.canonicalize import Canonicalize
from skink.passes.decompose.tucker import Tucker
from skink.passes.recipe import parse_passes
from tests.graph.programs import canonical
from tests.models import VOCABULARY
from tests.modules import One


def run(program, options, *, calibration=None):
    changed = program.clone()
    records = Pipeline((options,), start=Stage.CANONICAL).run(changed, calibration=calibration, verify=1).passes
    return records[0].result, changed


def captured(module):
    program = capture(module.eval(), (torch.randn(3, 16),))
    Pipeline((Canonicalize(),)).run(program, verify=0)
    return program


def one(out=24, bias=True):
    torch.manual_seed(0)
    return One(lambda self, x: self.layer(x), layer=nn.Linear(16, out, bias=bias))


def text(count=8, length=24):
    return torch.randint(0, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(4))


def product(changed, *names):
    factors = [changed.weight(f"layer.{name}.weight").double() for name in names]
    return torch.linalg.multi_dot(factors)


@pytest.mark.parametrize("out", [16, 24, 8])
@pytest.mark.parametrize("rank", [1, 3])
def test_two_and_three_factors_are_the_truncated_svd(out, rank):
    module = one(out)
    left, values, right = torch.linalg.svd(module.layer.weight.detach().double(), full_matrices=False)
    expected = (left[:, :rank] * values[:rank]) @ right[:rank]
    program = captured(module)
    _, two = run(program, Tucker(rank=rank))
    _, three = run(program, Tucker(rank=rank, factors=3))
    torch.testing.assert_close(product(two, "up", "down"), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(product(three, "up", "core", "down"), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        three.weight("layer.core.weight").double().abs(), torch.diag(values[:rank]), rtol=1e-5, atol=1e-6
    )
    x = torch.randn(5, 16)
    bias = module.layer.bias.detach()
    for changed in (two, three):
        torch.testing.assert_close(changed(x)[0], x @ expected.float().T + bias, rtol=1e-4, atol=1e-5)


def test_a_matrix_in_three_factors_as_text():
    result, changed = run(captured(one()), Tucker(rank_out=5, rank_in=4, factors=3))
    expected = """
program rewritten(%x: f32[B,16])
  %linear_default : f32[B,4] = aten.linear(%x, @layer.down.weight)  # linear-to-tucker
  %linear_default_1 : f32[B,5] = aten.linear(%linear_default, @layer.core.weight)  # linear-to-tucker
  %linear_default_2 : f32[B,24] = aten.linear(%linear_default_1, @layer.up.weight, @layer.up.bias)  # linear-to-tucker
  return output_0=%linear_default_2
"""
    assert str(changed) == expected.strip()
    [record] = result.layers
    assert (record.rank, record.parameters_after) == (4, 24 * 5 + 5 * 4 + 4 * 16)


def test_unequal_ranks_of_two_factors_come_to_the_lesser():
    program = captured(one())
    _, unequal = run(program, Tucker(rank_out=6, rank_in=2))
    _, equal = run(program, Tucker(rank=2))
    assert unequal.weight("layer.down.weight").shape == (2, 16)
    torch.testing.assert_close(product(unequal, "up", "down"), product(equal, "up", "down"))


@pytest.mark.parametrize("factors", [2, 3])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_a_share_is_the_largest_rank_within_it(factors, share):
    result, changed = run(captured(one(64, bias=False)), Tucker(rank=share, factors=factors))
    [record] = result.layers
    held = sum(tensor.numel() for _, tensor in changed.weights())
    assert held == record.parameters_after <= share * record.parameters_before
    more = record.rank + 1
    assert more * (64 + 16 + (more if factors == 3 else 0)) > share * record.parameters_before


def test_the_space_of_the_study():
    options = Tucker(rank=1, layers=(1,), tensors=("q_proj", "down_proj"))
    result, changed = run(canonical("llama"), options)
    factored = {record.name: record.rank for record in result.layers if record.decision == "factored"}
    assert factored == {"model.layers.1.self_attn.q_proj": 1, "model.layers.1.mlp.down_proj": 1}
    assert {record.reason for record in result.layers if record.decision != "factored"} == {"not among the targets"}
    assert not result.refused
    assert changed.weight("model.layers.1.mlp.down_proj.up.weight").shape == (64, 1)


def test_whitened_loses_less_of_the_output():
    program, x = captured(one()), torch.randn(64, 16) * torch.logspace(-2, 1, 16)
    weight = program.weight("layer.weight").double()
    lower = torch.linalg.cholesky(x.double().T @ x.double())
    left, values, right = torch.linalg.svd(weight @ lower)
    expected = (left[:, :3] * values[:3]) @ right[:3] @ torch.linalg.inv(lower)
    result, changed = run(program, Tucker(rank=3, factors=3, method="whitened"), calibration=x)
    kept = product(changed, "up", "core", "down")
    torch.testing.assert_close(kept, expected, rtol=1e-4, atol=1e-5)
    [record] = result.layers
    y = x.double() @ weight.T
    assert record.predicted_error == pytest.approx(float((x.double() @ kept.T - y).norm() / y.norm()), rel=1e-5)
    assert record.weight_error == pytest.approx(float((weight - kept).norm() / weight.norm()), rel=1e-6)
    plain, _ = run(program, Tucker(rank=3), calibration=x)
    assert record.weight_error > plain.layers[0].weight_error
    assert record.predicted_error < record.baseline_error


def test_two_sided_predicts_a_loss_and_loses_less_of_it():
    program, calibration = canonical("llama"), text()
    space = {"rank": 0.5, "layers": (0,), "tensors": ("down_proj",)}
    [two_sided] = factored(run(program, Tucker(method="two-sided", **space), calibration=calibration)[0])
    [whitened] = factored(run(program, Tucker(method="whitened", **space), calibration=calibration)[0])
    assert two_sided.predicted_loss > 0
    assert whitened.predicted_loss is None
    assert two_sided.predicted_error > whitened.predicted_error


def factored(result):
    return [record for record in result.layers if record.decision == "factored"]


def test_whitened_without_text():
    assert Tucker(method="whitened").needs_calibration
    assert not Tucker().needs_calibration
    program = canonical("llama")
    with pytest.raises(CalibrationError, match="needs calibration text") as caught:
        Tucker(method="whitened").run(program, Rewriter(program, "tucker"), Context())
    assert caught.value.code == "CALIBRATION-002"


def test_text_that_is_shorter_than_the_layer_is_wide():
    result, _ = run(captured(one()), Tucker(rank=2, method="whitened"), calibration=torch.randn(9, 16))
    assert result.notes[0].startswith("layer: 9 tokens of calibration text for 16 input features")


class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv1d(8, 16, 3, padding=1), nn.Linear(16, 16)

    def forward(self, x):
        return self.head(torch.relu(self.stem(x)).mean(-1))


def both():
    program = capture(Both().eval(), (torch.randn(2, 8, 12),), dims={"x": {0: "B"}})
    Pipeline((Canonicalize(),)).run(program, verify=0)
    return program


def test_linear_layers_and_convolutions_together():
    result, _ = run(both(), Tucker(rank=2))
    assert [(record.name, record.kind) for record in result.layers] == [("head", "linear"), ("stem", "convolution")]
    assert result.edits == 2
    named, _ = run(both(), Tucker(rank=2, targets=("stem",)))
    assert [record.decision for record in named.layers] == ["kept dense", "factored"]
    ignored, _ = run(both(), Tucker(rank=2, ignore=("stem",)))
    assert [record.reason for record in ignored.layers] == ["", "ignored, as asked"]
    assert not ignored.refused
    assert not ignored.notes


def test_ranks_that_save_nothing():
    result, _ = run(captured(one()), Tucker(rank=9, factors=3))
    assert result.edits == 0
    assert [entry.reason for entry in result.refused] == ["3 factors of ranks 9 and 9 of 24x16 save nothing"]
    [record] = run(captured(one(2)), Tucker(rank=0.1))[0].layers
    assert record.reason == "rank=0.1 of 2x16 leaves no rank"


def test_a_weight_that_is_not_finite():
    module = one()
    module.layer.weight.data[0, 0] = float("inf")
    for options in (Tucker(rank=2), Tucker(rank=2, method="whitened")):
        result, _ = run(captured(module), options, calibration=torch.randn(20, 16))
        assert [entry.reason for entry in result.refused] == ["the weight is not finite"]


def test_a_second_run_changes_nothing():
    for factors in (2, 3):
        _, once = run(canonical("gpt2"), Tucker(rank=4, factors=factors))
        result, twice = run(once, Tucker(rank=4, factors=factors))
        assert result.edits == 0
        assert str(once) == str(twice)


def test_no_values():
    program = canonical("llama").with_dtype(torch.float32, shapes_only=True)
    with pytest.raises(GraphError) as caught:
        run(program, Tucker(rank=2))
    assert caught.value.code == "GRAPH-002"


def test_options_as_they_stand_in_recipes():
    line = "tucker{rank=1,factors=3,layers=[0,2],tensors=[q_proj]}"
    options = Tucker(rank=1, factors=3, layers=(0, 2), tensors=("q_proj",))
    assert str(options) == line
    assert parse_passes(line) == (options,)
    assert Tucker.from_options({"rank": 0.5}).rank == 0.5


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 0},
        {"rank": 1.0},
        {"rank": 0.0},
        {"rank_in": 0},
        {"rank_out": -1},
        {"layers": (-1,)},
        {"iterations": -1},
    ],
)
def test_options_out_of_range(options):
    with pytest.raises(OptionError) as caught:
        Tucker(**options)
    assert caught.value.code == "OPTION-002"


def test_a_decoder_runs_on():
    program = canonical("llama")
    result, changed = run(program, Tucker(rank=0.9, method="whitened"), calibration=text())
    ids = text(2, 9)
    arguments = (ids, torch.ones_like(ids), torch.arange(9).expand(2, 9))
    exact, near = program(*arguments)[0], changed(*arguments)[0]
    assert 1e-4 < float((exact - near).norm() / exact.norm()) < 0.7
    assert [entry.reason for entry in result.refused] == ["it is the output head; name it in targets to factor it"]
