"""Feed-forward blocks: their kinds, their weights by name and half, and why an activation is in none of them."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from skink.graph.blocks import FeedForward, Projection, feed_forward_blocks
from skink.graph.capture import capture
from skink.graph.pipeline import Pipeline
from skink.graph.program import Program
from skink.passes.canonicalize import Canonicalize
from tests.graph.programs import canonical
from tests.graph.test_huggingface_experts import tiny_mixture
from tests.modules import One


def _canonical(model: nn.Module, *examples: Tensor) -> Program:
    program = capture(model, examples or None)
    Pipeline((Canonicalize(),)).run(program, verify=0)
    return program


def _whole(name: str, rows: int, *, bias: bool = False) -> Projection:
    return Projection(f"{name}.weight", f"{name}.bias" if bias else "", (0, rows))


def _gated(layer: str, activation: str) -> dict[str, Any]:
    return {
        "kind": "gated",
        "activation": activation,
        "module": layer,
        "gate": _whole(f"{layer}.gate_proj", 128),
        "up": _whole(f"{layer}.up_proj", 128),
        "down": _whole(f"{layer}.down_proj", 64),
    }


def _plain(module: str, activation: str, up: str, down: str, width: int) -> dict[str, Any]:
    return {
        "kind": "plain",
        "activation": activation,
        "module": module,
        "gate": None,
        "up": _whole(up, width, bias=True),
        "down": _whole(down, 64, bias=True),
    }


_EXPECTED: dict[str, dict[str, Any]] = {
    "llama": _gated("model.layers.1.mlp", "silu"),
    "gemma2": _gated("model.layers.1.mlp", "gelu_tanh"),
    "phi3": {
        "kind": "gated",
        "activation": "silu",
        "module": "model.layers.1.mlp",
        "gate": Projection("model.layers.1.mlp.gate_up_proj.weight", "", (0, 128)),
        "up": Projection("model.layers.1.mlp.gate_up_proj.weight", "", (128, 256)),
        "down": _whole("model.layers.1.mlp.down_proj", 64),
    },
    "gpt2": _plain("transformer.h.1.mlp", "gelu_tanh", *(f"transformer.h.1.mlp.c_{n}" for n in ("fc", "proj")), 256),
    "opt": _plain("model.decoder.layers.1", "relu", *(f"model.decoder.layers.1.fc{n}" for n in (1, 2)), 128),
    "gpt_neox": _plain(
        "gpt_neox.layers.1.mlp", "gelu", *(f"gpt_neox.layers.1.mlp.dense_{n}" for n in ("h_to_4h", "4h_to_h")), 128
    ),
}


@pytest.mark.parametrize("family", _EXPECTED)
def test_each_layer_has_one_block_under_the_models_names(family: str) -> None:
    program = canonical(family)
    blocks = feed_forward_blocks(program)
    assert len(blocks) == 2
    found = {name: getattr(blocks[1], name) for name in _EXPECTED[family]}
    assert found == _EXPECTED[family]
    assert blocks[1].width == found["up"].rows[1] - found["up"].rows[0]
    assert blocks[1].experts == 0
    for block in blocks:
        assert block.output in block.nodes
        assert block.input not in block.nodes
        assert block.input.meta["val"].shape == block.output.meta["val"].shape


@pytest.mark.parametrize("family", _EXPECTED)
def test_a_block_computes_what_its_description_says(family: str) -> None:
    program = canonical(family)
    block = feed_forward_blocks(program)[0]
    x = torch.randn(2, 3, 64)
    torch.testing.assert_close(_from_description(program, block, x), _from_nodes(program, block, x))


def _from_description(program: Program, block: FeedForward, x: Tensor) -> Tensor:
    def product(projection: Projection, x: Tensor) -> Tensor:
        rows = slice(*projection.rows, projection.step)
        bias = program.weight(projection.bias)[rows] if projection.bias else None
        return functional.linear(x, program.weight(projection.weight)[rows], bias)

    act: Any = {
        "silu": functional.silu,
        "relu": functional.relu,
        "gelu": functional.gelu,
        "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    }[block.activation]
    up = product(block.up, x)
    hidden = act(up) if block.gate is None else act(product(block.gate, x)) * up
    return product(block.down, hidden)


def _from_nodes(program: Program, block: FeedForward, x: Tensor) -> Tensor:
    values: dict[Any, Any] = {block.input: x}
    for node in program.graph.nodes:
        if node.op == "get_attr":
            values[node] = program.weight(node.target)
        elif node in block.nodes:
            args = torch.fx.map_arg(node.args, values.__getitem__)
            values[node] = node.target(*args, **torch.fx.map_arg(node.kwargs, values.__getitem__))
    found: Tensor = values[block.output]
    return found


def test_experts_and_their_router() -> None:
    (first, _) = feed_forward_blocks(canonical("mixtral"))
    stack = "model.layers.0.mlp.experts"
    assert (first.kind, first.activation, first.width, first.experts, first.chosen) == ("experts", "silu", 128, 4, 2)
    assert first.module == stack
    assert first.gate == Projection(f"{stack}.gate_up_proj", "", (0, 128))
    assert first.up == Projection(f"{stack}.gate_up_proj", "", (128, 256))
    assert first.down == Projection(f"{stack}.down_proj", "", (0, 64))
    assert first.router is not None
    assert first.router.args[1].target == "model.layers.0.mlp.gate.weight"  # type: ignore[union-attr]
    assert first.router in first.nodes
    assert first.shared == ()
    assert first.input.meta["val"].shape == first.output.meta["val"].shape


def test_qwen3_moe_is_a_mixture() -> None:
    for index, block in enumerate(feed_forward_blocks(_canonical(tiny_mixture("qwen3_moe")))):
        stack = f"model.layers.{index}.mlp.experts"
        assert (block.kind, block.module, block.width, block.experts, block.chosen) == ("experts", stack, 24, 4, 2)
        assert block.gate == Projection(f"{stack}.gate_up_proj", "", (0, 24))
        assert block.up == Projection(f"{stack}.gate_up_proj", "", (24, 48))
        assert block.down == Projection(f"{stack}.down_proj", "", (0, 32))
        assert block.router is not None
        assert block.router.args[1].target == f"model.layers.{index}.mlp.gate.weight"  # type: ignore[union-attr]


def test_interleaved_halves_with_biases() -> None:
    (first, _) = feed_forward_blocks(_canonical(tiny_mixture("gpt_oss")))
    stack = "model.layers.0.mlp.experts.gate_up_proj"
    assert first.activation == "quick_gelu"
    assert first.gate == Projection(stack, f"{stack}_bias", (0, 96), 2)
    assert first.up == Projection(stack, f"{stack}_bias", (1, 96), 2)
    assert first.width == 48


def test_shared_experts_belong_to_the_mixture() -> None:
    dense, mixture = feed_forward_blocks(_canonical(tiny_mixture("deepseek_v3")))
    assert (dense.kind, dense.module) == ("gated", "model.layers.0.mlp")
    assert mixture.kind == "experts"
    assert [block.module for block in mixture.shared] == ["model.layers.1.mlp.shared_experts"]
    assert mixture.router is not None


def test_the_second_half_may_be_the_gate() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        up, gate = m.both(x).chunk(2, -1)
        result: Tensor = m.down(functional.gelu(gate) * up)
        return result

    program = _canonical(One(body, both=nn.Linear(6, 16), down=nn.Linear(8, 6)), torch.zeros(2, 5, 6))
    (block,) = feed_forward_blocks(program)
    assert (block.kind, block.activation) == ("gated", "gelu")
    assert block.gate == Projection("both.weight", "both.bias", (8, 16))
    assert block.up == Projection("both.weight", "both.bias", (0, 8))


def test_nothing_is_changed() -> None:
    program = canonical("phi3")
    before, edits = str(program), len(program.edits)
    feed_forward_blocks(program)
    assert (str(program), len(program.edits)) == (before, edits)


def _thin(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 2, bias=False), nn.Linear(2, outputs))


@pytest.mark.parametrize("factored", [("gate",), ("up", "down"), ("gate", "up", "down")])
def test_products_may_be_factored(factored: tuple[str, ...]) -> None:
    sizes = {"gate": (6, 8), "up": (6, 8), "down": (8, 6)}
    parts = {name: _thin(*size) if name in factored else nn.Linear(*size) for name, size in sizes.items()}
    program = _canonical(One(lambda m, x: m.down(functional.silu(m.gate(x)) * m.up(x)), **parts), torch.zeros(2, 5, 6))
    (block,) = feed_forward_blocks(program)
    assert (block.kind, block.activation, block.width) == ("gated", "silu", 8)
    assert block.input.op == "placeholder"
    for name, (_, outputs) in sizes.items():
        last, thin = (f"{name}.1", f"{name}.0.weight") if name in factored else (name, "")
        assert getattr(block, name) == Projection(f"{last}.weight", f"{last}.bias", (0, outputs), thin=thin)


def test_the_halves_of_a_factored_product() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        gate, up = m.both(x).chunk(2, -1)
        result: Tensor = m.down(functional.silu(gate) * up)
        return result

    program = _canonical(One(body, both=_thin(6, 16), down=_thin(8, 6)), torch.zeros(2, 5, 6))
    (block,) = feed_forward_blocks(program)
    assert block.gate == Projection("both.1.weight", "both.1.bias", (0, 8), thin="both.0.weight")
    assert block.down.thin == "down.0.weight"


def test_a_product_before_the_block_is_no_factor_of_it() -> None:
    parts = {"first": nn.Linear(6, 6), "up": nn.Linear(6, 8), "down": nn.Linear(8, 6)}
    program = _canonical(One(lambda m, x: m.down(functional.relu(m.up(m.first(x)))), **parts), torch.zeros(2, 5, 6))
    (block,) = feed_forward_blocks(program)
    assert block.up == Projection("up.weight", "up.bias", (0, 8))
    assert block.input.args[1].target == "first.weight"  # type: ignore[union-attr]
