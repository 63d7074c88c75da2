import pytest
import torch
from torch import nn

from skink.errors import GraphError
from skink.graph.capture import capture
from skink.graph.pipeline import Pipeline
from skink.graph.program import Stage
from skink.passes.canonicalize import Canonicalize
from skink.passes.decompose.tucker import Tucker
from skink.passes.decompose.tucker.convolution import convolutions, ranks_within, tucker_parameters
from tests.modules import One


def captured(module, *shape):
    program = capture(module.eval(), (torch.randn(*shape),), dims={"x": {0: "B"}})
    Pipeline((Canonicalize(),)).run(program, verify=0)
    return program


def run(program, options):
    changed = program.clone()
    records = Pipeline((options,), start=Stage.CANONICAL).run(changed, verify=1).passes
    return records[0].result, changed


def layer(dims, *arguments, **options):
    """A module of one convolution, named `conv`, and its example's shape."""
    kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
    torch.manual_seed(0)
    return One(lambda self, x: self.conv(x), conv=kind(*arguments, **options)), (2, arguments[0], *[9] * dims)


SHAPES = [
    (1, (8, 12, 3), {}),
    (1, (8, 12, 3), {"stride": 2, "padding": 1, "bias": False}),
    (1, (8, 12, 3), {"padding": "same", "dilation": 2}),
    (1, (8, 8, 3), {"padding": 1, "padding_mode": "reflect"}),
    (2, (8, 12, 3), {"stride": (1, 2), "padding": (2, 1), "dilation": (2, 1)}),
    (2, (8, 12, (3, 1)), {"bias": False}),
    (3, (6, 8, 3), {"padding": 1}),
]


@pytest.mark.parametrize(("dims", "arguments", "options"), SHAPES)
def test_what_is_put_in_its_place(dims, arguments, options):
    """A whole mode and one cut to all but nothing of its rank: exact at full rank, the written-out HOSVD below it."""
    module, shape = layer(dims, *arguments, **options)
    program, x = captured(module, *shape), torch.randn(*shape)
    in_, out = arguments[:2]
    for ranks in ((out, 2), (3, in_), (3, 2)):
        _, changed = run(program, Tucker(rank_out=ranks[0], rank_in=ranks[1], iterations=0))
        kernel = module.conv.weight.detach().double()
        for mode, rank in enumerate(ranks):
            unfolded = kernel.transpose(0, mode).flatten(1) if mode else kernel.flatten(1)
            whole = module.conv.weight.detach().double()
            vectors = torch.linalg.svd(whole.transpose(0, mode).flatten(1), full_matrices=False)[0][:, :rank]
            kernel = (vectors @ vectors.T @ unfolded).view_as(kernel.transpose(0, mode)).transpose(0, mode)
        expected, _ = layer(dims, *arguments, **options)
        with torch.no_grad():
            expected.conv.weight.copy_(kernel)
            expected.conv.bias = module.conv.bias
            torch.testing.assert_close(changed(x)[0], expected(x), rtol=1e-4, atol=1e-5)


def test_a_kernel_of_low_rank_is_kept_exactly():
    module, shape = layer(2, 8, 12, 3, padding=1)
    with torch.no_grad():
        core = torch.randn(3, 2, 3, 3)
        module.conv.weight.copy_(torch.einsum("oa,ib,abhw->oihw", torch.randn(12, 3), torch.randn(8, 2), core))
    result, changed = run(captured(module, *shape), Tucker(rank_out=3, rank_in=2))
    x = torch.randn(*shape)
    torch.testing.assert_close(changed(x)[0], module(x).detach(), rtol=1e-4, atol=1e-4)
    assert result.layers[0].weight_error < 1e-6


def test_a_rewritten_convolution_as_text():
    module, shape = layer(1, 8, 12, 3, stride=2, padding=1)
    result, changed = run(captured(module, *shape), Tucker(rank=4))
    expected = """
program rewritten(%x: f32[B,8,9])
  %conv1d_default : f32[B,4,9] = aten.conv1d(%x, @conv.down.weight)  # convolution-to-tucker
  %conv1d_default_1 : f32[B,4,5] = aten.conv1d(%conv1d_default, @conv.core.weight, None, [2], [1])  # convolution-to-tucker
  %conv1d_default_2 : f32[B,12,5] = aten.conv1d(%conv1d_default_1, @conv.up.weight, @conv.bias)  # convolution-to-tucker
  return output_0=%conv1d_default_2
"""  # noqa: E501
    assert str(changed) == expected.strip()
    [record] = result.layers
    kept = torch.einsum(
        "oa,abk,bi->oik",
        changed.weight("conv.up.weight").double()[..., 0],
        changed.weight("conv.core.weight").double(),
        changed.weight("conv.down.weight").double()[..., 0],
    )
    exact = module.conv.weight.detach().double()
    assert record.weight_error == pytest.approx(float((exact - kept).norm() / exact.norm()), rel=1e-6)
    assert (record.kind, record.shape, record.decision, record.rank) == ("convolution", (12, 8, 3), "factored", 4)
    assert (record.parameters_before, record.parameters_after) == (288, 12 * 4 + 4 * 4 * 3 + 4 * 8)


