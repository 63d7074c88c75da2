import gc

import pytest
import torch
from torch import nn

from skink.errors import GraphError
from skink.graph import backward
from skink.graph.backward import run_backward
from skink.graph.capture import capture
from skink.graph.regions import split_regions
from skink.graph.rewriter import Rewriter
from tests.graph.test_regions import Chain, Reuse, linears


class Weighted:
    """The sum of outputs, each times a number of its own for each draw."""

    def __init__(self, nodes, factors=(1.0,), observes=False):
        self.nodes, self.factors, self.observes = tuple(nodes), factors, observes
        self.draws, self.seen = len(factors), []

    def observe(self, node, value, batch):
        self.seen.append((node, batch, value.requires_grad))

    def gradient(self, node, value, batch, draw):
        return torch.full_like(value, self.factors[draw] * (1 + self.nodes.index(node)))


def outputs(program):
    (node,) = (node for node in program.graph.nodes if node.op == "output")
    return list(node.args[0]) if isinstance(node.args[0], tuple | list) else [node.args[0]]


def gathered(program, batches, objective, layers=None, **options):
    """What every layer got, by node: a list over batches of (input, gradients), and the regions in order."""
    found = {}

    def collect(batch, here):
        for layer in here:
            assert len(found.setdefault(layer.node, [])) == batch
            found[layer.node].append((layer.input, layer.gradients))

    layers = linears(program) if layers is None else layers
    order = [region.index for region in run_backward(program, batches, objective, collect, layers=layers, **options)]
    return found, order


def by_autograd(module, x, names):
    """(input, gradient at the output) of each child by plain autograd over the whole module."""
    seen = {}
    handles = [
        module.get_submodule(name).register_forward_hook(
            lambda module, arguments, result, name=name: seen.__setitem__(name, (arguments[0].detach(), result))
        )
        for name in names
    ]
    module(x.clone().requires_grad_()).sum().backward(inputs=[result for _, result in seen.values()])
    for handle in handles:
        handle.remove()
    return [(x, result.grad) for x, result in (seen[name] for name in names)]


@pytest.mark.parametrize("make", [Chain, Reuse])
def test_gradients_are_those_of_autograd_over_the_whole_graph(make):
    torch.manual_seed(0)
    module = make()
    program = capture(module, (torch.randn(4, 6),))
    x = torch.randn(10, 6)
    found, order = gathered(program, [{"x": part} for part in x.split(4)], Weighted(outputs(program), (1.0, -2.0)))
    regions = split_regions(program, linears(program))
    assert order == list(reversed(range(len(regions))))
    assert len(order) > 10
    names = [name for name, child in module.named_modules() if isinstance(child, nn.Linear)]
    with torch.enable_grad():
        expected = by_autograd(module, x, names)
    for node, (inputs, gradient) in zip(linears(program), expected, strict=True):
        seen, gradients = zip(*found[node], strict=True)
        torch.testing.assert_close(torch.cat(seen), inputs)
        torch.testing.assert_close(torch.cat([first for first, _ in gradients]), gradient)
        torch.testing.assert_close(torch.cat([second for _, second in gradients]), -2 * gradient)


class Parts(nn.Module):
    """A value of several tensors is alive between layers, and integers beside it; two outputs, one of them early."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Linear(6, 9)
        self.layers = nn.ModuleList([nn.Linear(3, 3) for _ in range(12)])
        self.unread = nn.Linear(3, 3)

    def forward(self, x):
        parts = self.first(x).split(3, dim=-1)
        best = parts[2].argmax(-1, keepdim=True)
        y = parts[0]
        for layer in self.layers:
            y = torch.tanh(layer(y)) + parts[1] * parts[2].gather(-1, best)
        return torch.relu(self.first(x)), y


def test_values_of_several_tensors_integers_and_early_outputs():
    module = Parts()
    program = capture(module, (torch.randn(4, 6),))
    x = torch.randn(5, 6)
    objective = Weighted(outputs(program), observes=True)
    found, _ = gathered(program, [{"x": x}], objective)
    y = module.first(x).detach().requires_grad_()
    again = module.first(x).detach().requires_grad_()
    parts = y.split(3, dim=-1)
    best = parts[2].argmax(-1, keepdim=True)
    last = parts[0]
    for layer in module.layers:
        last = torch.tanh(layer(last)) + parts[1] * parts[2].gather(-1, best)
    expected = torch.autograd.grad(torch.relu(again).sum() + 2 * last.sum(), (y, again))
    # Capture keeps the two calls of the one layer, or one for both.
    ours = [found[node][0][1][0] for node in linears(program) if node.meta["val"].shape[-1] == 9]
    torch.testing.assert_close(sum(ours), sum(expected))
    assert {node for node, _, _ in objective.seen} == set(objective.nodes)
    assert not any(required for _, _, required in objective.seen)


def test_what_nothing_depends_on_has_no_gradient():
    module = Chain(3)
    program = capture(module, (torch.randn(4, 6),))
    first, second, third = linears(program)
    found, order = gathered(program, [{"x": torch.randn(4, 6)}], Weighted([first]), [first, third])
    assert found[third][0][1] == [None]
    torch.testing.assert_close(found[first][0][1][0], torch.ones(4, 6))
    assert second not in found
    assert order[-1] == 0


def test_regions_before_the_first_layer_are_left_out():
    program = capture(Chain(30), (torch.randn(4, 6),))
    progress = []
    batches = [{"x": torch.randn(4, 6)} for _ in range(2)]
    layer = linears(program)[20]
    found, order = gathered(
        program, batches, Weighted(outputs(program)), [layer], progress=lambda *step: progress.append(step)
    )
    regions = split_regions(program, linears(program))
    (first,) = (region.index for region in regions if layer in region.nodes)
    assert list(found) == [layer]
    assert order[-1] == first
    assert [done for done, _ in progress] == list(range(1, progress[0][1] + 1))


@pytest.fixture
def new_objects_only():
    """`alive` sees what a test makes, and need not look through all that the tests before it left in memory."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def alive(shape):
    tensors = [entry for entry in gc.get_objects() if issubclass(type(entry), torch.Tensor) and entry.shape == shape]
    assert not any(entry.requires_grad for entry in tensors)
    return len({entry.data_ptr() for entry in tensors})


