"""Low-rank adapters on an emitted module, by PEFT: laid around its linear layers, merged into the program, saved.

y = W x + b + s B A x   →   W + s B A,   s = alpha / rank, or alpha / sqrt(rank) for rslora

Sources: LoRA, Hu et al. 2021 (arXiv 2106.09685, equation 3); rsLoRA, Kalajdzievski 2023 (arXiv 2312.03732, equation 5);
DoRA, Liu et al. 2024 (arXiv 2402.09353, equation 5): m (W + s B A) / |W + s B A|, with the norm of each row.
"""

import copy
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from skink.errors import RecoveryError, check_range
from skink.graph.emit import linear_owner
from skink.graph.output_heads import head_weights
from skink.graph.program import Program
from skink.training.weights.trainable import gathered, is_adapter, near_names, rounded

_NAME = "default"


@dataclass(frozen=True)
class LoraOptions:
    """What adapters are like.

    Args:
        rank: rows of A and columns of B, at least 1.
        alpha: see the module; the adapter's output is scaled by alpha / rank.
        dropout: share of the adapter's inputs dropped in training, in [0, 1).
        targets: shell-style patterns on names of linear layers, as `*.self_attn.*`; empty: every linear layer but the
            output head. Thin factors are linear layers too.
        ignore: patterns of layers without adapters, whatever `targets` says.
        variant: `lora`, `rslora` or `dora`.

    Raises:
        OptionError: OPTION-002 out of range.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    variant: Literal["lora", "rslora", "dora"] = "lora"

    def __post_init__(self) -> None:
        check_range("rank", self.rank, low=1, high=2**16)
        check_range("alpha", self.alpha, low=0, high=1e6, open_low=True)
        check_range("dropout", self.dropout, low=0, high=1, open_high=True)


def add_adapters(module: nn.Module, options: LoraOptions, program: Program, *, seed: int = 0) -> list[str]:
    """Lay adapters around linear layers of `module`, in place; the names of their parameters.

    These are float32 and the only ones that train: call `choose_trainable` afterwards where weights are to train beside
    them. B begins at zero, so the module computes what it did.

    Args:
        module: emitted from `program`, by `Program.module` or as a Hugging Face model.
        options: see `LoraOptions`.
        program: says which layers share their weight with something else.
        seed: of the numbers that A begins with.

    Raises:
        RecoveryError: RECOVER-001 where a pattern of the targets fits no layer, or none is left; RECOVER-011 where a
            target's weight is read by something else too, so that merging would change that as well.
    """
    from peft import LoraConfig, inject_adapter_in_model

    paths = adapter_targets(program, options)
    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,  # type: ignore[arg-type]
        lora_dropout=options.dropout,
        # Whole paths: a list would be matched by their ends.
        target_modules="|".join(re.escape(path) for path in paths),
        use_rslora=options.variant == "rslora",
        use_dora=options.variant == "dora",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(config, module, adapter_name=_NAME)
    names = [name for name, _ in module.named_parameters() if is_adapter(name)]
    for name in names:
        parameter = module.get_parameter(name)
        parameter.data = parameter.data.float()
    for _, layer in _adapted(module):
        if _NAME in layer.lora_magnitude_vector:
            # PEFT takes the norm in the weight's dtype, and the module would not begin as what it was.
            norms = _weight(layer).double().norm(dim=1).float()
            layer.lora_magnitude_vector[_NAME].weight.data = norms
    return names


def adapter_targets(program: Program, options: LoraOptions) -> list[str]:
    """Paths of the linear layers that adapters go around, in the graph's order.

    Raises:
        RecoveryError: as `add_adapters`.
    """
    layers = _linear_layers(program)
    if options.targets:
        for pattern in options.targets:
            if not any(fnmatchcase(path, pattern) for path in layers):
                raise RecoveryError(
                    "RECOVER-001",
                    f"targets=[{', '.join(options.targets)}] finds nothing to train: no linear layer is named like "
                    f"{pattern!r}.",
                    why=near_names(pattern, [*layers]),
                    fix="use shell-style patterns on these names, as '*.self_attn.*'.",
                )
        chosen = [path for path in layers if _fits(path, options.targets)]
    else:
        heads = head_weights(program)
        chosen = [
            path for path, nodes in layers.items() if not any(str(_stored(node).target) in heads for node in nodes)
        ]
    chosen = [path for path in chosen if not _fits(path, options.ignore)]
    if not chosen:
        raise RecoveryError(
            "RECOVER-001",
            "no linear layer is left to lay an adapter around.",
            why=f"the model has {len(layers)} of them; targets and ignore leave none.",
            fix="give patterns of names as targets, or leave targets and ignore out.",
        )
    for path in chosen:
        _check_alone(program, path, layers[path])
    return chosen


def merge_adapters(module: nn.Module, program: Program) -> list[str]:
    """Merge the module's adapters into the program's weights; their names. The module keeps its adapters.

    Each weight becomes W + s B A (DoRA: scaled row by row) computed in float64 and rounded once to the dtype of W. W is
    the program's, or the module's float32 copy where that trained beside the adapter.

    Where parameters are sharded over processes, every process must call this.

    Raises:
        RecoveryError: RECOVER-010 where a weight is no finite number of its dtype; nothing was merged then.
    """
    merged: dict[str, Tensor] = {}
    for path, layer in _adapted(module):
        name = program.aliases.get(f"{path}.weight", f"{path}.weight")
        stored = program.weight(name)
        trained = layer.base_layer.weight.requires_grad
        weight = _wide(layer.base_layer.weight) if trained else stored.double()
        a, b = _wide(layer.lora_A[_NAME].weight), _wide(layer.lora_B[_NAME].weight)
        weight = weight.to(a.device) + layer.scaling[_NAME] * (b @ a)
        if _NAME in layer.lora_magnitude_vector:
            magnitude = _wide(layer.lora_magnitude_vector[_NAME].weight)
            weight = weight * (magnitude / weight.norm(dim=1))[:, None]
        merged[name] = rounded(name, weight, stored)
    for name, tensor in merged.items():
        program.set_weight(name, tensor)
    return list(merged)


def save_adapter(
    module: nn.Module,
    folder: str | os.PathLike[str],
    *,
    base_model: str | None = None,
    task: str | None = None,
) -> None:
    """Write the module's adapters as PEFT does: `PeftModel.from_pretrained(model, folder)` lays them around a model.

    Args:
        module: with adapters from `add_adapters`.
        folder: made where it is not there; gets `adapter_config.json` and `adapter_model.safetensors`.
        base_model: name or folder of the model that they belong to, for those who read the folder.
        task: what PEFT calls the model's task: `CAUSAL_LM` for decoders.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    config: Any = module.peft_config[_NAME]  # type: ignore[index]
    saved = copy.copy(config)
    saved.base_model_name_or_path, saved.inference_mode, saved.task_type = base_model, True, task
    saved.save_pretrained(path)
    tensors = get_peft_model_state_dict(module, adapter_name=_NAME)
    # A PeftModel holds the model two levels down, and names what it saves from the top.
    named = {f"base_model.model.{name}": gathered(tensor).cpu().contiguous() for name, tensor in tensors.items()}
    save_file(named, path / "adapter_model.safetensors", metadata={"format": "pt"})


