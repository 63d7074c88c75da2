"""Rules that raise `aten.linear` from products with a weight. Exact up to rounding.

reshape(addmm(bias, reshape(x), weight))     transformers' Conv1D
x @ weightᵀ + bias                           by hand
"""

from typing import Any

import torch
from torch import Tensor, fx

from skink.graph.pattern import (
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
from skink.graph.rewriter import Rewriter
from skink.passes.canonicalize.raise_norms import wide_enough

aten = torch.ops.aten


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


def _product(x: Tensor, weight: Weight) -> Call:
    turned = any_of(
        ops.t(weight),
        ops.permute(weight, [1, 0]),
        ops.transpose(weight, 0, 1),
        ops.transpose(weight, 1, 0),
        ops.transpose(weight, -1, -2),
        ops.transpose(weight, -2, -1),
    )
    return ops.any_of("matmul", "mm")(x, turned)


def _check_product(found: Match) -> NoMatch | None:
    if found["weight"].meta["val"].dim() != 2:
        return NoMatch("the weight is no matrix", found["weight"])
    if found["x"].meta["val"].dtype != found["weight"].meta["val"].dtype:
        return NoMatch("input and weight have different dtypes", found.root)
    return None


def _raise_product(rewriter: Rewriter, found: Match) -> fx.Node:
    x = wide_enough(rewriter, found)
    return rewriter.call(aten.linear.default, x, _like(rewriter, found["weight"], x), rule="raise-linear-product")


def _like(rewriter: Rewriter, weight: fx.Node, x: fx.Node) -> fx.Node:
    """A weight in the dtype of the input."""
    dtype = x.meta["val"].dtype
    return weight if weight.meta["val"].dtype == dtype else rewriter.call(aten.to.dtype, weight, dtype)


def _check_bias(found: Match) -> NoMatch | None:
    outputs = found["weight"].meta["val"].shape[:1]
    if tuple(found["bias"].meta["val"].shape) != tuple(outputs):
        return NoMatch("the bias is not one number for each output", found.root)
    if through_float_casts(found["bias"]).op != "get_attr":
        return NoMatch("the bias is cast to fewer digits", found["bias"])
    if found["x"].meta["val"].dtype != found["weight"].meta["val"].dtype:
        return NoMatch("input and weight have different dtypes", found.root)
    product = next(node for node in found.nodes if op_name(node) == "linear")
    made, wanted = product.meta["val"].dtype, found.root.meta["val"].dtype
    if made != wanted and not is_cast_to(found.root, made):
        return NoMatch(f"the bias is added in {wanted} to a product in {made}", found.root)
    return None


def _absorb_bias(rewriter: Rewriter, found: Match) -> fx.Node:
    x = wide_enough(rewriter, found)
    weight, bias = (_like(rewriter, node, x) for node in (found["weight"], through_float_casts(found["bias"])))
    return rewriter.call(aten.linear.default, x, weight, bias, rule="raise-linear-bias")


def _biased(x: Tensor, weight: Weight, bias: Weight) -> Call:
    return ops.add(ops.linear(x, weight), bias)


RULES: tuple[Rule, ...] = (
    Rule(
        "raise-linear",
        pattern=_product_over_tokens,
        check=_check_transposed_linear,
        rewrite=_raise_transposed_linear,
    ),
    Rule("raise-linear-product", pattern=_product, check=_check_product, rewrite=_raise_product),
    Rule("raise-linear-bias", pattern=_biased, check=_check_bias, rewrite=_absorb_bias, exclusive=True),
)
