"""Tucker's decomposition of linear layers and convolutions, over a design space of blocks, tensors and ranks.

    y = x W^T + b   ->   y = ((x U_in) core^T) U_out^T + b      U_out: [out, R], core: [R, R], U_in^T: [R, in]

For a matrix it is the truncated SVD, with the singular values as a diagonal core: with three factors the core is a
product of its own, with two it is folded into its neighbours. Convolutions: see `tucker.convolution`. Exactness:
approximate.
Source: Moar et al. 2024 (arXiv 2405.06626), who factor the same tensors in a set of layers at one rank; Kim et al. 2016
(arXiv 1511.06530) for convolutions.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from skink.errors import GraphError, check_range
from skink.graph.passes import Context, Pass, PassResult
from skink.graph.pattern import NoMatch
from skink.graph.program import Program, Stage
from skink.graph.rewriter import Rewriter, describe
from skink.passes.decompose.basis_sharing.statistics import Statistics, stream_statistics
from skink.passes.decompose.factorize.factorize import factorize, plain_truncation_energy, relative, uniform_rank
from skink.passes.decompose.replacement import factored, replace_by_factors
from skink.passes.decompose.selection import Choice, LinearLayer, notes_on_few_tokens
from skink.passes.decompose.tucker.convolution import (
    Convolution,
    convolutions,
    ranks_within,
    replace_convolution,
    tucker_parameters,
)
from skink.passes.decompose.tucker.space import Space
from skink.passes.decompose.tucker.tensor import relative_error, three_factors

RULE = "linear-to-tucker"

# Of the gradients' metric, as a share of its mean.
GRADIENT_DAMPING = 0.05


@dataclass(frozen=True)
class Tucker(Pass):
    """Options of the pass.

    Args:
        rank: a whole number: the rank of every weight that is factored; below 1: the share of each one's parameters
            that is kept.
        factors: of a matrix, 2 or 3.
        rank_out: the rank on the output side, where it is not `rank`; with two factors the lesser of both sides counts.
        rank_in: the rank on the input side, likewise.
        layers: numbers of the blocks that are factored, from 0; empty: all.
        tensors: names below a block of what is factored there, as `q_proj` or `self_attn.q_proj`; empty: all.
        targets: shell-style patterns on qualified names, which must fit as well; empty: every linear layer but the
            output head, and every convolution.
        ignore: patterns of layers to leave alone.
        method: `plain`, the study's own; `whitened` loses the least of each layer's output on calibration text,
            `two-sided` of the loss, as gradients predict it. Convolutions are always plain.
        iterations: of HOOI for convolutions.
    """

    rank: int | float = 0.8
    factors: Literal[2, 3] = 2
    rank_out: int | None = None
    rank_in: int | None = None
    layers: tuple[int, ...] = ()
    tensors: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    method: Literal["plain", "whitened", "two-sided"] = "plain"
    iterations: int = 10

    name: ClassVar[str] = "tucker"
    summary: ClassVar[str] = "factor linear layers and convolutions after Tucker, by block, tensor and rank"
    requires: ClassVar[Stage] = Stage.CANONICAL
    yields: ClassVar[Stage | None] = Stage.REWRITTEN
    exactness: ClassVar[Literal["exact", "approximate"]] = "approximate"

    def __post_init__(self) -> None:
        if isinstance(self.rank, int):
            check_range("tucker.rank", self.rank, low=1, high=math.inf, open_high=True)
        else:
            check_range("tucker.rank", self.rank, low=0.0, high=1.0, open_low=True, open_high=True)
        for name, rank in (("rank_out", self.rank_out), ("rank_in", self.rank_in)):
            if rank is not None:
                check_range(f"tucker.{name}", rank, low=1, high=math.inf, open_high=True)
        for block in self.layers:
            check_range("tucker.layers", block, low=0, high=math.inf, open_high=True)
        check_range("tucker.iterations", self.iterations, low=0, high=math.inf, open_high=True)

    @property
    def needs_calibration(self) -> bool:
        return self.method != "plain"

    def run(self, program: Program, rewriter: Rewriter, context: Context) -> PassResult:
        """Factor what is chosen.

        Raises:
            CalibrationError: CALIBRATION-001 to -004, see `stream_covariances`.
            GraphError: GRAPH-002 where weights are on the meta device.
            OptionError: OPTION-002 where layers, tensors and targets leave nothing to factor.
        """
        kernels = convolutions(program)
        space = Space(self.layers, self.tensors, self.targets, self.ignore)
        choice, notes = space.choose(program, self.name, kernels)
        for layer in choice:
            reason = self._reason_against(layer)
            if reason is not None:
                choice.refuse(layer, reason)
        seen: list[tuple[str, int, int]] = []
        for layer, known in self._factored(program, rewriter, context, choice):
            if known is not None:
                seen.append((layer.name, known.inputs.tokens, layer.shape[1]))
        notes += notes_on_few_tokens(seen, "directions that they do not reach are kept by the weight's size.")
        records, refused = [], []
        for kernel in kernels:
            unwanted = space.reason_to_leave(kernel.name)
            reason = unwanted or self._reason_against_kernel(program, kernel)
            if reason is None:
                ranks = self._kernel_ranks(kernel)
                records.append(replace_convolution(program, rewriter, kernel, *ranks, self.iterations))
                continue
            records.append(kernel.record("kept dense", kernel.parameters, reason=reason))
            if unwanted is None:
                refused.append(NoMatch(reason, kernel.readers[0]))
        rewriter.finish()
        result = choice.result(rewriter, notes)
        return replace(result, refused=(*result.refused, *refused), layers=(*result.layers, *records))

    def _ranks(self, layer: LinearLayer) -> tuple[int, int]:
        """Ranks on the output and on the input side of a matrix; equal where it gets two factors."""
        out, in_ = layer.shape
        if isinstance(self.rank, int):
            rank = self.rank
        elif self.factors == 2:
            rank = uniform_rank(self.rank, out, in_)
        else:
            rank = _three_factor_rank(self.rank, out, in_)
        most = min(out, in_)
        sides = min(self.rank_out or rank, most), min(self.rank_in or rank, most)
        return sides if self.factors == 3 else (min(sides), min(sides))

    def _reason_against(self, layer: LinearLayer) -> str | None:
        rank_out, rank_in = self._ranks(layer)
        shape = f"{layer.shape[0]}x{layer.shape[1]}"
        if not rank_out or not rank_in:
            return f"rank={self.rank:g} of {shape} leaves no rank"
        if self._parameters(layer) >= layer.parameters:
            return f"{self.factors} factors of ranks {rank_out} and {rank_in} of {shape} save nothing"
        return None

    def _parameters(self, layer: LinearLayer) -> int:
        rank_out, rank_in = self._ranks(layer)
        core = rank_out * rank_in if self.factors == 3 else 0
        return rank_out * layer.shape[0] + core + rank_in * layer.shape[1]

    def _factored(
        self, program: Program, rewriter: Rewriter, context: Context, choice: Choice
    ) -> Iterator[tuple[LinearLayer, Statistics | None]]:
        """Layers as they are replaced and recorded, with the statistics behind them."""
        chosen = {layer.weight: layer for layer in choice}
        if self.method == "plain":
            for done, layer in enumerate(chosen.values()):
                self._replace(program, rewriter, choice, layer, None)
                yield layer, None
                context.progress(done + 1, len(chosen))
            return
        for name, known in stream_statistics(program, list(chosen), self.method, context):
            self._replace(program, rewriter, choice, chosen[name], known)
            yield chosen[name], known

    def _replace(
        self, program: Program, rewriter: Rewriter, choice: Choice, layer: LinearLayer, known: Statistics | None
    ) -> None:
        weight, (rank_out, rank_in) = program.weight(layer.weight), self._ranks(layer)
        exact = weight.double()
        found = factorize(
            exact,
            left=known.output if known is not None else None,
            right=known.inputs.total if known is not None else None,
            rank=max(rank_out, rank_in),
            left_damping=GRADIENT_DAMPING,
        )
        up, down, core = found.up, found.down, None
        if self.factors == 3:
            up, core, down = three_factors(up, down, rank_out, rank_in)
            core = core.to(weight.dtype)
        up, down = up.to(weight.dtype).contiguous(), down.to(weight.dtype).contiguous()
        product = (up.double() if core is None else up.double() @ core.double()) @ down.double()
        error = relative_error(exact, product)
        done = replace_by_factors(
            program,
            rewriter,
            layer,
            up,
            down,
            core=core,
            rule=RULE,
            detail=f"ranks {rank_out} and {rank_in} of {min(layer.shape)}, relative error {error:.4g}",
        )
        rank, parameters = min(rank_out, rank_in), self._parameters(layer)
        if known is None:
            record = factored(layer, rank, parameters, weight_error=error)
        else:
            simplest = relative(plain_truncation_energy(exact, known.inputs.total, rank), rank)
            record = replace(known.record(layer, weight, product, rank, parameters), baseline_error=simplest)
        choice.record(layer, record, done=done)

    def _kernel_ranks(self, kernel: Convolution) -> tuple[int, int]:
        most = kernel.shape[0], kernel.shape[1]
        given = (self.rank, self.rank) if isinstance(self.rank, int) else ranks_within(self.rank, kernel.shape)
        return min(self.rank_out or given[0], most[0]), min(self.rank_in or given[1], most[1])

    def _reason_against_kernel(self, program: Program, kernel: Convolution) -> str | None:
        reason = kernel.structural_reason()
        if reason is not None:
            return reason
        weight = program.weight(kernel.weight)
        if weight.is_meta:
            raise GraphError(
                "GRAPH-002",
                f"the weight {kernel.weight!r} is on the meta device: it has a shape but no values to factor.",
                where=describe(kernel.readers[0]),
                fix="load the checkpoint with its weights, then capture again.",
            )
        ranks, shape = self._kernel_ranks(kernel), "x".join(map(str, kernel.shape))
        if not all(ranks):
            return f"rank={self.rank:g} of {shape} leaves no rank"
        if tucker_parameters(kernel.shape, *ranks) >= kernel.parameters:
            return f"ranks {ranks[0]} and {ranks[1]} of {shape} save nothing"
        return None if torch.isfinite(weight).all() else "the weight is not finite"


def _three_factor_rank(keep: float, out: int, in_: int) -> int:
    """The largest R with R (out + in + R) <= keep * out * in."""
    both = out + in_
    return math.floor((math.sqrt(both * both + 4 * keep * out * in_) - both) / 2 + 1e-9)
