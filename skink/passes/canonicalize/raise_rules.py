"""Rules that raise idioms to semantic ops: `rms_norm`, `rotary`, and `attention` where the model calls PyTorch's own.

Exact: the ops' references compute the same numbers up to rounding.
"""

import math
from typing import Any

import torch
from torch import fx

from skink.graph.pattern import Call, Match, NoMatch, Rule, is_cast_to, ops, through_casts
from skink.graph.rewriter import Rewriter
from skink.kernels import ATTENTION, RMS_NORM, ROTARY

aten = torch.ops.aten
_END = torch.iinfo(torch.int64).max


def _normalised(x: Any, eps: Any) -> Call:
    return ops.mul(x, ops.rsqrt(ops.add(ops.mean(ops.pow(x, 2), [-1], True), eps)))


def _wide_enough(rewriter: Rewriter, found: Match) -> fx.Node:
    """What `x` stands for, in the dtype that the result has: ops return their input's.

    A result that is only cast back to the dtype of `x` need not be wider.
    """
    x: fx.Node = found["x"]
    wanted = found.root.meta["val"].dtype
    if x.meta["val"].dtype == wanted or is_cast_to(found.root, x.meta["val"].dtype):
        return x
    return rewriter.call(aten.to.dtype, x, wanted)


def _check_norm(found: Match) -> NoMatch | None:
    if not isinstance(found["eps"], float):
        return NoMatch("eps is not a number", found.root)
    x = found["x"].meta["val"]
    weight = found.bindings.get("weight")
    if weight is not None:
        if not isinstance(weight, fx.Node) or through_casts(weight).op != "get_attr":
            return NoMatch("the factor is not a weight", found.root)
        shape = tuple(weight.meta["val"].shape)
        if shape != (x.shape[-1],):
            return NoMatch(f"the weight has shape {shape}, not ({x.shape[-1]},)", weight)
    return None


def _raise_norm(rewriter: Rewriter, found: Match) -> fx.Node:
    x = _wide_enough(rewriter, found)
    return rewriter.call(RMS_NORM.overload, x, None, found["eps"], 0.0, rule="raise-rms-norm-plain")


def _check_offset_norm(found: Match) -> NoMatch | None:
    if not isinstance(found["offset"], int | float):
        return NoMatch("the weight's offset is not a number", found.root)
    return _check_norm(found)


def _half_turn(x: Any, half: Any) -> Call:
    return ops.cat([ops.neg(ops.slice(x, 3, half, _END)), ops.slice(x, 3, 0, half)], -1)


def _check_rotary(found: Match) -> NoMatch | None:
    batch, _, length, width = found["x"].meta["val"].shape
    if not isinstance(found["half"], int) or width != 2 * found["half"]:
        return NoMatch(f"halves of {found['half']} do not make {width}", found.root)
    for name in ("cos", "sin"):
        table = found[name].meta["val"]
        if table.dim() != 3 or tuple(table.shape) not in ((batch, length, width), (1, length, width)):
            return NoMatch(f"the {name} table has not the shape [B, T, {width}]", found.root)
    return None


def _raise_rotary(rewriter: Rewriter, found: Match) -> fx.Node:
    # The op casts the tables to its input's dtype itself.
    tables = (through_casts(found["cos"]), through_casts(found["sin"]))
    return rewriter.call(ROTARY.overload, _wide_enough(rewriter, found), *tables, rule="raise-rotary")


def _check_partial(found: Match) -> NoMatch | None:
    width = found["cos"].meta["val"].shape[-1]
    return None if found["split"] == width else NoMatch(f"split at {found['split']}, tables of {width}", found.root)


def _raise_partial(rewriter: Rewriter, found: Match) -> fx.Node:
    return rewriter.call(ROTARY.overload, found["x"], found["cos"], found["sin"], rule="raise-rotary-partial")


def _arguments(found: Match) -> dict[str, Any]:
    """All arguments of the match's last call by name."""
    schema = found.root.target._schema.arguments  # type: ignore[union-attr]
    bound = {argument.name: argument.default_value for argument in schema}
    bound.update(zip((argument.name for argument in schema), found.root.args, strict=False))
    return bound | dict(found.root.kwargs)


def _check_sdpa(found: Match) -> NoMatch | None:
    arguments = _arguments(found)
    if arguments["attn_mask"] is not None:
        return NoMatch("the mask is a tensor of unknown kind", found.root)
    if arguments["dropout_p"]:
        return NoMatch(f"dropout {arguments['dropout_p']} is on", found.root)
    query, key, value = (found[name].meta["val"].shape for name in ("query", "key", "value"))
    if len(query) != 4:
        return NoMatch(f"{len(query)} dims, not [B, H, T, D]", found.root)
    if not query[0] == key[0] == value[0] or key[1] != value[1] or query[1] % key[1]:
        return NoMatch("batches or heads are broadcast", found.root)
    if arguments["is_causal"] and query[2] != key[2]:
        # PyTorch lets the first query see the first key alone; the op lets the last query see the last key.
        return NoMatch("causal with more keys than queries, which PyTorch aligns at the first", found.root)
    return None


