"""One run of the pass `low-rank`: statistics, factors, ranks, and the edits."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

from torch import Tensor, fx

from skink.budget import Pricing, pricing
from skink.budget.target import LatencyPricing
from skink.graph.objective import loss_unit
from skink.graph.passes import Context, PassResult
from skink.graph.pooling import rows_per_text
from skink.graph.program import Program
from skink.graph.rewriter import Rewriter
from skink.passes.decompose.factorize.factorize import relative, weight_error
from skink.passes.decompose.factorize.pivoted import pivoted
from skink.passes.decompose.low_rank.candidates import (
    Candidate,
    Known,
    Recipe,
    Stack,
    candidate,
    groups,
    stream_metrics,
)
from skink.passes.decompose.low_rank.measured import measured_losses
from skink.passes.decompose.low_rank.ranks import Group, Ranking, best_ranks, uniform_ranks
from skink.passes.decompose.low_rank.refit import refit
from skink.passes.decompose.replacement import (
    factored,
    free_prefix,
    replace_by_factors,
    replace_by_pivots,
    replace_by_shared_input,
)
from skink.passes.decompose.selection import Choice, LinearLayer, notes_on_few_tokens

Allocation = Literal["global", "uniform", "measured"]


class Run:
    """Factors the layers of `choice`, and keeps the book about them.

    Args:
        program: what is edited, through `rewriter`.
        rewriter: on behalf of the pass.
        context: calibration text and progress.
        choice: which layers.
        recipe: how to factor.
        ranking: how ranks are counted.
        allocation: who gets which rank.
        share: whether layers that read one input may be factored as one.
        fit: whether first factors are fitted anew to what compressed layers deliver, see `low_rank.refit`.
    """

    def __init__(
        self,
        program: Program,
        rewriter: Rewriter,
        context: Context,
        choice: Choice,
        *,
        recipe: Recipe,
        ranking: Ranking,
        allocation: Allocation,
        share: bool,
        fit: bool,
    ) -> None:
        self._program, self._rewriter, self._context, self._choice = program, rewriter, context, choice
        self._recipe, self._ranking, self._allocation, self._share = recipe, ranking, allocation, share
        self._progress = _Progress(context, len(choice))
        self._done: list[tuple[Stack, int, list[float | None]]] = []
        self._seen: list[tuple[str, int, int]] = []
        # The program as it was, and the first factor of each candidate with a weight that read the same.
        self._dense = program.clone() if fit else None
        self._first: dict[str, str] = {}

    def result(self, notes: Sequence[str]) -> PassResult:
        """Do it all, and say so."""
        counted = list(self._choice)
        prices = self._ranking.prices
        fixed = 0.0
        for layer in counted:
            reason = self._reason_against(layer)
            if reason is not None:
                self._choice.refuse(layer, reason)
                fixed += prices.linear(*layer.shape, uses=len(layer.readers))
        found = groups(list(self._choice), share=self._share)
        if found:
            ranking = replace(self._ranking, fixed=fixed)
            plans = self._uniform(found, ranking) if self._allocation == "uniform" else self._best(found, ranking)
            # As they come: where ranks are known beforehand, a layer's statistics go before the next one's are there.
            for entry, rank in plans:
                self._settle(entry, rank)
        self._rewriter.finish()
        fitted = []
        if self._dense is not None and self._first:
            changed, factors = refit(self._dense, self._program, self._first, self._context)
            others = "; for the others, the text tells nothing better" if changed < factors else ""
            fitted = [f"refit: {changed} of {factors} factors{others}."]
        few = notes_on_few_tokens(self._seen, "directions that they do not reach are kept by the weight's size.")
        return self._choice.result(self._rewriter, [*notes, *few, *fitted, *self._summary(counted)])

    def _reason_against(self, layer: LinearLayer) -> str | None:
        _, ranks = self._ranking.curve(Stack((layer,)))
        if len(ranks) <= 1:
            return f"no rank of {layer.shape[0]}x{layer.shape[1]} saves anything"
        windows, inputs = self._context.calibration, layer.readers[0].args[0]
        if self._recipe.method == "plain" or windows is None or not isinstance(inputs, fx.Node):
            return None
        each = rows_per_text(self._program, inputs)
        if each is None or each * len(windows) >= layer.shape[1]:
            return None
        return f"too little text: {each * len(windows)} rows, by text, for {layer.shape[1]} inputs"

    def _uniform(self, found: Sequence[tuple[LinearLayer, ...]], ranking: Ranking) -> Iterator[tuple[Candidate, int]]:
        ranks = uniform_ranks([Stack(group) for group in found], ranking)
        for stack, rank in ranks.items():
            for layer in stack.layers if rank == 0 else ():
                self._choice.refuse(layer, f"keep={ranking.keep:g} takes nothing away")
        wanted = [group for group in found if ranks[Stack(group)]]
        for group, known in self._known(wanted):
            stack = Stack(group)
            made = candidate(self._program, stack, known, self._recipe, ranks[stack], solver="auto")
            yield made, ranks[stack]
            self._progress.factored(len(group))

    def _best(self, found: Sequence[tuple[LinearLayer, ...]], ranking: Ranking) -> Iterator[tuple[Candidate, int]]:
        made: list[Group] = []
        for group, known in self._known(found):
            single = tuple(
                candidate(self._program, stack, [entry], self._recipe, ranking.most(stack))
                for stack, entry in zip(map(Stack, ((layer,) for layer in group)), known, strict=True)
            )
            joint = None
            if len(group) > 1:
                stack = Stack(group)
                joint = candidate(self._program, stack, known, self._recipe, ranking.most(stack))
            made.append(Group(single, joint))
            self._progress.factored(len(group))
        if self._allocation == "measured":
            made = self._measured(made, ranking)
        yield from best_ranks(made, ranking)

    def _measured(self, made: Sequence[Group], ranking: Ranking) -> list[Group]:
        entries = [entry for group in made for entry in group.single]
        losses = measured_losses(self._program, entries, ranking.keep, self._context)
        return [Group((replace(entry, losses=loss),)) for entry, loss in zip(entries, losses, strict=True)]

    def _known(self, found: Sequence[tuple[LinearLayer, ...]]) -> Iterator[tuple[tuple[LinearLayer, ...], list[Known]]]:
        """Groups, as soon as the statistics of all their layers are there."""
        waiting = {layer.weight: group for group in found for layer in group}
        seen: dict[str, Known] = {}
        for some in stream_metrics(
            self._program, list(waiting), self._recipe, self._context, self._progress.calibrated
        ):
            seen.update(some)
            some.clear()
            for group in dict.fromkeys(waiting[name] for name in seen):
                if all(layer.weight in seen for layer in group):
                    # Taken out: their memory is free once the group is done.
                    yield group, [seen.pop(layer.weight) for layer in group]

    def _settle(self, entry: Candidate, rank: int) -> None:
        """Replace the layers of a candidate by its factors at a rank; 0: leave them dense."""
        stack = entry.stack
        if rank == 0:
            for layer in stack.layers:
                self._choice.leave(layer, "the budget has better uses: every rank would lose more for what it saves")
            return
        up, down = entry.factors.at(rank)
        error = None if entry.output is None else relative(entry.output, rank)
        losses: list[float | None] = [None] * len(stack.layers)
        if entry.layer_losses is not None:
            losses = [float(loss[rank]) for loss in entry.layer_losses]
        errors = [
            weight_error(self._program.weight(layer.weight), rows, down)
            for layer, rows in zip(stack.layers, stack.split(up), strict=True)
        ]
        said = f"rank {rank} of {min(stack.shape)}, relative error {max(errors) if error is None else error:.4g}"
        if len(stack.layers) > 1:
            said += f", {len(stack.layers)} layers as one"
        done, sizes = self._replace(stack, up, down, said)
        for layer, size, loss, changed in zip(stack.layers, sizes, losses, errors, strict=True):
            self._choice.record(
                layer,
                factored(
                    layer,
                    rank,
                    size,
                    predicted_error=error,
                    weight_error=changed,
                    baseline_error=None if entry.baseline is None else relative(entry.baseline, rank),
                    predicted_loss=loss,
                ),
                done=done,
            )
        if done:
            self._done.append((stack, rank, losses))
        if entry.tokens is not None:
            self._seen.append((stack.name, entry.tokens, stack.shape[1]))

    def _replace(self, stack: Stack, up: Tensor, down: Tensor, detail: str) -> tuple[bool, list[int]]:
        """Edit the graph; whether the limit allowed it, and the parameters that each layer has then.

        What is shared counts for the first.
        """
        program, rewriter, layers = self._program, self._rewriter, stack.layers
        first = free_prefix(program, layers[0].weight) + ("kept.weight" if self._ranking.pivoted else "down.weight")
        self._first[first] = layers[0].weight
        if self._ranking.pivoted:
            form = pivoted(up, down)
            done = replace_by_pivots(program, rewriter, layers, form, detail=detail)
            return done, [form.numbers] + [0] * (len(layers) - 1)
        ups = [rows.contiguous() for rows in stack.split(up)]
        if len(layers) > 1:
            done = replace_by_shared_input(program, rewriter, layers, ups, down, detail=detail)
        else:
            done = replace_by_factors(program, rewriter, layers[0], up, down, detail=detail)
        return done, [ups[0].numel() + down.numel(), *(rows.numel() for rows in ups[1:])]

    def _summary(self, counted: Sequence[LinearLayer]) -> list[str]:
        """What was kept, in every unit, and what that should cost."""
        if not self._done:
            return []
        settled = {layer: (stack, rank) for stack, rank, _ in self._done for layer in stack.layers}
        units: dict[str, Pricing] = {
            "parameters": pricing("params", self._program),
            "bytes": pricing("bytes", self._program),
            "multiply-accumulates": pricing("flops", self._program),
        }
        if isinstance(self._ranking.prices, LatencyPricing):
            units["measured seconds"] = self._ranking.prices
        shares = []
        for name, prices in units.items():
            before = sum(prices.linear(*layer.shape, uses=len(layer.readers)) for layer in counted)
            after = sum(
                prices.linear(*layer.shape, uses=len(layer.readers)) for layer in counted if layer not in settled
            )
            after += sum(
                prices.low_rank(*stack.shape, rank, pivoted=self._ranking.pivoted, uses=stack.uses)
                for stack, rank, _ in self._done
            )
            shares.append(f"{after / before:.4f} of the {name}")
        losses = [loss for _, _, found in self._done for loss in found if loss is not None]
        predicted = (
            f"; predicted rise of the loss: {math.fsum(losses):.4g} {loss_unit(self._program)}" if losses else ""
        )
        return [f"kept of {len(counted)} linear layers: {', '.join(shares)}{predicted}."]


class _Progress:
    """Steps of calibration and weights factored, as one count."""

    def __init__(self, context: Context, weights: int) -> None:
        self._report = context.progress
        self._weights = weights
        self._factored = 0
        self._steps = (0, 0)

    def calibrated(self, done: int, total: int) -> None:
        self._steps = (done, total)
        self._report(self._factored + done, self._weights + total)

    def factored(self, weights: int) -> None:
        self._factored += weights
        self.calibrated(*self._steps)
