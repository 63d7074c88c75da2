"""Which weights of an emitted module train: held in float32 meanwhile, and back in the program's dtypes afterwards.

A step of training changes a weight by a hundredth of a percent or less, and a bfloat16 number keeps two to three
digits: a weight in half precision would not move. So what trains has a float32 copy (Micikevicius et al. 2018, arXiv
1710.03740, section 3.1), and what does not stays as it is.
"""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from skink.errors import RecoveryError
from skink.graph.program import Program

# How many names a message lists.
_SHOWN = 6


def choose_trainable(
    module: nn.Module,
    program: Program,
    original: Program | None,
    train: str | Sequence[str],
    *,
    ignore: Sequence[str] = (),
) -> list[str]:
    """Names of the weights that train: those take gradients and have float32 tensors of their own, all others neither.

    Tied weights are one, under the name that the program's graph reads. Buffers and whole numbers never train. Adapters
    that `add_adapters` made are left as they are. The program's tensors are never written to, even where the module
    shares them (`program.module(copy=False)`).

    Args:
        module: emitted from `program`, by `Program.module` or as a Hugging Face model.
        program: with its weights.
        original: the program before its rewrites; only `new` asks for it.
        train: `all`; `new`, the weights that `original` has not; or shell-style patterns on names of weights or of the
            layers that hold them, as `*.mlp.*`.
        ignore: patterns of weights that do not train, whatever `train` says.

    Raises:
        RecoveryError: RECOVER-001 where nothing trains, or a pattern of `train` fits no weight.
    """
    chosen = trainable_names(program, original, train, ignore=ignore)
    _set_trainable(module, chosen)
    return chosen


def trainable_names(
    program: Program, original: Program | None, train: str | Sequence[str], *, ignore: Sequence[str] = ()
) -> list[str]:
    """Names of the weights that train, in the graph's order; arguments and errors as of `choose_trainable`."""
    weights = [name for name, tensor in program.weights() if _can_train(program, name, tensor)]
    if train == "all":
        chosen = weights
    elif train == "new":
        if original is None:
            raise _nothing("train=new asks which weights are new, and the model as it was is not at hand.")
        known = {*(name for name, _ in original.weights()), *original.aliases}
        chosen = [name for name in weights if name not in known]
        if not chosen:
            raise _nothing(
                "train=new finds nothing to train: no pass before it introduced a weight.",
                why=f"all {len(weights)} weights have the names that they had in the original.",
                fix="train behind a pass that gives layers new weights, as low-rank does; where an earlier run gave "
                "them, name the model from before it (--teacher); or use train=all or train=lora.",
            )
    else:
        patterns = (train,) if isinstance(train, str) else tuple(train)
        chosen = _fitting(program, weights, patterns)
    chosen = [name for name in chosen if not _fits(program, name, ignore)]
    if not chosen:
        raise _nothing(f"train={_shown(train)} finds nothing to train once ignore={_shown(ignore)} is left out.")
    return chosen


def idle_patterns(program: Program, patterns: Iterable[str]) -> list[str]:
    """Those of the patterns that fit no weight of the program, and no layer that holds one."""
    known = {name for weight, _ in program.weights() for name in _names(program, weight)}
    return [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in known)]


def write_back(module: nn.Module, program: Program, names: Iterable[str]) -> None:
    """Put the module's weights of these names into the program, each in the dtype and on the device that it has there.

    Where parameters are sharded over processes, every process must call this.

    Raises:
        RecoveryError: RECOVER-010 where a weight is no finite number of its dtype; nothing was written then.
    """
    # All are rounded before one is put in place.
    for name, tensor in [(name, rounded(name, _parameter(module, name), program.weight(name))) for name in names]:
        program.set_weight(name, tensor)


