"""A graph run on a module's layers, whole or in segments."""

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from skink.graph.program import Program
from skink.kernels.attention import torch_impl
from skink.training.losses.segments import ModuleWeights, Runs, Segments, StoredWeights
from tests.models import FAMILIES
from tests.programs import batch, canonical
from tests.training.losses.examples import inputs


def logits(program: Program) -> fx.Node:
    return program.graph.output_node().args[0][0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recompute", [False, True])
def test_values_are_the_programs(family: str, recompute: bool) -> None:
    program = canonical(family)
    segments = Segments(program, [logits(program)], precision="float32", recompute=recompute)
    wanted = program(**inputs(program))[0]
    for weights in (StoredWeights(program), ModuleWeights(program.module())):
        (found,) = segments.run(weights, inputs(program))
        # Kernels add up in another order than the references.
        torch.testing.assert_close(found.detach(), wanted, rtol=1e-5, atol=1e-5)


def saved_bytes(module: nn.Module, segments: Segments, given: dict[str, Tensor]) -> tuple[Tensor, int]:
    """The result, and how many bytes are kept for the backward pass, those of parameters left out."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        (found,) = segments.run(ModuleWeights(module), given)
    return found, sum(kept.values())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mixtral"])
def test_what_is_computed_anew_is_not_kept(family: str) -> None:
    program, results = canonical(family), {}
    for recompute in (False, True):
        module = program.module()
        segments = Segments(program, [logits(program)], precision="float32", recompute=recompute)
        found, kept = saved_bytes(module, segments, inputs(program))
        found.square().sum().backward()
        gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
        results[recompute] = found.detach(), gradients, kept
    (one, before, most), (two, after, least) = results[False], results[True]
    assert torch.equal(one, two)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert least < most / 3


def test_nothing_is_kept_without_gradients() -> None:
    program = canonical("llama")
    segments = Segments(program, [logits(program)], precision="float32", recompute=True)
    with torch.no_grad():
        found, kept = saved_bytes(program.module(), segments, inputs(program))
    assert kept == 0
    assert not found.requires_grad


def test_results_within_the_graph_come_in_the_order_asked_for() -> None:
    program = canonical("llama")
    nodes = [node for node in program.graph.nodes if node.target is torch.ops.aten.add.Tensor]
    asked = [nodes[2], logits(program), nodes[0], nodes[2]]
    whole = Segments(program, asked, precision="float32").run(StoredWeights(program), inputs(program))
    parts = Segments(program, asked, precision="float32", recompute=True).run(StoredWeights(program), inputs(program))
    assert [value.shape[-1] for value in whole] == [64, 97, 64, 64]
    assert all(torch.equal(one, two) for one, two in zip(whole, parts, strict=True))


def test_only_what_results_depend_on_is_run() -> None:
    program = canonical("llama")
    everything = {name for name, _ in program.weights() if name not in program.buffers}
    assert Segments(program, [logits(program)], precision="float32").weights >= everything
    (first, *_) = (node for node in program.graph.nodes if node.target is torch.ops.aten.add.Tensor)
    weights = Segments(program, [first], precision="float32", recompute=True).weights
    assert {name.split(".")[2] for name in weights if ".layers." in name} == {"0"}
    assert not any(".mlp." in name for name in weights)


class Doubled(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.calls = layer, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return 2.0 * self.layer(x)


@pytest.mark.parametrize("recompute", [False, True])
def test_layers_that_were_replaced_are_the_ones_that_run(recompute: bool) -> None:
    program = canonical("llama")
    module = program.module()
    weights = ModuleWeights(module)
    segments = Segments(program, [logits(program)], precision="float32", recompute=recompute)
    (before,) = segments.run(weights, inputs(program))
    for path in ("model.layers.0.mlp.up_proj", "model.embed_tokens"):
        parent, _, leaf = path.rpartition(".")
        wrapped = Doubled(module.get_submodule(path))
        setattr(module.get_submodule(parent), leaf, wrapped)
        (after,) = segments.run(weights, inputs(program))
        assert wrapped.calls == 1
        assert not torch.allclose(before, after)
        after.sum().backward()
        assert wrapped.calls == (2 if recompute else 1)
        before = after


def test_dropout_is_the_same_when_computed_anew() -> None:
    program = canonical("llama")
    module = program.module()
    up = module.get_submodule("model.layers.0.mlp.up_proj")
    module.get_submodule("model.layers.0.mlp").up_proj = nn.Sequential(nn.Dropout(0.5), up)
    module.train()
    gradients = []
    for recompute in (False, True):
        segments = Segments(program, [logits(program)], precision="float32", recompute=recompute)
        with torch.random.fork_rng():
            torch.manual_seed(3)
            (found,) = segments.run(ModuleWeights(module), inputs(program))
            (gradient,) = torch.autograd.grad(found.square().sum(), up.weight)
        gradients.append(gradient)
    assert torch.equal(*gradients)


def dtypes_of(program: Program, run: Any) -> set[torch.dtype]:
    """The dtypes that linear layers compute in."""
    seen: set[torch.dtype] = set()
    module = program.module()
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(lambda layer, args, result: seen.add(result.dtype))
    run(module)
    return seen


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_weights_in_half_precision_run_in_float32(family: str, stored: torch.dtype) -> None:
    program = canonical(family).with_dtype(stored)
    wide = program.with_dtype(torch.float32)
    segments = Segments(program, [logits(program)], precision="float32")
    (found,) = segments.run(StoredWeights(program), inputs(program))
    assert found.dtype is torch.float32
    (wanted,) = Segments(wide, [logits(wide)], precision="float32").run(StoredWeights(wide), inputs(program))
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_under_autocast_sums_stay_in_float32(family: str, precision: Any) -> None:
    program = canonical(family).with_dtype(torch.float16)
    added = [node for node in program.graph.nodes if node.target is torch.ops.aten.add.Tensor and _is_wide(node)]
    segments = Segments(program, [*added, logits(program)], precision=precision)
    low = getattr(torch, precision)

    def run(module: nn.Module) -> None:
        with torch.autocast("cpu", low):
            *sums, found = segments.run(ModuleWeights(module), inputs(program))
        assert {value.dtype for value in sums} == {torch.float32}
        assert torch.isfinite(found).all()
        reference = program.with_dtype(torch.float32)(**inputs(program))[0]
        assert (found.float() - reference).norm() < 0.03 * reference.norm()

    assert dtypes_of(program, run) == {low}


def _is_wide(node: fx.Node) -> bool:
    """Whether it adds to the residual stream."""
    value = node.meta["val"]
    return value.dim() == 3 and value.shape[-1] == 64 and value.is_floating_point()


def test_stored_weights_are_shared_and_keep_their_values() -> None:
    program, name = canonical("llama"), "model.embed_tokens.weight"
    weights = StoredWeights(program)
    for device in ("cpu", "meta"):
        weights.move(lambda tensor, device=device: torch.device(device))
        assert weights.tensor(name).data_ptr() == program.weight(name).data_ptr()
    assert not weights.tensor(name).requires_grad


def test_stored_weights_go_where_they_are_sent() -> None:
    weights = StoredWeights(canonical("llama").with_dtype(torch.float32, shapes_only=True))
    # There is one device with values here, so what is seen is that the copy is tried.
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        weights.move(lambda tensor: torch.device("cpu"))


@pytest.mark.parametrize("padding", [0, 3])
def test_attention_is_given_a_mask_where_there_is_padding(padding: int, monkeypatch: pytest.MonkeyPatch) -> None:
    program, masks = canonical("llama"), []
    runs = Runs(program, [logits(program)], precision="float32", recompute=True)
    kernel = torch_impl.attention

    def spy(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None = None, **options: Any) -> Tensor:
        masks.append(key_mask)
        return kernel(query, key, value, key_mask, **options)

    monkeypatch.setattr(torch_impl, "attention", spy)
    given = batch(2, 8, padding)._asdict()
    (found,) = runs.run(StoredWeights(program), given)
    assert [mask is not None for mask in masks] == [padding > 0] * 2
    torch.testing.assert_close(found, program(**given)[0], rtol=1e-5, atol=1e-5)
