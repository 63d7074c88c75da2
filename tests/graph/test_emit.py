"""Programs as modules: names, ties, training, compiling."""

import copy

import pytest
import torch
from torch import nn

from skink.graph.capture import capture
from skink.graph.emit import bind, bind_part, build_tree, pair_of_layers, pivoted_layers, tied_names
from skink.graph.program import Program
from skink.graph.state import derive_step
from skink.kernels.low_rank_linear.reference import low_rank_linear
from skink.kernels.pivoted_linear.reference import pivoted_linear
from tests.graph.stepping import empty_state
from tests.models import tiny
from tests.modules import One, Two, parameter, results
from tests.programs import batch, canonical, captured, distance, eager_logits


def test_names_numbers_and_layers_are_the_sources(family: str) -> None:
    program, source = canonical(family), tiny(family)
    module = program.module()
    mine, theirs = module.state_dict(), source.state_dict()
    computed = {name for name in mine if name.endswith(("inv_freq", "embed_scale"))}
    assert set(mine) - computed == set(theirs)
    transposed = [name for name in theirs if mine[name].shape != theirs[name].shape]
    assert all(family == "gpt2" and name.split(".")[-2].startswith("c_") for name in transposed)
    kinds = {type(layer) for layer in source.modules() if type(layer).__name__ == "Conv1D"}
    linear = {name for name, layer in source.named_modules() if isinstance(layer, (nn.Linear, *kinds))}
    assert linear <= {name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}
    assert sum(p.numel() for p in module.parameters()) == sum(p.numel() for p in source.parameters())
    inputs = batch(2, 9, padding=3)
    assert distance(module(*inputs), eager_logits(family, inputs), inputs.attention_mask) < 1e-5


def test_tied_weights_share_one_parameter() -> None:
    module = canonical("gpt2").module()
    assert module.lm_head.weight is module.transformer.wte.weight
    assert isinstance(module.lm_head, nn.Linear)
    assert tied_names(canonical("gpt2"), module) == {"lm_head.weight": "transformer.wte.weight"}
    assert tied_names(canonical("llama"), canonical("llama").module()) == {}


def test_a_layer_that_is_swapped_is_the_one_that_runs() -> None:
    module = canonical("llama").module()
    inputs = batch(2, 5)
    before = module(*inputs)
    old = module.model.layers[1].mlp.up_proj if isinstance(module.model.layers, nn.ModuleList) else None
    assert old is None  # plain modules by name
    layers = module.get_submodule("model.layers.1.mlp")
    layers.up_proj = nn.Sequential(layers.up_proj, nn.Tanh())
    after = module(*inputs)
    assert not torch.allclose(before, after)
    layers.up_proj = layers.up_proj[0]
    assert torch.equal(module(*inputs), before)


def test_a_copy_can_be_trained_and_the_program_stays() -> None:
    program = canonical("llama")
    inputs = batch(2, 7)
    before = program(*inputs)[0]
    module = program.module()
    assert all(p.requires_grad for p in module.parameters())
    assert not module.training
    module.train()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        logits = module(*inputs)
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), inputs.input_ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
    assert torch.equal(program(*inputs)[0], before)


def test_gradients_equal_the_sources() -> None:
    source = copy.deepcopy(tiny("gpt2"))
    module = captured("gpt2").module()
    inputs = batch(2, 6)
    source(**inputs._asdict()).logits.pow(2).mean().backward()
    module(*inputs).pow(2).mean().backward()
    theirs = dict(source.named_parameters())
    for name, found in module.named_parameters():
        torch.testing.assert_close(found.grad, theirs[name].grad, rtol=1e-4, atol=1e-6)


def test_without_a_copy_tensors_are_shared() -> None:
    program = canonical("llama")
    shared, own = program.module(copy=False), program.module()
    name = "model.layers.0.mlp.up_proj.weight"
    assert shared.get_parameter(name).data_ptr() == program.weight(name).data_ptr()
    assert own.get_parameter(name).data_ptr() != program.weight(name).data_ptr()
    assert shared.get_parameter(name).requires_grad
    assert not program.weight(name).requires_grad


def test_parts_run_one_after_the_other_on_one_tree() -> None:
    program = canonical("llama")
    inputs = batch(2, 7, padding=2)
    tree = build_tree([program])
    calls = [node for node in program.graph.nodes if node.op in ("call_function", "get_attr")]
    cut = next(i for i, node in enumerate(calls) if "layers.1" in str(node.meta.get("module", "")) and i)
    logits = program.graph.output_node().all_input_nodes
    read = {node for user in (*calls[cut:], *logits) for node in user.all_input_nodes}
    between = [node for node in calls[:cut] if node in read]
    first = bind_part(program, calls[:cut], [], between)
    second = bind_part(program, calls[cut:], between, logits)
    (found,) = second(tree, *inputs, *first(tree, *inputs))
    assert torch.equal(found, program(*inputs)[0])


def test_a_part_hands_on_what_it_is_given() -> None:
    program = canonical("llama")
    inputs = batch(1, 4)
    node = program.graph.find_nodes(op="call_function", target=torch.ops.aten.embedding.default)[0]
    part = bind_part(program, [], [node], [node])
    value = torch.ones(1)
    assert part(nn.Module(), *inputs, value)[0] is value


def test_it_compiles_as_one_graph() -> None:
    module = canonical("llama").module(copy=False)
    inputs = batch(2, 6, padding=2)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    found = compiled(*inputs)
    assert distance(found, module(*inputs), inputs.attention_mask) < 1e-5
    longer = batch(3, 9, padding=2)
    assert distance(compiled(*longer), module(*longer), longer.attention_mask) < 1e-5