@pytest.mark.usefixtures("new_objects_only")
def test_memory_holds_what_regions_receive_and_no_more():
    program = capture(Chain(12), (torch.randn(4, 6),))
    count, shape = 4, (37, 6)
    batches = [{"x": torch.randn(shape)} for _ in range(count)]
    held = {}
    gc.collect()
    for region in run_backward(
        program, batches, Weighted(outputs(program)), lambda batch, layers: None, layers=linears(program)
    ):
        held[region.index] = alive(shape)
    # The inputs; what the regions before this one received (the first has nothing but inputs); the gradients.
    for index, number in held.items():
        gradients = count if index else 0
        assert number == count + max(0, index - 1) * count + gradients, index


@pytest.mark.usefixtures("new_objects_only")
def test_where_values_are_too_many_some_are_made_again(monkeypatch):
    program = capture(Chain(26), (torch.randn(4, 6),))
    shape, layers = (37, 6), linears(program)
    batches = [{"x": torch.randn(shape)} for _ in range(2)]
    expected, order = gathered(program, batches, Weighted(outputs(program)))
    monkeypatch.setattr(backward, "_HELD", 1000)
    held, found, progress = {}, {}, []

    def collect(batch, here):
        for layer in here:
            torch.testing.assert_close(layer.gradients[0], expected[layer.node][batch][1][0])
            found[layer.node, batch] = True

    gc.collect()
    before = alive(shape)
    for region in run_backward(
        program,
        batches,
        Weighted(outputs(program), observes=True),
        collect,
        layers=layers,
        progress=lambda *step: progress.append(step),
    ):
        held[region.index] = (alive(shape) - before) / len(batches)
    assert list(held) == order
    assert len(found) == 2 * len(layers)
    # Some twice the root of how many regions there are; without it there would be one for each.
    assert max(held.values()) <= 2 * 26**0.5 < 12
    assert progress[-1][0] == progress[-1][1]


def test_regions_may_be_edited_as_they_come():
    module = Chain(12)
    program = capture(module, (torch.randn(4, 6),))
    x = torch.randn(3, 6)
    expected, _ = gathered(program, [{"x": x}], Weighted(outputs(program)))
    expected = [expected[node][0][1][0] for node in linears(program)]
    layers, found = linears(program), {}

    def collect(batch, here):
        found.update({layer.node: layer.gradients[0] for layer in here})

    rewriter = Rewriter(program, "test")
    for region in run_backward(program, [{"x": x}], Weighted(outputs(program)), collect, layers=layers):
        for node in (node for node in layers if node in region.nodes):
            with rewriter.before(node):
                new = rewriter.call(torch.ops.aten.mul.Tensor, rewriter.call(node.target, *node.args), 2.0)
            rewriter.replace(node, new, rule="double")
        rewriter.finish()
    for gradient, wanted in zip((found[node] for node in layers), expected, strict=True):
        assert torch.equal(gradient, wanted)


def test_gradients_are_off_for_the_caller_and_weights_get_none():
    program = capture(Chain(3), (torch.randn(4, 6),))
    with torch.no_grad():
        for _ in run_backward(
            program,
            [{"x": torch.randn(2, 6)}],
            Weighted(outputs(program)),
            lambda batch, layers: None,
            layers=linears(program),
        ):
            assert not torch.is_grad_enabled()
    assert all(tensor.grad is None and not tensor.requires_grad for _, tensor in program.weights())


def test_weights_without_values_are_refused():
    with torch.device("meta"):
        chain = Chain(2)
    program = capture(chain, (torch.randn(4, 6),))
    with pytest.raises(GraphError, match="meta device") as caught:
        gathered(program, [], Weighted(outputs(program)))
    assert caught.value.code == "GRAPH-002"