def test_a_share_of_the_parameters():
    module, shape = layer(2, 16, 24, 3)
    result, changed = run(captured(module, *shape), Tucker(rank=0.5))
    [record] = result.layers
    held = sum(changed.weight(f"conv.{name}.weight").numel() for name in ("down", "core", "up"))
    assert held == record.parameters_after
    assert 0.4 * record.parameters_before < held <= 0.5 * record.parameters_before


@pytest.mark.parametrize("shape", [(24, 16, 3, 3), (5, 64, 3), (7, 7, 1, 1)])
def test_ranks_within_a_share(shape):
    for keep in (0.2, 0.5, 0.9):
        out, in_ = ranks_within(keep, shape)
        numbers = torch.Size(shape).numel()
        assert tucker_parameters(shape, out, in_) <= keep * numbers
        step = 1 / max(shape[0], shape[1])
        larger = (int(shape[0] * (out / shape[0] + 2 * step)), int(shape[1] * (in_ / shape[1] + 2 * step)))
        assert tucker_parameters(shape, *larger) > keep * numbers
    assert ranks_within(0.0001, shape) == (0, 0)


def test_few_channels_stay_whole():
    module, shape = layer(2, 3, 32, 3)
    result, changed = run(captured(module, *shape), Tucker(rank=8))
    assert sorted(name for name, _ in changed.weights()) == ["conv.bias", "conv.core.weight", "conv.up.weight"]
    assert result.layers[0].parameters_after == 8 * 3 * 9 + 32 * 8


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.grouped = nn.Conv1d(8, 8, 3, groups=8, padding=1)
        self.transposed = nn.ConvTranspose1d(8, 8, 3)
        self.thin = nn.Conv1d(8, 2, 1)

    def forward(self, x):
        return self.thin(self.transposed(self.grouped(x)))


def test_what_is_refused_and_why():
    program = captured(Odd(), 2, 8, 9)
    result, changed = run(program, Tucker(rank=4))
    assert {record.name: record.reason for record in result.layers} == {
        "grouped": "it has 8 groups, and mixes no channel of one with those of another",
        "transposed": "it is a transposed convolution",
        "thin": "ranks 2 and 4 of 2x8x1 save nothing",
    }
    assert len(result.refused) == 3
    assert str(changed).splitlines()[1:] == str(program).splitlines()[1:]


def test_a_kernel_that_something_else_reads():
    module = One(lambda self, x: self.conv(x) + self.conv.weight.sum(), conv=nn.Conv1d(8, 8, 3))
    result, _ = run(captured(module, 2, 8, 9), Tucker(rank=2))
    assert result.layers[0].reason == "the weight is tied: something that is no convolution reads it too"


def test_a_kernel_that_is_read_twice_is_factored_once():
    module = One(lambda self, x: self.conv(torch.relu(self.conv(x))), conv=nn.Conv1d(8, 8, 3, padding=1))
    result, changed = run(captured(module, 2, 8, 9), Tucker(rank=2))
    assert result.edits == 2
    assert len(list(changed.weights())) == 4
    assert [kernel.name for kernel in convolutions(changed)] == ["conv.down", "conv.core", "conv.up"]


def test_a_second_run_changes_nothing():
    module, shape = layer(2, 16, 24, 3)
    _, once = run(captured(module, *shape), Tucker(rank=0.5))
    result, twice = run(once, Tucker(rank=0.5))
    assert {entry.reason for entry in result.refused} == {"it is already one of several thin factors"}
    assert str(once) == str(twice)


def test_a_kernel_that_is_not_finite():
    module, shape = layer(1, 8, 8, 3)
    module.conv.weight.data[0] = float("nan")
    result, _ = run(captured(module, *shape), Tucker(rank=2))
    assert [entry.reason for entry in result.refused] == ["the weight is not finite"]


def test_no_values():
    module, shape = layer(1, 8, 8, 3)
    program = captured(module, *shape).with_dtype(torch.float32, shapes_only=True)
    with pytest.raises(GraphError, match="on the meta device") as caught:
        run(program, Tucker(rank=2))
    assert caught.value.code == "GRAPH-002"
