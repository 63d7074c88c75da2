"""Rules that raise `rms_norm`, and `aten.layer_norm` where it is written by hand. Exact up to rounding.

x / sqrt(mean(x²) + eps) * (offset + weight)            rms_norm
(x - mean(x)) / sqrt(var(x) + eps) * weight + bias      layer_norm
"""

from typing import Any

import torch
from torch import Tensor, fx

from skink.graph.pattern import (
    LAST_AXIS,
    AnyOf,
    Call,
    Match,
    NoMatch,
    Rule,
    Weight,
    any_of,
    is_cast_to,
    op_name,
    ops,
    through_float_casts,
)
from skink.graph.propagate import expression
from skink.graph.rewriter import Rewriter
from skink.kernels import RMS_NORM
from skink.passes.canonicalize.arguments import arguments_of

aten = torch.ops.aten


def _mean_square(x: Any) -> AnyOf:
    return any_of(
        ops.mean(ops.pow(x, 2), LAST_AXIS, True),
        ops.mean(ops.mul(x, x), LAST_AXIS, True),
        ops.mean(ops.square(x), LAST_AXIS, True),
    )


def _over_root(x: Any, square: Any, eps: Any) -> tuple[Call, Call]:
    """`x / sqrt(square + eps)`, as a product and as a quotient."""
    total = ops.add(square, eps)
    inverse = any_of(ops.rsqrt(total), ops.pow(total, -0.5), ops.reciprocal(ops.sqrt(total)))
    return ops.mul(x, inverse), ops.div(x, any_of(ops.sqrt(total), ops.pow(total, 0.5)))


def wide_enough(rewriter: Rewriter, found: Match) -> fx.Node:
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
    weight = found.get("weight")
    if weight is not None:
        if not isinstance(weight, fx.Node) or through_float_casts(weight, found.root).op != "get_attr":
            return NoMatch("the factor is not a weight", found.root)
        shape = tuple(weight.meta["val"].shape)
        if shape != (x.shape[-1],):
            return NoMatch(f"the weight has shape {shape}, not ({x.shape[-1]},)", weight)
    return None


def _raise_norm(rewriter: Rewriter, found: Match) -> fx.Node:
    x = wide_enough(rewriter, found)
    return rewriter.call(RMS_NORM.overload, x, None, found["eps"], 0.0, rule="raise-rms-norm-plain")


def _check_offset_norm(found: Match) -> NoMatch | None:
    if not isinstance(found["offset"], int | float):
        return NoMatch("the weight's offset is not a number", found.root)
    return _check_norm(found)


def _absorb_weight(rewriter: Rewriter, found: Match) -> fx.Node:
    weight, offset = through_float_casts(found["weight"], found.root), float(found.get("offset", 0.0))
    x = wide_enough(rewriter, found)
    return rewriter.call(RMS_NORM.overload, x, weight, found["eps"], offset, rule="raise-rms-norm")


def _plain_norm(x: Any, eps: Any) -> Call:
    return Call(("skink.rms_norm",), (x, None, eps, 0.0))


def _check_torch_norm(found: Match) -> NoMatch | None:
    arguments = arguments_of(found.root)
    if len(found["shape"]) != 1:
        return NoMatch(f"over {len(found['shape'])} dims, not one", found.root)
    if arguments["eps"] is None:
        return NoMatch("eps is left to the dtype", found.root)
    weight = arguments["weight"]
    if weight is not None and through_float_casts(weight, found.root).op != "get_attr":
        return NoMatch("the factor is not a weight", found.root)
    return None


def _raise_torch_norm(rewriter: Rewriter, found: Match) -> fx.Node:
    arguments = arguments_of(found.root)
    return rewriter.call(
        RMS_NORM.overload, found["x"], arguments["weight"], arguments["eps"], 0.0, rule="raise-rms-norm-torch"
    )


def _centred(x: Any) -> Call:
    return ops.sub(x, ops.mean(x, LAST_AXIS, True))