def test_it_saves_loads_and_copies_like_any_module() -> None:
    program = canonical("llama")
    inputs = batch(1, 5)
    module, other = program.module(), program.module()
    with torch.no_grad():
        for weight in module.parameters():
            weight.mul_(1.5)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(*inputs), module(*inputs))
    assert torch.equal(copy.deepcopy(module)(*inputs), module(*inputs))
    assert not torch.equal(module(*inputs), program(*inputs)[0])


def test_several_graphs_share_one_tree() -> None:
    full = canonical("llama")
    step = derive_step(full)
    tree = build_tree([full, step])
    inputs = batch(2, 5)
    with torch.no_grad():
        tree.get_parameter("lm_head.weight").mul_(2)
        logits = bind(full)(tree, *inputs)[0]
        stepped = bind(step)(tree, *inputs, *empty_state(step, 2))[0]
    torch.testing.assert_close(logits, 2 * full(*inputs)[0])
    torch.testing.assert_close(stepped, logits)


def check(module: nn.Module, *inputs: torch.Tensor) -> tuple[Program, nn.Module]:
    program = capture(module, inputs)
    emitted = program.module()
    found = emitted(*inputs)
    found = found if isinstance(found, tuple) else (found,)
    for one, other in zip(found, results(module, *inputs), strict=True):
        torch.testing.assert_close(one, other)
    return program, emitted


def test_odd_uses_of_weights() -> None:
    x = torch.randn(2, 4)
    layer, table = nn.Linear(4, 4), nn.Embedding(4, 4)
    # A layer used twice; its weight used without its bias; a weight outside of any layer; a linear map of an embedding.
    check(One(lambda self, x: self.layer(self.layer(x)), layer=layer), x)
    check(One(lambda self, x: self.layer(x) + nn.functional.linear(x, self.layer.weight), layer=layer), x)
    _, emitted = check(One(lambda self, x: nn.functional.linear(x, self.w), w=parameter(3, 4)), x)
    assert [name for name, _ in emitted.named_parameters()] == ["w"]
    check(One(lambda self, x: nn.functional.linear(x, self.layer.weight, self.b), layer=layer, b=parameter(4)), x)
    check(
        Two(lambda self, x, y: nn.functional.linear(self.table(y), self.table.weight) + x, table=table),
        x,
        torch.tensor([1, 3]),
    )


def test_several_results_come_as_a_tuple() -> None:
    check(One(lambda self, x: (x + self.b, x * 2), b=torch.ones(4)), torch.randn(2, 4))


def test_padding_of_an_embedding_gets_no_gradient() -> None:
    module = One(lambda self, x: self.table(x), table=nn.Embedding(5, 3, padding_idx=2))
    _, emitted = check(module, torch.tensor([[1, 2, 4]]))
    emitted(torch.tensor([[1, 2, 4]])).sum().backward()
    assert emitted.table.weight.grad.sum(1).tolist() == [0.0, 3.0, 0.0, 0.0, 3.0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes_are_kept(dtype: torch.dtype) -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)).to(dtype)
    _, emitted = check(module, torch.randn(2, 4, dtype=dtype))
    assert {p.dtype for p in emitted.parameters()} == {dtype}


def test_pairs_of_layers_run_by_their_kernel_until_one_is_changed() -> None:
    def kernel(*given: torch.Tensor) -> torch.Tensor:
        called.append(given)
        return low_rank_linear(*given)

    called: list[object] = []
    down, up, x = nn.Linear(6, 2, bias=False), nn.Linear(2, 5), torch.randn(3, 6)
    run = pair_of_layers(kernel)
    assert run is pair_of_layers(kernel)
    expected = up(down(x))
    torch.testing.assert_close(run(down, up, x), expected)
    assert called == [(x, down.weight, up.weight, up.bias)]

    class Twice(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    doubled = Twice(6, 2, bias=False)
    doubled.weight = down.weight
    torch.testing.assert_close(run(doubled, up, x), up(2 * down(x)))
    handle = up.register_forward_hook(lambda layer, given, result: result + 1)
    torch.testing.assert_close(run(down, up, x), expected + 1)
    handle.remove()
    down.forward = lambda input: torch.zeros(3, 2)
    torch.testing.assert_close(run(down, up, x), up.bias.expand(3, 5))
    assert len(called) == 1


def test_pivoted_layers_run_by_their_kernel_until_one_is_changed() -> None:
    def kernel(*given: torch.Tensor) -> torch.Tensor:
        called.append(given)
        return pivoted_linear(*given)

    called: list[object] = []
    kept, rest, x = nn.Linear(6, 2), nn.Linear(2, 3), torch.randn(3, 6)
    run = pivoted_layers(kernel)
    for order in (None, torch.tensor([4, 0, 3, 1, 2])):
        expected = torch.cat([kept(x), rest(kept(x))], -1)
        torch.testing.assert_close(run(kept, rest, x, order), expected if order is None else expected[:, order])
        assert called == [(x, kept.weight, rest.weight, kept.bias, rest.bias, order)]
        handle = kept.register_forward_hook(lambda layer, given, result: 2 * result)
        expected = torch.cat([kept(x), rest(kept(x))], -1)
        torch.testing.assert_close(run(kept, rest, x, order), expected if order is None else expected[:, order])
        handle.remove()
        assert len(called) == 1
        called.clear()
