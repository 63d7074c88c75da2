"""How to call a causal language model, whoever wrote it."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from skink.errors import CaptureError

# An output of a model: an object with `.logits`, a tuple that begins with the logits, or the logits themselves.
Model = Callable[..., object]

_ARGUMENTS = frozenset(
    {"input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}
)


def accepted_arguments(model: Model) -> frozenset[str]:
    """Which of a Hugging Face model's usual arguments a model names; none for a plain callable of token ids.

    Only what a signature names is passed: `**kwargs` of transformers' models may refuse what they do not know. A
    wrapper that names nothing but `**kwargs` is taken to accept all but `logits_to_keep`; torch.compile's and PEFT's
    hand everything on, so there the model inside is asked.
    """
    if isinstance(model, nn.Module):
        inner = getattr(model, "_orig_mod", None)
        base = getattr(model, "get_base_model", None)
        if inner is None and callable(base):
            inner = base()
        if isinstance(inner, nn.Module):
            return accepted_arguments(inner)
    parameters = inspect.signature(model.forward if isinstance(model, nn.Module) else model).parameters
    if "input_ids" in parameters:
        return _ARGUMENTS & set(parameters)
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return _ARGUMENTS - {"logits_to_keep"}
    return frozenset()


def call(model: Model, accepted: frozenset[str], **arguments: object) -> object:
    """The model's output for those arguments that it accepts; a plain callable gets `input_ids` alone."""
    if not accepted:
        return model(arguments["input_ids"])
    return model(**{name: value for name, value in arguments.items() if name in accepted})


def read_whole(model: Model, accepted: frozenset[str], ids: Tensor) -> Tensor:
    """Logits [B, T, V] of texts int64[B, T] without padding, read at once; nothing is kept for later tokens.

    Raises: CAPTURE-004, as `logits_of`.
    """
    output = call(
        model,
        accepted,
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        position_ids=torch.arange(ids.shape[1], device=ids.device).repeat(len(ids), 1),
        use_cache=False,
    )
    return logits_of(output)


def logits_of(output: object) -> Tensor:
    """The logits in a model's output, [B, T, V].

    Raises: CAPTURE-004 for an output without.
    """
    found = getattr(output, "logits", output[0] if isinstance(output, tuple | list) and output else output)
    if not isinstance(found, Tensor):
        raise CaptureError(
            "CAPTURE-004",
            f"the model returned a {type(output).__name__}, in which there are no logits.",
            why="an object with `.logits`, a tuple that begins with them, or a tensor is expected.",
            fix="give a causal language model, or a callable from token ids to logits.",
        )
    return found


def device_of(model: Model) -> torch.device | None:
    """Where a module's weights are; None for a callable that has none."""
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    return None if parameter is None else parameter.device


def weights_dtype(model: Model) -> str:
    """The floating dtypes of a module's parameters; empty for a callable that has none."""
    if not isinstance(model, nn.Module):
        return ""
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.dtype.is_floating_point}
    return "+".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))


@contextmanager
def eval_mode(model: Model) -> Iterator[None]:
    """Without dropout inside; each module's own mode again after."""
    training = [module for module in model.modules() if module.training] if isinstance(model, nn.Module) else []
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
