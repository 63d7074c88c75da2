import pytest
import torch

from skink.passes.decompose.reduce_width import ReduceWidth
from tests.graph.programs import canonical
from tests.models import tiny
from tests.passes.decompose.reduce_width.test_reduce_width import logits, run, text

# More tokens than a block has channels.
TEXT = text(16, 40)


def seen_by(model, module):
    """What a module of a transformers model reads on the calibration text: float64[tokens, in]."""
    found = []
    handle = module.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    with torch.no_grad():
        model(TEXT)
    handle.remove()
    return found[0].double().flatten(0, -2)


def fit(tokens, wanted):
    """The weight [out, in] that makes `wanted` from `tokens`, by least squares."""
    return torch.linalg.lstsq(tokens, wanted).solution.mT


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_down_is_the_best_that_reads_the_channels_left(family):
    model = tiny(family)
    options = ReduceWidth(
        keep=0.8, parts=("feed-forward",), method="one-sided", allocation="uniform", multiple_of=1, floor=0.1
    )
    _, changed = run(canonical(family), options, calibration=TEXT)
    if family == "gpt2":
        mlp, names = model.transformer.h[1].mlp, ("c_fc", "c_proj")
        up, down, before = mlp.c_fc.weight.T, mlp.c_proj.weight.T, "transformer.h.1.mlp."
        module = mlp.c_proj
    elif family == "phi3":
        mlp, names = model.model.layers[1].mlp, ("gate_up_proj", "down_proj")
        up, down, before = mlp.gate_up_proj.weight[128:], mlp.down_proj.weight, "model.layers.1.mlp."
        module = mlp.down_proj
    else:
        mlp, names = model.model.layers[1].mlp, ("up_proj", "down_proj")
        up, down, before = mlp.up_proj.weight, mlp.down_proj.weight, "model.layers.1.mlp."
        module = mlp.down_proj
    found = changed.weight(f"{before}{names[0]}.weight")
    width = changed.weight(f"{before}{names[1]}.weight").shape[1]
    if family == "phi3":
        assert found.shape[0] == 2 * width
        gate, found = found.split(width)
    kept = [int((up == row).all(1).nonzero().item()) for row in found]
    assert kept == sorted(kept)
    if family == "llama":
        assert torch.equal(changed.weight(f"{before}gate_proj.weight"), mlp.gate_proj.weight[kept])
    elif family == "phi3":
        assert torch.equal(gate, mlp.gate_up_proj.weight[kept])
    else:
        assert torch.equal(changed.weight(f"{before}c_fc.bias"), mlp.c_fc.bias[kept])
        assert torch.equal(changed.weight(f"{before}c_proj.bias"), mlp.c_proj.bias)
    hidden = seen_by(model, module)
    expected = fit(hidden[:, kept], hidden @ down.detach().double().T)
    torch.testing.assert_close(changed.weight(f"{before}{names[1]}.weight").double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_output_projection_is_the_best_that_reads_the_values_left(family):
    model = tiny(family)
    options = ReduceWidth(
        keep=0.93, parts=("value-output",), method="one-sided", allocation="uniform", multiple_of=1, floor=0.1
    )
    result, changed = run(canonical(family), options, calibration=TEXT)
    if family == "gpt2":
        attention, groups = model.transformer.h[1].attn, 1
        module, output, before = attention.c_proj, attention.c_proj.weight.T, "transformer.h.1.attn."
        values, biases = attention.c_attn.weight.T[128:], attention.c_attn.bias[128:]
        width = (changed.weight(f"{before}c_attn.weight").shape[0] - 128) // 4
        new, found = changed.weight(f"{before}c_attn.weight")[128:], changed.weight(f"{before}c_proj.weight")
    else:
        attention, groups = model.model.layers[1].self_attn, 2
        module, output, before = attention.o_proj, attention.o_proj.weight, "model.layers.1.self_attn."
        values, biases = attention.v_proj.weight, None
        width = changed.weight(f"{before}v_proj.weight").shape[0] // 2
        new, found = changed.weight(f"{before}v_proj.weight"), changed.weight(f"{before}o_proj.weight")
    assert width < 16
    # How the new values come from the old ones, head by head: [Hk, width, 16].
    key_heads = len(values) // 16
    readers = torch.stack(
        [
            torch.linalg.lstsq(old.T.double(), narrow.T.double()).solution.T
            for old, narrow in zip(values.detach().split(16), new.split(width), strict=True)
        ]
    )
    torch.testing.assert_close(
        readers @ readers.mT, torch.eye(width).double().expand(key_heads, -1, -1), rtol=1e-4, atol=1e-4
    )
    if biases is not None:
        expected = torch.cat(
            [reader @ bias.double() for reader, bias in zip(readers, biases.detach().split(16), strict=True)]
        )
        torch.testing.assert_close(
            changed.weight(f"{before}c_attn.bias")[128:].double(), expected, rtol=1e-4, atol=1e-4
        )
    heads = seen_by(model, module).unflatten(-1, (4, 16))
    read = torch.einsum("thd,hwd->thw", heads, readers.repeat_interleave(groups, 0)).flatten(1)
    wanted = heads.flatten(1) @ output.detach().double().T
    torch.testing.assert_close(found.double(), fit(read, wanted), rtol=1e-3, atol=1e-4)
    # The error that is recorded is the one that is left.
    [record] = [
        layer for layer in result.layers if layer.name == f"{before}{'c_proj' if family == 'gpt2' else 'o_proj'}"
    ]
    left = (read @ found.double().T - wanted).norm() / wanted.norm()
    assert record.predicted_error == pytest.approx(float(left), rel=1e-3)


def test_values_of_few_directions_lose_nothing():
    model = tiny("llama")
    program = canonical("llama").clone()
    generator = torch.Generator().manual_seed(0)
    for layer in range(2):
        name = f"model.layers.{layer}.self_attn.v_proj.weight"
        old = program.weight(name)
        mix = torch.randn(2, 16, 8, generator=generator)
        program.set_weight(name, torch.cat([mix[head] @ old[head * 16 : head * 16 + 8] for head in range(2)]))
    shape = (model.config.hidden_size, 16 * 2 + 16 * 4)
    total = sum(tensor.numel() for name, tensor in program.weights() if "proj" in name)
    keep = 1 - shape[0] * shape[1] / total + 1e-9  # half of values and outputs, in both layers
    result, changed = run(program, ReduceWidth(keep=keep, parts=("value-output",), multiple_of=8, floor=0.5))
    assert changed.weight("model.layers.0.self_attn.v_proj.weight").shape == (16, 64)
    assert changed.weight("model.layers.0.self_attn.o_proj.weight").shape == (64, 32)
    torch.testing.assert_close(logits(changed, text(3)), logits(program, text(3)), rtol=1e-3, atol=1e-4)
    assert sum(layer.predicted_loss or 0 for layer in result.layers) < 1e-9


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_channels_that_nothing_reads_lose_nothing(family):
    program = canonical(family).clone()
    down = "model.layers.{}.mlp.down_proj.weight" if family == "llama" else "transformer.h.{}.mlp.c_proj.weight"
    for layer in range(2):
        weight = program.weight(down.format(layer)).clone()
        weight[:, ::4] = 0.0
        program.set_weight(down.format(layer), weight)
    inner = weight.shape[1]
    names = [name for name, tensor in program.weights() if tensor.dim() == 2 and ("proj" in name or "c_" in name)]
    total = sum(program.weight(name).numel() for name in names)
    gone = 2 * (3 if family == "llama" else 2) * 64 * inner // 4
    options = ReduceWidth(keep=1 - gone / total + 1e-9, parts=("feed-forward",), floor=0.75, multiple_of=inner // 4)
    result, changed = run(program, options)
    assert changed.weight(down.format(0)).shape == (64, inner * 3 // 4)
    torch.testing.assert_close(logits(changed, text(3)), logits(program, text(3)), rtol=1e-3, atol=1e-4)
    assert sum(layer.predicted_loss or 0 for layer in result.layers) < 1e-9