def _linear_layers(program: Program) -> dict[str, list[fx.Node]]:
    """The nodes that each `nn.Linear` of the emitted module stands for, by its path."""
    layers: dict[str, list[fx.Node]] = {}
    for node in program.graph.nodes:
        path = linear_owner(program, node)
        if path is not None:
            layers.setdefault(path, []).append(node)
    return layers


def _stored(linear: fx.Node) -> fx.Node:
    weight = linear.args[1]
    if not isinstance(weight, fx.Node):
        raise TypeError(f"{linear.name} has no weight")
    return weight


def _check_alone(program: Program, path: str, nodes: Sequence[fx.Node]) -> None:
    """Refuse a layer whose weight has readers that its module is not."""
    name = str(_stored(nodes[0]).target)
    readers = [user for weight in program.graph.find_nodes(op="get_attr", target=name) for user in weight.users]
    others = [user for user in readers if user not in nodes]
    if others:
        embedding = any(user.target is torch.ops.aten.embedding.default for user in others)
        also = "the embedding" if embedding else f"%{others[0].name}"
        raise RecoveryError(
            "RECOVER-011",
            f"the layer {path!r} cannot have an adapter: {also} reads its weight too.",
            where=name,
            why=f"merged, the adapter would change {also} as well, which it does not while it trains.",
            fix=f"leave it out with ignore=[{path}], or train the weight itself.",
        )


def _fits(path: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(path, pattern) for pattern in patterns)


def _adapted(module: nn.Module) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora import Linear

    for path, layer in module.named_modules():
        if isinstance(layer, Linear):
            yield path, layer


def _weight(layer: Any) -> Tensor:
    weight: Tensor = layer.base_layer.weight
    return weight.detach()


def _wide(parameter: nn.Parameter) -> Tensor:
    return gathered(parameter).double()
