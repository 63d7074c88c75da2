import pytest
import torch
from torch import nn

from skink.errors import GraphError
from skink.graph.calibration import token_batches
from skink.graph.capture import capture
from skink.graph.regions import run_regions, split_regions
from skink.graph.rewriter import Rewriter
from skink.kernels import opdef
from skink.settings import Settings
from tests.graph.programs import canonical
from tests.models import VOCABULARY

linear = torch.ops.aten.linear.default


@pytest.fixture
def references(monkeypatch):
    """Run ops as `Program.__call__` does, so that numbers can be compared bit for bit."""
    monkeypatch.setattr(opdef, "settings", lambda: Settings(kernels="reference"))


def token_windows(count=5, length=7):
    return torch.randint(0, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(3))


def calls(program):
    return [node for node in program.graph.nodes if node.op == "call_function"]


def linears(program):
    return program.graph.find_nodes(op="call_function", target=linear)


class Interpreter(torch.fx.Interpreter):
    """Runs the whole graph at once and keeps the value of every node."""

    def __init__(self, program):
        super().__init__(program.graph_module, garbage_collect_values=False)

    def values(self, batch):
        with torch.no_grad():
            self.run(*batch.values())
        return self.env


class Chain(nn.Module):
    """Layers in a row: every node is a place to cut."""

    def __init__(self, depth=30):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(depth)])

    def forward(self, x):
        for layer in self.layers:
            x = torch.relu(layer(x)) + 0.1
        return x


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gpt_neox"])
def test_every_value_is_that_of_the_whole_graph_bit_for_bit(family, references):
    program = canonical("llama", num_hidden_layers=4) if family == "llama" else canonical(family)
    batches = token_batches(program, token_windows(), batch=2)
    expected = [Interpreter(program).values(batch) for batch in batches]
    tensors = [node for node in calls(program) if isinstance(expected[0][node], torch.Tensor)]
    seen = {node: [] for node in tensors}
    list(run_regions(program, batches, lambda node, value: seen[node].append(value), wanted=tensors))
    for node, values in seen.items():
        assert len(values) == len(batches)
        for value, env in zip(values, expected, strict=True):
            assert torch.equal(value, env[node]), node


def test_kernels_agree_with_references():
    program = canonical("llama")
    batches = token_batches(program, token_windows())
    head = linears(program)[-1]
    found = []
    list(run_regions(program, batches, lambda node, value: found.append(value), wanted=[head]))
    torch.testing.assert_close(found[0], program(*batches[0].values())[0], rtol=1e-4, atol=1e-5)


def test_a_decoder_is_cut_where_only_the_residual_stream_is_alive():
    program = canonical("llama", num_hidden_layers=4)
    parts = split_regions(program, linears(program))
    # Attention and FFN of each layer, and the head.
    assert [sum(node.target is linear for node in part.nodes) for part in parts] == [4, 3] * 4 + [1]
    assert [len(part.carried) for part in parts] == [1] * 8 + [0]
    assert all(str(part.carried[0].target).startswith("aten.add") for part in parts[:-1])


def test_batches_pass_a_region_before_any_enters_the_next():
    program = canonical("llama", num_hidden_layers=4)
    batches = token_batches(program, token_windows(), batch=1)
    wanted = linears(program)
    order = []
    for region in run_regions(program, batches, lambda node, value: order.append(node), wanted=wanted):
        here = [node for node in wanted if node in region.nodes]
        assert order == [node for _ in batches for node in here]
        order.clear()


def test_every_weight_is_read_by_one_region_only():
    program = canonical("llama", num_hidden_layers=4)
    parts = split_regions(program, linears(program))
    for weight in program.graph.find_nodes(op="get_attr"):
        readers = {part.index for part in parts for user in weight.users if user in part.nodes}
        if weight.target not in program.buffers:
            assert len(readers) == 1, weight.target