def _over_deviation(x: Any, eps: Any) -> tuple[Call, Call]:
    return _over_root(_centred(x), ops.var(x, LAST_AXIS, ...), eps)


def _norm_of_centred(x: Any, weight: Any, eps: Any) -> Call:
    return Call(("skink.rms_norm",), (_centred(x), weight, eps, 0.0))


def _check_layer_norm(found: Match) -> NoMatch | None:
    if not isinstance(found["eps"], float):
        return NoMatch("eps is not a number", found.root)
    for node in found.nodes:
        if op_name(node) == "var":
            arguments = arguments_of(node)
            biased = arguments.get("correction", int(bool(arguments.get("unbiased", True)))) == 0
            if not biased or not arguments["keepdim"]:
                return NoMatch("the variance is that of a sample, over one less than the width", node)
    if not isinstance(expression(found["x"].meta["val"].shape[-1]), int):
        return NoMatch("the width is not a number", found.root)
    return None


def _raise_layer_norm(rewriter: Rewriter, found: Match) -> fx.Node:
    x, weight = wide_enough(rewriter, found), through_float_casts(found.get("weight"), found.root)
    width = int(x.meta["val"].shape[-1])
    return rewriter.call(aten.layer_norm.default, x, [width], weight, None, found["eps"], rule="raise-layer-norm")


def _plain_layer_norm(x: Any, shape: Any, eps: Any) -> Call:
    return ops.layer_norm(x, shape, None, None, eps)


def _check_factors(found: Match) -> NoMatch | None:
    for name in ("weight", "bias"):
        entry = found.get(name)
        if entry is not None and tuple(entry.meta["val"].shape) != tuple(found["shape"]):
            return NoMatch(f"the {name} is not one number for each feature", entry)
        if entry is not None and through_float_casts(entry, found.root).op != "get_attr":
            return NoMatch(f"the {name} is cast to fewer digits", entry)
    return None


def _absorb_factors(rewriter: Rewriter, found: Match) -> fx.Node:
    weight, bias = (through_float_casts(found.get(name), found.root) for name in ("weight", "bias"))
    x = wide_enough(rewriter, found)
    return rewriter.call(
        aten.layer_norm.default, x, found["shape"], weight, bias, found["eps"], rule="raise-layer-norm"
    )


def _with_weight(x: Any, shape: Any, eps: Any, weight: Weight) -> Call:
    return ops.mul(_plain_layer_norm(x, shape, eps), weight)


def _with_bias(x: Tensor, shape: Any, eps: Any, weight: Weight, bias: Weight) -> Call:
    return ops.add(ops.layer_norm(x, shape, weight, None, eps), bias)


RULES: tuple[Rule, ...] = (
    Rule(
        "raise-rms-norm-plain",
        pattern=lambda x, eps: _over_root(x, _mean_square(x), eps)[0],
        check=_check_norm,
        rewrite=_raise_norm,
    ),
    Rule(
        "raise-rms-norm-quotient",
        pattern=lambda x, eps: _over_root(x, _mean_square(x), eps)[1],
        check=_check_norm,
        rewrite=_raise_norm,
    ),
    Rule(
        "raise-rms-norm-torch",
        pattern=lambda x, shape: ops.rms_norm(x, shape, ...),
        check=_check_torch_norm,
        rewrite=_raise_torch_norm,
    ),
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
    # What is centred first is an rms norm by now.
    Rule("raise-layer-norm-centred", _norm_of_centred, _raise_layer_norm, _check_layer_norm),
    Rule("raise-layer-norm-plain", lambda x, eps: _over_deviation(x, eps)[0], _raise_layer_norm, _check_layer_norm),
    Rule("raise-layer-norm-quotient", lambda x, eps: _over_deviation(x, eps)[1], _raise_layer_norm, _check_layer_norm),
    Rule("raise-layer-norm", pattern=_with_weight, check=_check_factors, rewrite=_absorb_factors),
    Rule("raise-layer-norm-bias", pattern=_with_bias, check=_check_factors, rewrite=_absorb_factors),
)
