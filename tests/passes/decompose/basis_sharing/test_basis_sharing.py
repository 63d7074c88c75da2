import onnx
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import skink
from skink.errors import BudgetError, CalibrationError, OptionError
from skink.graph.capture import capture
from skink.graph.passes import Context
from skink.graph.pipeline import Pipeline
from skink.graph.program import Stage
from skink.graph.rewriter import Rewriter
from skink.passes.canonicalize import Canonicalize
from skink.passes.decompose.basis_sharing import BasisSharing
from skink.passes.decompose.basis_sharing.factors import shared_rank
from skink.passes.decompose.factorize.factorize import uniform_rank
from skink.passes.lower.select_kernels import lower
from tests.graph.programs import canonical
from tests.models import VOCABULARY, tiny


class Block(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(12, 16, bias=bias), nn.Linear(16, 12, bias=bias)

    def forward(self, x):
        return x + self.down_proj(torch.relu(self.up_proj(x)))


class Stack(nn.Module):
    def __init__(self, count, bias=True):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Block(bias) for _ in range(count))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def stack(count=2, bias=True):
    model = Stack(count, bias).eval()
    program = capture(model, (torch.randn(3, 12),))
    Pipeline((Canonicalize(),)).run(program, verify=0)
    return model, program


def run(program, options, calibration):
    changed = program.clone()
    records = Pipeline((options,), start=Stage.CANONICAL).run(changed, calibration=calibration, verify=1).passes
    return records[0].result, changed


def text(count=8, length=24):
    return torch.randint(0, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(4))


PAPER = BasisSharing(keep=0.6, method="whitened", allocation="uniform", refit=False)


@pytest.mark.parametrize("bias", [True, False])
def test_the_paper_s_method_to_the_number(bias):
    model, program = stack(bias=bias)
    x = torch.randn(80, 12) * torch.logspace(-1, 1, 12)
    result, changed = run(program, PAPER, x)
    covariance, value = torch.zeros(12, 12, dtype=torch.float64), x
    for block in model.layers:
        covariance += value.double().T @ value.double()
        value = block(value).detach()
    weights = torch.cat([block.up_proj.weight for block in model.layers]).detach().double()
    lower_ = torch.linalg.cholesky(covariance)
    left, values, right = torch.linalg.svd(weights @ lower_)
    rank = shared_rank(0.6, 2, 16, 12)
    expected = (left[:, :rank] * values[:rank]) @ right[:rank] @ torch.linalg.inv(lower_)
    basis = changed.weight("layers.0.up_proj.down.weight").double()
    ups = [changed.weight(f"layers.{index}.up_proj.up.weight").double() for index in range(2)]
    torch.testing.assert_close(torch.cat(ups) @ basis, expected, rtol=1e-4, atol=1e-5)
    assert basis.shape == (rank, 12)
    names = {name for name, _ in changed.weights()}
    assert "layers.1.up_proj.down.weight" not in names
    assert ("layers.1.up_proj.up.bias" in names) == bias
    # What does not share is factored by itself.
    assert changed.weight("layers.1.down_proj.down.weight").shape == (uniform_rank(0.6, 12, 16), 16)
    assert sum(record.parameters_after for record in result.layers) == sum(
        tensor.numel() for name, tensor in changed.weights() if not name.endswith("bias")
    )


def test_a_rewritten_program_as_text():
    _, program = stack(bias=False)
    options = BasisSharing(keep=0.7, method="whitened", allocation="uniform", targets=("*up_proj",))
    _, changed = run(program, options, torch.randn(40, 12))
    expected = """
program rewritten(%x: f32[B,12])
  %linear_default : f32[B,6] = aten.linear(%x, @layers.0.up_proj.down.weight)  # linear-to-shared-basis
  %linear_default_1 : f32[B,16] = aten.linear(%linear_default, @layers.0.up_proj.up.weight)  # linear-to-shared-basis
  %relu : f32[B,16] = aten.relu(%linear_default_1)
  %linear_1 : f32[B,12] = aten.linear(%relu, @layers.0.down_proj.weight)
  %add : f32[B,12] = aten.add.Tensor(%x, %linear_1)
  %linear_default_2 : f32[B,6] = aten.linear(%add, @layers.0.up_proj.down.weight)  # linear-to-shared-basis
  %linear_default_3 : f32[B,16] = aten.linear(%linear_default_2, @layers.1.up_proj.up.weight)  # linear-to-shared-basis
  %relu_1 : f32[B,16] = aten.relu(%linear_default_3)
  %linear_3 : f32[B,12] = aten.linear(%relu_1, @layers.1.down_proj.weight)
  %add_1 : f32[B,12] = aten.add.Tensor(%add, %linear_3)
  return output_0=%add_1
"""
    assert str(changed) == expected.strip()