def _raise_sdpa(rewriter: Rewriter, found: Match) -> fx.Node:
    arguments = _arguments(found)
    scale = arguments["scale"]
    if scale is None:
        scale = 1.0 / math.sqrt(found["query"].meta["val"].shape[-1])
    return rewriter.call(
        ATTENTION.overload,
        found["query"],
        found["key"],
        found["value"],
        rule="raise-attention",
        causal=bool(arguments["is_causal"]),
        scale=float(scale),
    )


def _check_torch_norm(found: Match) -> NoMatch | None:
    arguments = _arguments(found)
    if len(found["shape"]) != 1:
        return NoMatch(f"over {len(found['shape'])} dims, not one", found.root)
    if arguments["eps"] is None:
        return NoMatch("eps is left to the dtype", found.root)
    weight = arguments["weight"]
    if weight is not None and through_casts(weight).op != "get_attr":
        return NoMatch("the factor is not a weight", found.root)
    return None


def _raise_torch_norm(rewriter: Rewriter, found: Match) -> fx.Node:
    arguments = _arguments(found)
    return rewriter.call(
        RMS_NORM.overload, found["x"], arguments["weight"], arguments["eps"], 0.0, rule="raise-rms-norm-torch"
    )


def _product_over_tokens(x: Any, weight: Any, bias: Any, flat: Any, shape: Any) -> Call:
    return ops.reshape(ops.addmm(bias, ops.reshape(x, [-1, flat]), weight), shape)


def _check_transposed_linear(found: Match) -> NoMatch | None:
    weight = found["weight"]
    if not isinstance(weight, fx.Node) or weight.op != "get_attr" or len(weight.users) > 1:
        return NoMatch("the factor is not a weight of this call alone", found.root)
    x, result, (width, outputs) = found["x"].meta["val"].shape, found.root.meta["val"].shape, weight.meta["val"].shape
    if x[:-1] != result[:-1] or (x[-1], result[-1]) != (width, outputs):
        return NoMatch("the result does not have the input's leading dims", found.root)
    bias = found["bias"]
    if not isinstance(bias, fx.Node) or tuple(bias.meta["val"].shape) != (outputs,):
        return NoMatch("the bias is not one number for each output", found.root)
    return None


def _raise_transposed_linear(rewriter: Rewriter, found: Match) -> fx.Node:
    name = str(found["weight"].target)
    stored = rewriter.program.weight(name).t()
    return rewriter.call(
        aten.linear.default, found["x"], rewriter.weight(name, stored), found["bias"], rule="raise-linear"
    )


def _absorb_weight(rewriter: Rewriter, found: Match) -> fx.Node:
    weight, offset = through_casts(found["weight"]), float(found.bindings.get("offset", 0.0))
    x = _wide_enough(rewriter, found)
    return rewriter.call(RMS_NORM.overload, x, weight, found["eps"], offset, rule="raise-rms-norm")


def _plain_norm(x: Any, eps: Any) -> Call:
    return Call(("skink.rms_norm",), (x, None, eps, 0.0))


RULES: tuple[Rule, ...] = (
    Rule("raise-rms-norm-plain", pattern=_normalised, check=_check_norm, rewrite=_raise_norm),
    Rule(
        "raise-rotary",
        pattern=lambda x, half, cos, sin: ops.add(
            ops.mul(x, ops.unsqueeze(cos, 1)), ops.mul(_half_turn(x, half), ops.unsqueeze(sin, 1))
        ),
        check=_check_rotary,
        rewrite=_raise_rotary,
    ),
    Rule(
        "raise-attention",
        pattern=lambda query, key, value: ops.scaled_dot_product_attention(query, key, value, ...),
        check=_check_sdpa,
        rewrite=_raise_sdpa,
    ),
    Rule(
        "raise-rms-norm-torch",
        pattern=lambda x, shape: ops.rms_norm(x, shape, ...),
        check=_check_torch_norm,
        rewrite=_raise_torch_norm,
    ),
    Rule(
        "raise-linear",
        pattern=_product_over_tokens,
        check=_check_transposed_linear,
        rewrite=_raise_transposed_linear,
    ),
)

# Run after RULES: what they made is part of these patterns.
SECOND_RULES: tuple[Rule, ...] = (
    Rule(
        "raise-rms-norm-offset",
        pattern=lambda x, weight, offset, eps: ops.mul(_plain_norm(x, eps), ops.add(weight, offset)),
        check=_check_offset_norm,
        rewrite=_absorb_weight,
    ),
    Rule(
        "raise-rms-norm",
        pattern=lambda x, weight, eps: ops.mul(_plain_norm(x, eps), weight),
        check=_check_norm,
        rewrite=_absorb_weight,
    ),
    Rule(
        "raise-rotary-partial",
        pattern=lambda x, split, cos, sin: ops.cat(
            [Call(("skink.rotary",), (ops.slice(x, 3, 0, split), cos, sin)), ops.slice(x, 3, split, _END)], -1
        ),
        check=_check_partial,
        rewrite=_raise_partial,
    ),
)