def rounded(name: str, tensor: Tensor, like: Tensor) -> Tensor:
    """A copy of `tensor`, on the device and in the dtype of `like`: the nearest number, ties to even.

    Raises:
        RecoveryError: RECOVER-010 where one has no finite number of that dtype near it.
    """
    whole = gathered(tensor)
    if whole.dtype == torch.float64 and like.dtype.itemsize < 4:
        whole = _to_odd(whole)
    result = whole.to(device=like.device, dtype=like.dtype, copy=True)
    if not bool(result.isfinite().all()):
        largest = float(whole.abs().nan_to_num(torch.inf).max())
        dtype = str(like.dtype).removeprefix("torch.")
        raise RecoveryError(
            "RECOVER-010",
            f"the trained weight {name!r} has values that {dtype} cannot hold.",
            why=f"the largest is {largest:.4g}; {dtype} ends at {torch.finfo(like.dtype).max:.4g}.",
            fix="train with a smaller learning rate, or begin with a model in float32 or bfloat16.",
        )
    return result


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded over processes, all of which must call this; without gradients."""
    found: Any = tensor.detach()
    whole: Tensor = found.full_tensor() if hasattr(found, "full_tensor") else found
    return whole


def _to_odd(tensor: Tensor) -> Tensor:
    """Float64 as float32, inexact ones to the neighbour with an odd last bit.

    PyTorch goes from float64 to half precision by way of float32, which rounds twice. From an odd neighbour the second
    rounding gives what one would (Boldo & Melquiond 2008, IEEE Transactions on Computers 57(4), theorem 3).
    """
    near = tensor.to(torch.float32)
    missed = near.double() != tensor
    even = near.view(torch.int32) % 2 == 0
    beyond = torch.where(tensor > near, torch.inf, -torch.inf).to(near.dtype)
    return torch.where(missed & even & near.isfinite(), torch.nextafter(near, beyond), near)


def _can_train(program: Program, name: str, tensor: Tensor) -> bool:
    return name not in program.buffers and tensor.is_floating_point()


def _names(program: Program, name: str) -> list[str]:
    """All that a weight may be called: its names, tied ones too, and those of the layers that hold it."""
    tied = [name, *(alias for alias, owner in program.aliases.items() if owner == name)]
    return [*tied, *(entry.rpartition(".")[0] for entry in tied)]


def _fits(program: Program, name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(known, pattern) for known in _names(program, name) for pattern in patterns)


def _fitting(program: Program, weights: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """The weights that fit one of the patterns, each of which fits some."""
    known = {name: _names(program, name) for name in weights}
    for pattern in patterns:
        if not any(fnmatchcase(entry, pattern) for names in known.values() for entry in names):
            raise _nothing(
                f"train={_shown(patterns)} finds nothing to train: no weight is named like {pattern!r}.",
                why=near_names(pattern, [*weights]),
            )
    return [name for name in weights if _fits(program, name, patterns)]


def near_names(pattern: str, names: Sequence[str]) -> str:
    """A sentence for a message: which of `names` are like a pattern that fits none, or how the first are called."""
    near = get_close_matches(pattern.strip("*."), names, n=_SHOWN, cutoff=0.5)
    if near:
        return f"the nearest are {', '.join(near)}."
    return f"they are {', '.join(names[:_SHOWN])}{' and others' if len(names) > _SHOWN else ''}."


def _shown(patterns: str | Sequence[str]) -> str:
    return patterns if isinstance(patterns, str) else f"[{', '.join(patterns)}]"


_FIX = "use train=all, train=lora, or shell-style patterns on names of weights, as '*.mlp.*'."


def _nothing(what: str, *, why: str = "", fix: str = _FIX) -> RecoveryError:
    return RecoveryError("RECOVER-001", what, why=why, fix=fix)


def _parameter(module: nn.Module, name: str) -> nn.Parameter:
    """The parameter of a weight, below the adapters that are laid around its layer."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    while "base_layer" in owner._modules:
        owner = owner.get_submodule("base_layer")
    return owner.get_parameter(leaf)


def _set_trainable(module: nn.Module, names: Sequence[str]) -> None:
    chosen = {id(_parameter(module, name)): _parameter(module, name) for name in names}
    for name, parameter in module.named_parameters():
        if not is_adapter(name):
            parameter.requires_grad_(id(parameter) in chosen)
    for parameter in chosen.values():
        parameter.grad = None
        # A copy even of float32: the program may hold this very tensor.
        parameter.data = parameter.data.to(torch.float32, copy=True)


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter of PEFT's kind LoRA."""
    return any(part.startswith("lora_") for part in name.split("."))