def test_refitting_loses_less_of_each_layer_s_output():
    _, program = stack(4)
    x = torch.randn(80, 12) * torch.logspace(-1, 1, 12)
    common, _ = run(program, PAPER, x)
    own, _ = run(program, BasisSharing(keep=0.6, method="whitened", allocation="uniform"), x)
    pairs = [
        (mine.predicted_error, theirs.predicted_error)
        for mine, theirs in zip(own.layers, common.layers, strict=True)
        if mine.name.endswith("up_proj")
    ]
    assert all(mine < theirs for mine, theirs in pairs)


def test_an_odd_number_of_layers():
    _, program = stack(3)
    result, _ = run(program, PAPER, torch.randn(80, 12))
    ranks = {record.name: record.rank for record in result.layers if record.name.endswith("up_proj")}
    pair, single = shared_rank(0.6, 2, 16, 12), uniform_rank(0.6, 16, 12)
    assert ranks == {"layers.0.up_proj": pair, "layers.1.up_proj": pair, "layers.2.up_proj": single}
    for record in result.layers:
        assert record.parameters_after < record.parameters_before


def test_predicted_errors_are_those_of_the_outputs():
    model, program = stack()
    x = torch.randn(80, 12)
    result, changed = run(program, PAPER, x)
    weight = model.layers[1].up_proj.weight.detach().double()
    kept = (
        changed.weight("layers.1.up_proj.up.weight").double() @ changed.weight("layers.0.up_proj.down.weight").double()
    )
    inputs = model.layers[0](x).detach().double()
    record = next(entry for entry in result.layers if entry.name == "layers.1.up_proj")
    exact = inputs @ weight.T
    assert record.predicted_error == pytest.approx(float((inputs @ kept.T - exact).norm() / exact.norm()), rel=1e-5)


@pytest.mark.parametrize("keep", [0.5, 0.8])
def test_a_global_budget_is_kept_and_nearly_used_up(keep):
    program = canonical("llama")
    result, changed = run(program, BasisSharing(keep=keep), text())
    layers = [record for record in result.layers if record.name != "lm_head"]
    before, after = (sum(getattr(entry, f"parameters_{when}") for entry in layers) for when in ("before", "after"))
    assert keep * before - 256 <= after <= keep * before
    held = sum(tensor.numel() for name, tensor in changed.weights() if ".layers." in name and tensor.dim() == 2)
    assert held == after
    factored = [record for record in layers if record.decision == "factored"]
    assert all(record.predicted_loss > 0 for record in factored)
    ids = text(2, 9)
    arguments = (ids, torch.ones_like(ids), torch.arange(9).expand(2, 9))
    assert torch.isfinite(changed(*arguments)[0]).all()


def test_sharing_is_chosen_where_it_is_the_cheaper_way():
    """Two layers of one weight and one input share for certain; unrelated ones of low rank do not."""
    model, _ = stack(2, bias=False)
    x = torch.randn(200, 12)
    with torch.no_grad():
        for block in model.layers:
            block.down_proj.weight.mul_(0.01)
        model.layers[1].up_proj.weight.copy_(model.layers[0].up_proj.weight)
    program = capture(model, (x[:3],))
    Pipeline((Canonicalize(),)).run(program, verify=0)
    _, alike = run(program, BasisSharing(keep=0.6, targets=("*up_proj",)), x)
    assert "layers.1.up_proj.down.weight" not in dict(alike.weights())
    with torch.no_grad():
        for index, block in enumerate(model.layers):
            columns = torch.zeros(2, 12)
            columns[:, 2 * index : 2 * index + 2] = torch.eye(2)
            block.up_proj.weight.copy_(torch.randn(16, 2) @ columns)
    program = capture(model, (x[:3],))
    Pipeline((Canonicalize(),)).run(program, verify=0)
    _, unlike = run(program, BasisSharing(keep=0.3, targets=("*up_proj",)), x)
    assert "layers.1.up_proj.down.weight" in dict(unlike.weights())


def test_a_budget_of_work_does_not_share():
    """Every layer applies the basis anew, so sharing saves no multiplications, and own factors lose less."""
    _, changed = run(canonical("llama"), BasisSharing(keep=0.7, budget="flops"), text())
    assert not [name for name, _ in changed.weights() if name.endswith("down.weight") and uses(changed, name) > 1]


def uses(program, weight):
    return sum(len(node.users) for node in program.graph.find_nodes(op="get_attr", target=weight))


