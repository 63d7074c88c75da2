import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

import skink
from skink.errors import OptionError, RecoveryError
from skink.export.huggingface.config import SkinkConfig
from skink.export.huggingface.modeling import SkinkForCausalLM
from skink.graph.program import Program
from skink.passes.decompose.basis_sharing import BasisSharing
from skink.passes.decompose.low_rank import LowRank
from skink.training.weights.adapters import LoraOptions, adapter_targets, add_adapters, merge_adapters, save_adapter
from skink.training.weights.trainable import choose_trainable, write_back
from tests.programs import batch, canonical
from tests.training.students import factored, trained

INPUTS = batch(2, 7, padding=2)

Variant = Literal["lora", "rslora", "dora"]
VARIANTS: tuple[Variant, ...] = ("lora", "rslora", "dora")


def shaken(module: nn.Module, names: list[str]) -> None:
    """Adapters as after training: no B is zero any more."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name in names:
            parameter = module.get_parameter(name)
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


def logits(module: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = module(*INPUTS)
    return found


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mixtral"])
def test_adapters_begin_as_nothing_and_train_alone_in_float32(family: str, variant: Variant) -> None:
    program = canonical(family)
    module = program.module()
    names = add_adapters(module, LoraOptions(variant=variant), program)
    torch.testing.assert_close(logits(module), program(*INPUTS)[0], rtol=1e-5, atol=1e-6)
    assert trained(module) == set(names)
    assert {module.get_parameter(name).dtype for name in names} == {torch.float32}
    module.train()
    module(*INPUTS).square().mean().backward()
    assert all(module.get_parameter(name).grad is not None for name in names)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dora_begins_with_norms_in_float32(dtype: torch.dtype) -> None:
    program = canonical("llama").with_dtype(dtype)
    module = program.module()
    names = add_adapters(module, LoraOptions(variant="dora"), program)
    assert {module.get_parameter(name).dtype for name in names} == {torch.float32}
    module.float()
    torch.testing.assert_close(logits(module), program.with_dtype(torch.float32)(*INPUTS)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_merged_weights_are_the_formula_rounded_once(dtype: torch.dtype, variant: Variant) -> None:
    program = canonical("gpt2").with_dtype(dtype)
    before = {name: tensor.clone() for name, tensor in program.weights()}
    module = program.module()
    shaken(module, add_adapters(module, LoraOptions(rank=4, alpha=6.0, variant=variant), program))
    merged = merge_adapters(module, program)
    assert merged == [f"transformer.h.{n}.{name}.weight" for n in (0, 1) for name in _GPT2]
    for name, tensor in program.weights():
        assert tensor.dtype == before[name].dtype
        if name not in merged:
            assert torch.equal(tensor, before[name])
            continue
        layer = module.get_submodule(name.removesuffix(".weight"))
        a, b = (getattr(layer, part)["default"].weight.detach().double() for part in ("lora_A", "lora_B"))
        wide = before[name].double() + (6.0 / 2 if variant == "rslora" else 6.0 / 4) * (b @ a)
        if variant == "dora":
            magnitude = layer.lora_magnitude_vector["default"].weight.detach().double()  # type: ignore[index,union-attr]
            wide = wide * (magnitude / wide.norm(dim=1))[:, None]
        spacing = torch.finfo(dtype).eps * wide.abs()
        assert bool(((tensor.double() - wide).abs() <= spacing / 2 + torch.finfo(dtype).smallest_normal).all())
        assert not torch.equal(tensor, before[name])


_GPT2 = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mixtral"])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_the_merged_program_computes_what_the_adapted_module_does(
    family: str, variant: Variant, dtype: torch.dtype, close: float
) -> None:
    program = canonical(family).with_dtype(dtype)
    module = program.module()
    shaken(module, add_adapters(module, LoraOptions(variant=variant), program))
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    expected, before = logits(module), program(*INPUTS)[0]
    merge_adapters(module, program)
    torch.testing.assert_close(program(*INPUTS)[0], expected, rtol=close, atol=close)
    assert float((before - expected).abs().max()) > 100 * close


def pivoted() -> Program:
    program = canonical("llama")
    skink.Pipeline((LowRank(method="plain", keep=0.6, form="pivoted"),), start=program.stage).run(program)
    return program


def shared() -> Program:
    program = canonical("llama")
    text = torch.randint(3, 97, (8, 16), generator=torch.Generator().manual_seed(0))
    passes = (BasisSharing(keep=0.5, method="whitened", allocation="uniform"),)
    skink.Pipeline(passes, start=program.stage).run(program, calibration=text)
    return program


@pytest.mark.parametrize("make", [lambda: factored()[0], pivoted, shared], ids=["factored", "pivoted", "shared"])
def test_factors_take_adapters_and_a_shared_basis_one_for_all_its_readers(make: Callable[[], Program]) -> None:
    program = make()
    module = program.module()
    paths = adapter_targets(program, LoraOptions(rank=2))
    names = add_adapters(module, LoraOptions(rank=2), program)
    assert len(names) == 2 * len(paths)
    assert {f"{path}.weight" for path in paths} <= {name for name, _ in program.weights()}
    shaken(module, names)
    expected = logits(module)
    assert float((program(*INPUTS)[0] - expected).abs().max()) > 1e-3
    assert len(merge_adapters(module, program)) == len(paths)
    torch.testing.assert_close(program(*INPUTS)[0], expected, rtol=2e-5, atol=2e-5)


def test_layers_of_a_shared_basis_read_one_weight() -> None:
    program = shared()
    counts: dict[str, int] = {}
    for node in program.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default):
        weight = str(node.args[1].target)  # type: ignore[union-attr]
        counts[weight] = counts.get(weight, 0) + 1
    assert max(counts.values()) > 1


def test_targets_are_linear_layers_but_the_head() -> None:
    program = canonical("llama")
    paths = adapter_targets(program, LoraOptions())
    assert len(paths) == 14
    assert "lm_head" not in paths
    assert adapter_targets(program, LoraOptions(targets=("lm_head",))) == ["lm_head"]
    only = adapter_targets(program, LoraOptions(targets=("*.self_attn.*",), ignore=("*.1.*",)))
    assert only == [f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"]


def test_a_path_that_ends_like_another_is_not_taken_for_it() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.inner = nn.Linear(8, 8), nn.Module()
            self.inner.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.inner.fc(self.fc(x).relu())
            return found

    program = skink.capture(Net(), (torch.randn(3, 8),))
    module = program.module()
    names = add_adapters(module, LoraOptions(targets=("fc",)), program)
    assert names == ["fc.lora_A.default.weight", "fc.lora_B.default.weight"]


def test_targets_that_fit_nothing_are_an_error_with_near_names() -> None:
    program = canonical("llama")
    with pytest.raises(RecoveryError, match=r"like '\*.q_porj'") as caught:
        adapter_targets(program, LoraOptions(targets=("*.self_attn.*", "*.q_porj")))
    assert caught.value.code == "RECOVER-001"
    assert "model.layers.0.self_attn.q_proj" in caught.value.why
    with pytest.raises(RecoveryError, match="no linear layer is left") as caught:
        adapter_targets(program, LoraOptions(ignore=("*",)))
    assert caught.value.code == "RECOVER-001"


def test_a_head_tied_to_the_embedding_is_refused() -> None:
    program = canonical("gemma2")
    assert "lm_head" not in adapter_targets(program, LoraOptions())
    with pytest.raises(RecoveryError, match="the embedding reads its weight too") as caught:
        add_adapters(program.module(), LoraOptions(targets=("*",)), program)
    assert caught.value.code == "RECOVER-011"


def test_a_weight_that_another_node_reads_is_refused() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.fc(x) * self.fc.weight.sum()
            return found

    program = skink.capture(Net(), (torch.randn(3, 8),))
    with pytest.raises(RecoveryError, match=r"%sum\w* reads its weight too"):
        adapter_targets(program, LoraOptions())


def test_weights_can_train_beside_adapters() -> None:
    program = canonical("llama").with_dtype(torch.bfloat16)
    module = program.module()
    adapters = add_adapters(module, LoraOptions(targets=("*.q_proj",)), program)
    weights = choose_trainable(module, program, None, ("*norm*", "*.0.self_attn.q_proj"))
    assert trained(module) == {*adapters, *(n.replace("q_proj.", "q_proj.base_layer.") for n in weights)}
    shaken(module, adapters)
    with torch.no_grad():
        # Less than bfloat16 tells apart: rounded before it is merged, it would be lost.
        module.get_submodule("model.layers.0.self_attn.q_proj").base_layer.weight.mul_(1 + 2**-10)  # type: ignore[union-attr]
    before = program.weight("model.layers.0.self_attn.q_proj.weight").double()
    write_back(module, program, weights)
    merge_adapters(module, program)
    layer = module.get_submodule("model.layers.0.self_attn.q_proj")
    a, b = (getattr(layer, part)["default"].weight.detach().double() for part in ("lora_A", "lora_B"))
    wide = before * (1 + 2**-10) + 2 * (b @ a)
    found = program.weight("model.layers.0.self_attn.q_proj.weight").double()
    assert bool(((found - wide).abs() <= torch.finfo(torch.bfloat16).eps / 2 * wide.abs() + 1e-6).all())


def test_the_seed_decides_where_adapters_begin() -> None:
    program = canonical("llama")
    state = torch.random.get_rng_state()

    def begun(seed: int) -> Tensor:
        module = program.module()
        add_adapters(module, LoraOptions(), program, seed=seed)
        return module.get_parameter("model.layers.0.self_attn.q_proj.lora_A.default.weight")

    assert torch.equal(begun(1), begun(1))
    assert not torch.equal(begun(1), begun(2))
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    "options", [{"rank": 0}, {"alpha": 0.0}, {"dropout": 1.0}, {"dropout": -0.1}], ids=lambda entry: str(entry)
)
def test_options_have_ranges(options: dict[str, float]) -> None:
    with pytest.raises(OptionError, match=next(iter(options))) as caught:
        LoraOptions(**options)  # type: ignore[arg-type]
    assert caught.value.code == "OPTION-002"


# PEFT asks transformers by a name that transformers has replaced.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_saved_adapter_loads_onto_the_hugging_face_model(variant: Variant, tmp_path: Path) -> None:
    program = canonical("llama")
    module = program.module()
    options = LoraOptions(rank=3, targets=("*.mlp.*", "*.1.self_attn.q_proj"), variant=variant)
    shaken(module, add_adapters(module, options, program))
    save_adapter(module, tmp_path / "adapter", base_model="a model", task="CAUSAL_LM")
    model = SkinkForCausalLM(SkinkConfig(vocab_size=97), program)
    loaded = PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    found = loaded(**INPUTS._asdict()).logits
    torch.testing.assert_close(found, logits(module), rtol=1e-5, atol=1e-5)
    assert float((found - program(*INPUTS)[0]).abs().max()) > 1e-3
    # And merged there, it is the model that merging here gives.
    merge_adapters(module, program)
    torch.testing.assert_close(
        loaded.merge_and_unload()(**INPUTS._asdict()).logits, program(*INPUTS)[0], rtol=1e-5, atol=1e-5
    )


def test_the_folder_of_an_adapter_names_its_model_and_holds_the_adapters_alone(tmp_path: Path) -> None:
    program = canonical("llama")
    module = program.module()
    add_adapters(module, LoraOptions(targets=("*.q_proj",)), program)
    for folder in ("one", "two"):
        save_adapter(module, tmp_path / folder, base_model="a model")
    config = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "a model"
    assert config["inference_mode"] is True
    assert len(load_file(tmp_path / "one" / "adapter_model.safetensors")) == 4
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert trained(module), "saving ends no training"


def test_a_hugging_face_model_takes_them_too() -> None:
    program = canonical("llama")
    model = SkinkForCausalLM(SkinkConfig(vocab_size=97), program)
    names = add_adapters(model, LoraOptions(), program)
    module = program.module()
    assert names == add_adapters(module, LoraOptions(), program)
    shaken(model, names)
    expected = model(**INPUTS._asdict()).logits
    merge_adapters(model, program)
    torch.testing.assert_close(program(*INPUTS)[0], expected.detach(), rtol=2e-5, atol=2e-5)
