"""Make `skink::low_rank_linear` of two thin linear layers, where that is how they run best.

linear(linear(x, down), up, bias)   ->   skink.low_rank_linear(x, down, up, bias)
                                         linear(x, up @ down, bias)

forms.py says which form is taken.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from skink.graph.pattern import Call, Match, Weight, ops
from skink.graph.rewriter import Rewriter
from skink.kernels import LOW_RANK_LINEAR
from skink.passes.lower.forms import FactoredLayers, Layers, bias_of, is_linear


def _pair(x: Tensor, down: Weight, up: Weight) -> Call:
    return ops.linear(ops.linear(x, down), up)


def _pair_with_bias(x: Tensor, down: Weight, up: Weight, bias: Weight) -> Call:
    return ops.linear(ops.linear(x, down), up, bias)


class ThinPairs(FactoredLayers):
    """Two layers, the second of the first's results and nothing else."""

    op = LOW_RANK_LINEAR
    kind = "low-rank"
    patterns = (_pair, _pair_with_bias)
    pivoted = False
    owners = "layers"

    def layers(self, found: Match) -> Layers | None:
        """See `FactoredLayers.layers`."""
        up, down = found.root, found.root.args[0]
        if not isinstance(down, fx.Node) or not is_linear(down):
            return None
        factors: Any = {"down": down.args[1], "up": up.args[1], "bias": bias_of(up)}
        return Layers(down.all_input_nodes[0], (down, up), factors)

    def dense(self, rewriter: Rewriter, layers: Layers) -> Sequence[fx.Node]:
        """See `FactoredLayers.dense`."""
        down, up, *bias = (node for node in layers.operands.values() if node is not None)
        factors = [rewriter.program.weight(str(node.target)) for node in (up, down)]
        wide = torch.promote_types(factors[0].dtype, torch.float32)
        product = (factors[0].to(wide) @ factors[1].to(wide)).to(factors[0].dtype)
        return rewriter.weight(f"{up.target}_times_down", product), *bias
