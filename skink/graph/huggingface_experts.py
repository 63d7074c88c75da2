"""Mixtures of experts of transformers' models as `skink::experts`.

transformers lets a library register its own implementation of experts. Ours puts the op into the graph. What a class
does between its two products (which activation, which half is the gate, limits) is found by asking it: its own function
is called on numbers, and compared with what the op would give. Experts that the op does not cover are captured by the
implementation that gathers each token's weights, whose shapes do not depend on the choice either.
"""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ExpertsInterface, batched_mm_experts_forward

from skink.kernels.experts.reference import ACTIVATIONS, activate

IMPLEMENTATION = "skink"


def classify_gate(
    function: Callable[[Tensor], Tensor], *, gated: bool, numbers: tuple[float, ...]
) -> Mapping[str, Any] | None:
    """The options of `skink::experts` with which `activate` is `function`; None where there are none.

    Args:
        function: float[..., 2F] → float[..., F] where gated, [..., F] → [..., F] otherwise; float32 inside will do.
        gated: whether it takes a gate and another half.
        numbers: the positive numbers that may be its limit and its alpha.
    """
    generator = torch.Generator().manual_seed(0)
    near = torch.randn((64, 8), generator=generator, dtype=torch.float64)
    # From where activations differ most to far beyond any limit.
    probe = torch.cat((near, near * 4.0, near * 10.0 * max((10.0, *numbers))))
    try:
        expected = function(probe)
    except Exception:
        # A module's own code on numbers: it may need its weights, or one dtype. It is none of our kinds then.
        return None
    if not isinstance(expected, Tensor) or expected.dtype is not torch.float64:
        return None
    for options in _candidates(gated, numbers):
        found = activate(probe, **options)
        # Some compute in float32 inside, whatever they are given.
        if found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-5, atol=1e-6):
            return options
    return None


def _candidates(gated: bool, numbers: tuple[float, ...]) -> Iterator[dict[str, Any]]:
    """Options of the op, the likeliest first."""
    halves = (False, True) if gated else (False,)
    shifts = (0.0, 1.0) if gated else (0.0,)
    for limit, shift, interleaved, activation in product((0.0, *numbers), shifts, halves, ACTIVATIONS):
        for alpha in (1.0, 1.702, *numbers) if activation == "silu" else (1.0,):
            yield {
                "activation": activation,
                "gated": gated,
                "interleaved": interleaved,
                "limit": limit,
                "alpha": alpha,
                "shift": shift,
            }


def _options(module: nn.Module) -> Mapping[str, Any] | None:
    """How the op computes a module's experts; None where it cannot."""
    gated = bool(getattr(module, "has_gate", True))
    if getattr(module, "has_post_expert_norm", False) or getattr(module, "_is_expert_parallel", False):
        return None
    function = module._apply_gate if gated else module.act_fn
    numbers = {float(value) for value in vars(module).values() if isinstance(value, float) and value > 0}
    # Tracing modes belong to a thread: in another one the module computes real values.
    with ThreadPoolExecutor(max_workers=1) as untraced:
        return untraced.submit(_classify, function, gated, tuple(sorted(numbers))).result()


def _classify(function: Any, gated: bool, numbers: tuple[float, ...]) -> Mapping[str, Any] | None:
    with torch.no_grad():
        return classify_gate(function, gated=gated, numbers=numbers)


def experts(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """transformers' experts function: `skink::experts` where it covers the module."""
    options = _options(module)
    if options is None:
        gathered: Tensor = batched_mm_experts_forward(module, hidden_states, top_k_index, top_k_weights)
        return gathered
    name = "gate_up_proj" if options["gated"] else "up_proj"
    biased = bool(getattr(module, "has_bias", False))
    result: Tensor = torch.ops.skink.experts(
        hidden_states,
        top_k_index,
        top_k_weights,
        getattr(module, name),
        module.down_proj,
        getattr(module, f"{name}_bias") if biased else None,
        module.down_proj_bias if biased else None,
        transposed=bool(getattr(module, "is_transposed", False)),
        **options,
    )
    return result


ExpertsInterface.register(IMPLEMENTATION, experts)