def test_nothing_runs_that_is_not_wanted():
    program = canonical("llama", num_hidden_layers=4)
    first = linears(program)[0]
    parts = split_regions(program, [first.args[0]])
    assert len(parts) == 1
    ran = []
    list(
        run_regions(program, token_batches(program, token_windows()), lambda node, _: ran.append(node), wanted=[first])
    )
    assert ran == [first]


def test_a_wanted_input_is_shown():
    program = capture(Chain(3), (torch.randn(4, 6),))
    x = program.graph.find_nodes(op="placeholder")[0]
    batches = [{"x": torch.randn(4, 6)} for _ in range(2)]
    found = []
    list(run_regions(program, batches, lambda node, value: found.append((node, value)), wanted=[x]))
    assert [node for node, _ in found] == [x, x]
    assert all(value is batch["x"] for (_, value), batch in zip(found, batches, strict=True))


def test_a_chain_is_cut_into_pieces():
    program = capture(Chain(30), (torch.randn(4, 6),))
    parts = split_regions(program, linears(program))
    assert max(sum(node.target is linear for node in part.nodes) for part in parts) == 1
    assert sum(len(part.nodes) for part in parts) == len(calls(program))


class Reuse(nn.Module):
    """The first layer's value is read by every later layer: two values are alive at every cut but the first."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(20)])

    def forward(self, x):
        first = self.layers[0](x)
        for layer in self.layers[1:]:
            x = torch.tanh(layer(x) * first)
        return x


def test_a_value_that_stays_alive_does_not_keep_the_graph_in_one_piece():
    program = capture(Reuse(), (torch.randn(4, 6),))
    parts = split_regions(program, linears(program))
    assert len(parts) > 10
    assert {len(part.carried) for part in parts[1:-1]} == {2}


def doubling(chain, x, count, layers):
    """What `layers` layers of a chain give when the first `count` give twice as much."""
    for index, layer in enumerate(chain.layers[:layers]):
        x = torch.relu(layer(x) * (2.0 if index < count else 1.0)) + 0.1
    return x.detach()


@pytest.mark.parametrize("follow", [False, True])
def test_edits_are_followed_where_asked(follow):
    chain = Chain(12)
    program = capture(chain, (torch.randn(4, 6),))
    rewriter = Rewriter(program, "test")
    batches = [{"x": torch.randn(3, 6)} for _ in range(3)]
    last = linears(program)[-1]
    found, progress = [], []
    wanted = linears(program)
    running = run_regions(
        program,
        batches,
        lambda node, value: found.append(value) if node is last else None,
        wanted=wanted,
        follow_edits=follow,
        progress=lambda done, total: progress.append((done, total)),
    )
    for region in running:
        for node in wanted[:-1]:
            if node in region.nodes:
                # Replace the layer itself: what later regions read has another name from now on.
                with rewriter.before(node):
                    again = rewriter.call(linear, *node.args)
                    new = rewriter.call(torch.ops.aten.mul.Tensor, again, 2.0)
                rewriter.replace(node, new, rule="double")
        rewriter.finish()
    for value, batch in zip(found, batches, strict=True):
        before = doubling(chain, batch["x"], 11 if follow else 0, 11)
        torch.testing.assert_close(value, chain.layers[-1](before).detach())
    torch.testing.assert_close(program(batches[0]["x"])[0], doubling(chain, batches[0]["x"], 11, 12))
    assert [done for done, _ in progress] == list(range(1, progress[0][1] + 1))


def test_weights_without_values_are_refused():
    with torch.device("meta"):
        chain = Chain(2)
    program = capture(chain, (torch.randn(4, 6),))
    with pytest.raises(GraphError, match="meta device") as caught:
        list(run_regions(program, [], lambda node, value: None, wanted=linears(program)))
    assert caught.value.code == "GRAPH-002"


def test_gradients_are_off_while_running_and_as_before_in_between():
    program = canonical("llama")
    modes = []
    with torch.enable_grad():
        for _ in run_regions(
            program,
            token_batches(program, token_windows()),
            lambda node, value: modes.append(torch.is_grad_enabled()),
            wanted=linears(program),
        ):
            assert torch.is_grad_enabled()
    assert not any(modes)
