from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

from skink.errors import RecoveryError
from skink.training.weights.trainable import choose_trainable, rounded, write_back
from tests.programs import batch, canonical
from tests.training.students import factored, trained


def step(module: nn.Module) -> None:
    inputs = batch(2, 7)
    loss = module(*inputs).float().square().mean()
    loss.backward()
    torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1).step()


def test_all_are_the_weights_without_buffers_tied_ones_once() -> None:
    program = canonical("gemma2")
    module = program.module()
    names = choose_trainable(module, program, None, "all")
    assert names == [name for name, _ in program.weights() if name not in program.buffers]
    assert "lm_head.weight" not in names
    assert "model.rotary_emb.inv_freq" not in names
    assert trained(module) == set(names)


def test_new_are_the_weights_that_passes_introduced() -> None:
    program, original = factored()
    module = program.module()
    names = choose_trainable(module, program, original, "new")
    assert names
    assert all(name.endswith((".down.weight", ".up.weight")) for name in names)
    assert trained(module) == set(names)


def test_nothing_new_is_an_error() -> None:
    program = canonical("llama")
    with pytest.raises(RecoveryError, match="no pass before it introduced a weight") as caught:
        choose_trainable(program.module(), program, canonical("llama"), "new")
    assert caught.value.code == "RECOVER-001"


def test_new_needs_the_original() -> None:
    program, _ = factored()
    with pytest.raises(RecoveryError, match="the model as it was is not at hand"):
        choose_trainable(program.module(), program, None, "new")


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ("model.layers.1.mlp.*", {f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up", "down")}),
        (("*.0.self_attn.q_proj", "*.norm.weight"), {"model.layers.0.self_attn.q_proj.weight", "model.norm.weight"}),
        (("lm_head",), {"model.embed_tokens.weight"}),
    ],
)
def test_patterns_are_on_weights_layers_and_tied_names(train: str | tuple[str, ...], expected: set[str]) -> None:
    program = canonical("gemma2")
    module = program.module()
    assert set(choose_trainable(module, program, None, train)) == expected
    assert trained(module) == expected


def test_ignored_weights_do_not_train() -> None:
    program = canonical("llama")
    names = choose_trainable(program.module(), program, None, "all", ignore=("*.mlp.*", "lm_head"))
    assert names
    assert not [name for name in names if ".mlp." in name or name.startswith("lm_head")]


def test_a_pattern_that_fits_nothing_is_an_error_with_near_names() -> None:
    program = canonical("llama")
    with pytest.raises(RecoveryError, match=r"like '\*q_porj\*'") as caught:
        choose_trainable(program.module(), program, None, ("*.mlp.*", "*q_porj*"))
    assert "model." in caught.value.why
    with pytest.raises(RecoveryError, match="once ignore=") as caught:
        choose_trainable(program.module(), program, None, "*.mlp.*", ignore=("*",))
    assert caught.value.code == "RECOVER-001"


def test_names_of_weights_that_are_near_are_suggested() -> None:
    program = canonical("llama")
    with pytest.raises(RecoveryError) as caught:
        choose_trainable(program.module(), program, None, "*.model.layers.0.self_attn.q_porj.weight")
    assert "the nearest are model.layers.0.self_attn.q_proj.weight" in caught.value.why


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("copy", [True, False])
def test_what_trains_is_float32_of_its_own_and_goes_back_as_it_was(dtype: torch.dtype, copy: bool) -> None:
    program = canonical("gemma2").with_dtype(dtype)
    before = {name: tensor.clone() for name, tensor in program.weights()}
    held = {name: tensor for name, tensor in program.weights()}
    module = program.module(copy=copy)
    names = choose_trainable(module, program, None, ("*.mlp.*", "model.embed_tokens"))
    for name, parameter in module.named_parameters():
        assert parameter.dtype == (torch.float32 if name in names else dtype)
    module.float()
    step(module)
    # Neither the training nor the writing back touches a tensor that somebody else may hold.
    write_back(module, program, names)
    for name, tensor in program.weights():
        assert torch.equal(held[name], before[name])
        assert tensor.dtype == before[name].dtype
        assert tensor.stride() == before[name].stride()
        assert torch.equal(tensor, before[name]) == (name not in names), name
        if name in names:
            assert torch.equal(tensor, module.get_parameter(name).to(dtype))
            assert tensor.data_ptr() != module.get_parameter(name).data_ptr()
    again = program.module()
    assert again.lm_head.weight is again.model.embed_tokens.weight  # type: ignore[union-attr]


def test_a_program_after_training_computes_what_the_module_does() -> None:
    program, original = factored()
    module = program.module(copy=False)
    names = choose_trainable(module, program, original, "new")
    step(module)
    inputs = batch(2, 7)
    assert not torch.equal(program(*inputs)[0], module(*inputs))
    write_back(module, program, names)
    assert torch.equal(program(*inputs)[0], module(*inputs))


def test_a_weight_that_its_dtype_cannot_hold_is_an_error_and_nothing_is_written() -> None:
    program = canonical("llama").with_dtype(torch.float16)
    module = program.module()
    names = choose_trainable(module, program, None, "*.mlp.*")
    before = program.weight(names[0])
    with torch.no_grad():
        module.get_parameter(names[0]).add_(1)
        module.get_parameter(names[-1])[0, 0] = 7e4
    with pytest.raises(RecoveryError, match="float16 cannot hold") as caught:
        write_back(module, program, names)
    assert caught.value.code == "RECOVER-010"
    assert program.weight(names[0]) is before


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float16, 10), (torch.bfloat16, 7), (torch.float32, 23)])
def test_rounding_is_done_once(dtype: torch.dtype, bits: int) -> None:
    step, hair = 2.0**-bits, 2.0**-45
    halves = torch.tensor([1 + step / 2, 1 + 3 * step / 2, -1 - step / 2], dtype=torch.float64)
    wide = torch.cat([halves, halves + hair, halves - hair])
    found = rounded("weight", wide, torch.zeros(1, dtype=dtype))
    assert found.dtype == dtype
    even = [Fraction(1), 1 + 2 * Fraction(step), Fraction(-1)]
    above = [1 + Fraction(step), 1 + 2 * Fraction(step), Fraction(-1)]
    below = [Fraction(1), 1 + Fraction(step), -1 - Fraction(step)]
    assert [Fraction(float(value)) for value in found] == even + above + below


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_gives_the_nearest_number(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-10, 12, (4096,), generator=generator)
    wide = torch.randn(4096, dtype=torch.float64, generator=generator) * 2.0**exponents
    found = rounded("weight", wide, torch.zeros(1, dtype=dtype))
    for near in (_next(found, 1), _next(found, -1)):
        assert bool(((found.double() - wide).abs() <= (near.double() - wide).abs()).all())
    assert torch.equal(rounded("weight", found.double(), found), found)


def _next(values: Tensor, by: int) -> Tensor:
    """The neighbours by their bits, away from zero or towards it."""
    return (values.view(torch.int16) + by).view(values.dtype)
