"""Capture of any module: numbers, names of dims, and a module left as it was."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from skink.errors import CaptureError
from skink.graph.capture import capture
from tests.modules import One, Three, Two, parameter, results


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.norm = nn.LayerNorm(8)
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, tokens: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.embed(tokens) * scale
        for layer in self.layers:
            hidden = hidden + torch.relu(layer(self.norm(hidden)))
        return hidden, hidden.mean(1)


class Recurrent(nn.Module):
    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x)[0]
        return result


def assert_captured(
    module: nn.Module,
    examples: tuple[Tensor, ...],
    inputs: tuple[Tensor, ...],
    dims: dict[str, dict[int, str]] | None = None,
) -> Any:
    """Captured with `examples`, the program gives on `inputs` what the module gives, in number, dtype and value."""
    program = capture(module, examples, dims=dims)
    wanted = results(module.eval(), *inputs)
    found = program(*inputs)
    assert len(found) == len(wanted) == len(program.outputs)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    return program


def test_tokens_and_floats_at_another_size() -> None:
    examples = (torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, 1))
    inputs = (torch.randint(0, 11, (5, 9)), torch.randn(5, 9, 1))
    program = assert_captured(Stack(), examples, inputs)
    assert [entry.dims for entry in program.inputs] == [("B", "T"), ("B", "T", 1)]
    assert program.outputs == ("output_0", "output_1")


@pytest.mark.parametrize(
    ("module", "examples", "inputs"),
    [
        (One(lambda self, x: x @ self.w, w=parameter(4, 3)), [(2, 4)], [(7, 4)]),
        (Two(lambda self, x, y: x * y.mean(1)), [(2, 5), (2, 3, 5)], [(4, 5), (4, 8, 5)]),
        (Three(lambda self, x, y, z: x + y * z), [(2, 5), (2, 5), ()], [(3, 5), (3, 5), ()]),
    ],
    ids=["one", "two", "three"],
)
def test_number_of_inputs(module: nn.Module, examples: list[tuple[int, ...]], inputs: list[tuple[int, ...]]) -> None:
    assert_captured(module, tuple(map(torch.randn, examples)), tuple(map(torch.randn, inputs)))


def in_place(self: Any, x: Tensor) -> Tensor:
    total = x.clone()
    total.mul_(2).add_(self.bias)
    total[:, 0] = 7.0
    return total.relu_()


def without_gradients(self: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        table = torch.cos(x) * self.bias
    return x * table


def autocast_off(self: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        inner = x * self.bias
    return inner + 1


def nothing_beside(self: Any, x: Tensor) -> tuple[Tensor, None, Tensor]:
    return x + self.bias, None, x.argmax(-1)


def by_length(self: Any, x: Tensor) -> Tensor:
    return x[:, : max(x.shape[1] - 2, 1)] * (x.shape[1] // 2) + self.bias


@pytest.mark.parametrize("body", [in_place, without_gradients, autocast_off, by_length])
def test_bodies(body: Callable[..., Any]) -> None:
    module = One(body, bias=torch.randn(4))
    assert_captured(module, (torch.randn(2, 3, 4),), (torch.randn(5, 9, 4),))


def test_results_that_are_none_are_left_out() -> None:
    program = capture(One(nothing_beside, bias=torch.ones(4)), (torch.randn(2, 4),))
    x = torch.randn(3, 4)
    found = program(x)
    assert program.outputs == ("output_0", "output_1")
    assert torch.equal(found[0], x + 1)
    assert torch.equal(found[1], x.argmax(-1))


def test_plain_tensor_attributes_and_unnamed_constants_are_kept() -> None:
    module = One(lambda self, x: x * self.scale + torch.tensor([1.0, 2.0]))
    module.__dict__["scale"] = torch.tensor(3.0)
    assert_captured(module, (torch.randn(2, 2),), (torch.randn(4, 2),))


def test_modules_in_training_mode_are_captured_as_in_evaluation_and_stay_in_training() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4)).train()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    program = capture(module, (torch.randn(3, 4),))
    assert all(child.training for child in module.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    x = torch.randn(6, 4)
    torch.testing.assert_close(program(x)[0], results(module.eval(), x)[0])


def test_dtypes_other_than_float32() -> None:
    module = One(lambda self, x: self.layer(x), layer=nn.Linear(4, 4).double())
    program = assert_captured(module, (torch.randn(2, 4).double(),), (torch.randn(3, 4).double(),))
    assert program.dtype is torch.float64


def test_tensors_of_the_program_are_the_modules_own() -> None:
    module = Stack()
    program = capture(module, (torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, 1)))
    weights = dict(program.weights())
    assert set(weights) == set(module.state_dict())
    assert all(weights[name].data_ptr() == tensor.data_ptr() for name, tensor in module.state_dict().items())


def test_dims_may_be_named() -> None:
    module = Two(lambda self, x, y: x @ y)
    examples = (torch.randn(2, 3, 4), torch.randn(2, 4, 6))
    program = assert_captured(
        module,
        examples,
        (torch.randn(5, 7, 4), torch.randn(5, 4, 1)),
        dims={"x": {0: "N", -2: "rows"}, "y": {0: "N", 2: "columns"}},
    )
    assert [entry.dims for entry in program.inputs] == [("N", "rows", 4), ("N", 4, "columns")]


def test_many_named_dims() -> None:
    module = Three(lambda self, x, y, z: x.sum() + y.sum() + z.sum())
    examples = tuple(torch.randn(2, 3, 4) for _ in range(3))
    names = iter("ABCDEFGHI")
    dims = {entry: {axis: next(names) for axis in range(3)} for entry in "xyz"}
    assert_captured(module, examples, (torch.randn(1, 2, 3), torch.randn(4, 5, 6), torch.randn(7, 8, 9)), dims)


def test_no_dim_need_be_symbolic() -> None:
    program = assert_captured(nn.Linear(4, 4), (torch.randn(2, 4),), (torch.randn(2, 4),), dims={})
    assert program.inputs[0].dims == (2, 4)


def test_shared_memory_is_refused() -> None:
    x = torch.randn(2, 3, 4)
    with pytest.raises(CaptureError, match=r"^\[CAPTURE-001\] example inputs 'x' and 'y' share memory") as caught:
        capture(Two(lambda self, x, y: x @ y), (x, x.transpose(1, 2)))
    assert "fix: pass y.clone()." in str(caught.value)


def decides_by_value(self: Any, x: Tensor) -> Tensor:
    if x.sum() > 0:  # the line that the error names
        return x
    return -x


def test_failure_names_the_users_line() -> None:
    with pytest.raises(CaptureError, match="CAPTURE-002") as caught:
        capture(One(decides_by_value), (torch.randn(2, 3),))
    assert "test_capture.py" in caught.value.where
    assert "if x.sum() > 0:" in caught.value.where
    assert "torch.where" in caught.value.fix


def test_a_module_that_cannot_be_copied_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"CAPTURE-002.*TypeError"):
        capture(One(lambda self, x: x, lock=threading.Lock()), (torch.randn(2),))


@pytest.mark.parametrize(
    ("examples", "dims", "message"),
    [
        ((torch.zeros(2, 3), torch.zeros(2), torch.zeros(2)), None, "3 example inputs for a forward of 2 arguments"),
        ((torch.zeros(2, 3), 4.0), None, "example input 'y' is a float, not a tensor"),
        ({"x": torch.zeros(2, 3), "y": torch.zeros(4, 3)}, None, "dim B has size 2 in 'x' and 4 in 'y'"),
        ((torch.zeros(2, 3), torch.zeros(2, 3)), {"w": {0: "B"}}, "dims are named for w, which is no input"),
        ((torch.zeros(2, 3), torch.zeros(2, 3)), {"x": {2: "B"}}, "axis 2 of 'x', which has 2 axes"),
        ((torch.zeros(2, 3), torch.zeros(2, 3)), {"x": {0: "a b"}}, "'a b', for axis 0 of 'x', cannot name a dim"),
        ((torch.zeros(2, 3), torch.zeros(2, 3)), [0], "dims is a list, not a mapping of inputs"),
        ((torch.zeros(2, 3), torch.zeros(2, 3)), {0: "B"}, "dims has 0 where the name of an input belongs"),
        ((torch.zeros(2, 3), torch.zeros(2, 3)), {"x": ["B"]}, "dims of 'x' are ['B'], not names by axis"),
        ((torch.zeros(2, 3), torch.zeros(2, 3)), {"x": {"B": 0}}, "'B', in dims of 'x', is no axis"),
        ((torch.zeros(2, 3), torch.zeros(2, 3)), {"x": {0: 1}}, "1, for axis 0 of 'x', cannot name a dim"),
        (torch.zeros(2, 3), None, "example_inputs is a Tensor, not a sequence"),
        ((torch.zeros(2, 3), torch.zeros(2, 3)), {"x": {1: "N"}}, "only one size in this model"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(examples: Any, dims: Any, message: str) -> None:
    module = Two(lambda self, x, y: x * self.w + y, w=parameter(3))
    with pytest.raises(CaptureError, match=r"\[CAPTURE-005\]") as caught:
        capture(module, examples, dims=dims)
    assert message in caught.value.what


def test_a_function_is_no_model() -> None:
    with pytest.raises(CaptureError, match=r"\[CAPTURE-004\] a model of the type .* is no module"):
        capture(torch.relu, (torch.zeros(2, 3),))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_draw_nothing_in_evaluation(kind: type[nn.RNNBase]) -> None:
    assert_captured(
        Recurrent(kind(4, 8, num_layers=2, dropout=0.5, batch_first=True)),
        (torch.zeros(2, 3, 4),),
        (torch.randn(5, 3, 4),),
        {"x": {0: "B"}},
    )