def test_multiples():
    result, _ = run(canonical("llama"), BasisSharing(keep=0.6, multiple_of=8), text())
    ranks = {record.rank for record in result.layers if record.rank}
    assert ranks
    assert all(rank % 8 == 0 for rank in ranks)


def test_one_basis_through_emission_and_lowering():
    options = BasisSharing(keep=0.6, method="whitened", allocation="uniform")
    _, changed = run(canonical("llama"), options, text())
    name = "model.layers.0.self_attn.q_proj.down.weight"
    assert uses(changed, name) == 2
    ids = text(2, 9)
    arguments = (ids, torch.ones_like(ids), torch.arange(9).expand(2, 9))
    exact = changed(*arguments)[0]
    module = changed.module()
    torch.testing.assert_close(module(*arguments), exact)
    stored = [entry for entry, _ in module.named_parameters() if "q_proj.down" in entry]
    assert stored == [name]
    lowered, _ = lower(changed)
    torch.testing.assert_close(lowered(*arguments)[0], exact, rtol=1e-4, atol=1e-5)


def test_one_basis_on_disk_and_in_onnx(tmp_path):
    recipe = "basis-sharing{keep=0.6,method=whitened,allocation=uniform}"
    model = skink.compress(tiny("llama"), recipe, calibration=text())
    model.save_pretrained(tmp_path / "folder")
    name = "model.layers.0.self_attn.q_proj.down.weight"
    stored = load_file(tmp_path / "folder" / "model.safetensors")
    assert [entry for entry in stored if "q_proj.down" in entry] == [name]
    ids = text(2, 9)
    again = skink.load(tmp_path / "folder")
    assert torch.equal(again(ids).logits, model(ids).logits)
    skink.export_onnx(model, tmp_path / "onnx")
    graph = onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False).graph
    assert [entry.name for entry in graph.initializer if "q_proj.down" in entry.name] == [name]


@pytest.mark.parametrize("options", [PAPER, BasisSharing(keep=0.8, method="whitened", group=3)])
def test_a_second_run_changes_nothing(options):
    _, program = stack(3)
    x = torch.randn(80, 12)
    _, once = run(program, options, x)
    result, twice = run(once, options, x)
    assert {entry.reason for entry in result.refused} == {"it is already one of two thin factors"}
    assert str(once) == str(twice)


def test_what_is_refused_and_why():
    model, program = stack(2)
    result, _ = run(program, BasisSharing(keep=1.0, method="whitened", allocation="uniform"), torch.randn(80, 12))
    assert result.edits == 0
    assert {entry.reason for entry in result.refused} == {
        "rank 8 of 2 of 16x12 saves nothing; break-even is 8",
        "rank 6 of 12x16 saves nothing; break-even is 6",
    }
    tiny, _ = run(program, BasisSharing(keep=0.01, method="whitened", allocation="uniform"), torch.randn(80, 12))
    assert "keep=0.01 of 2 of 16x12 leaves no rank" in {entry.reason for entry in tiny.refused}
    model.layers[0].up_proj.weight.data[0, 0] = float("nan")
    damaged, _ = run(program, BasisSharing(targets=("*.0.up_proj",)), torch.randn(80, 12))
    assert [entry.reason for entry in damaged.refused] == ["the weight is not finite"]


def test_a_budget_that_is_too_small():
    with pytest.raises(BudgetError) as caught:
        run(canonical("llama"), BasisSharing(keep=0.001), text())
    assert caught.value.code == "BUDGET-001"


def test_without_text():
    assert BasisSharing().needs_calibration
    program = canonical("llama")
    with pytest.raises(CalibrationError, match="needs calibration text") as caught:
        BasisSharing().run(program, Rewriter(program, "basis-sharing"), Context())
    assert caught.value.code == "CALIBRATION-002"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0.0}, "keep"),
        ({"group": 0}, "group"),
        ({"multiple_of": 0}, "multiple_of"),
        ({"damping": -1.0}, "damping"),
        ({"method": "whitened", "allocation": "global"}, "allocation=global does not go with method=whitened"),
        ({"method": "whitened", "budget": "latency"}, "allocation=uniform does not go with budget=latency"),
        ({"allocation": "uniform", "budget": "flops"}, "allocation=uniform does not go with budget=flops"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(OptionError, match=message) as caught:
        BasisSharing(**options)
    assert caught.value.code == "OPTION-002"


def test_progress_runs_from_start_to_end():
    seen = []
    program = canonical("llama").clone()
    options = BasisSharing(keep=0.7)
    Pipeline((options,), start=Stage.CANONICAL).run(
        program, calibration=text(), progress=lambda name, done, total: seen.append((done, total)), verify=0
    )
    shares = [done / total for done, total in seen]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
