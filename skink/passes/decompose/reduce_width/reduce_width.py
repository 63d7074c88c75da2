"""Make a model narrower inside, without a single operator more.

    feed-forward    y = down(act(gate(x)) * up(x))      fewer inner channels; down makes up for those gone
    value-output    y = sum over heads of o_h A_h v     fewer features of each value head, in the best basis
    query-key       s = q k^T / sqrt(D)                 fewer features of each query and key head; rotary pairs whole

Each pair of weights meets in a width that nothing else sees, so that a smaller width is a smaller model and no further
product. The prices of all widths come from both sides of the weights, in nats per token, and one budget is shared out
over all layers and parts. Exactness: approximate; the rise of the loss is predicted and recorded.
Source: MoDeGPT (arXiv 2408.09632), with prices from the Kronecker-factored Fisher (arXiv 1503.05671).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, fx

from skink.budget import Unit, Workload, pricing
from skink.errors import OptionError, check_range
from skink.graph.calibration import Covariance, stream_covariances
from skink.graph.gradients import Moments, stream_moments
from skink.graph.passes import Context, LayerRecord, Pass, PassResult
from skink.graph.program import Program, Stage
from skink.graph.rewriter import Rewriter
from skink.passes.decompose.reduce_width.attention import Attention
from skink.passes.decompose.reduce_width.edits import Heads, narrow_attention, narrow_feed_forward
from skink.passes.decompose.reduce_width.finding import find_parts, input_means
from skink.passes.decompose.reduce_width.parts import (
    FeedForwardPart,
    Kind,
    Method,
    Part,
    ValuePart,
    branch_of,
    heads_of,
    means,
)
from skink.passes.decompose.reduce_width.scores import ScorePart
from skink.passes.decompose.reduce_width.sharing import (
    block_influence,
    budget_for,
    by_loss,
    by_share,
    widths_on_offer,
)
from skink.passes.decompose.selection import LinearLayer, choose_layers, notes_on_few_tokens

Allocation = Literal["global", "uniform", "block-influence"]
KINDS: tuple[Kind, ...] = ("feed-forward", "value-output", "query-key")


@dataclass(frozen=True)
class ReduceWidth(Pass):
    """Options of the pass.

    Args:
        keep: share of the budget's unit that the linear layers among the targets take afterwards, in (0, 1]; layers and
            parts that stay as they are count in full.
        parts: which widths may shrink: `feed-forward`, `value-output`, `query-key`.
        method: what decides which channels go: `two-sided`, the rise of the loss; `one-sided`, the error of the block's
            output, each channel made up for by those left; `leverage`, ridge leverage scores, as MoDeGPT does. The last
            two choose scores' features by their size.
        allocation: `global` shares the budget out so that the predicted loss rises least; `uniform` gives all parts the
            same share of their width; `block-influence` takes more from layers that change little, as MoDeGPT does.
        floor: least share of a width that stays, in [0, 1].
        multiple_of: widths are multiples of it, or stay as they are.
        budget: what `keep` counts: `params`, `bytes`, `flops`, or `latency`, in measured seconds of the layers.
        workload: what latency is measured on, batch x prompt + output.
        smoothing: of block influence, > 0; larger is more even.
        targets: shell-style patterns on layers' qualified names; empty: every linear layer but the output head. A part
            shrinks only where all of its layers are among them.
        ignore: patterns of layers to leave alone.
    """

    keep: float = 0.8
    parts: tuple[Kind, ...] = KINDS
    method: Method = "two-sided"
    allocation: Allocation = "global"
    floor: float = 0.25
    multiple_of: int = 8
    budget: Unit = "params"
    workload: str = "1x128+64"
    smoothing: float = 1.0
    targets: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()

    name: ClassVar[str] = "reduce-width"
    summary: ClassVar[str] = "narrow feed-forward blocks and attention heads, without further operators"
    requires: ClassVar[Stage] = Stage.CANONICAL
    yields: ClassVar[Stage | None] = Stage.REWRITTEN
    exactness: ClassVar[Literal["exact", "approximate"]] = "approximate"

    def __post_init__(self) -> None:
        check_range("reduce-width.keep", self.keep, low=0.0, high=1.0, open_low=True)
        check_range("reduce-width.floor", self.floor, low=0.0, high=1.0)
        check_range("reduce-width.multiple_of", self.multiple_of, low=1, high=1 << 20)
        check_range("reduce-width.smoothing", self.smoothing, low=0.0, high=1e9, open_low=True)
        Workload.parse(self.workload)
        unknown = [part for part in self.parts if part not in KINDS]
        if unknown or not self.parts:
            raise OptionError(
                "OPTION-002",
                f"reduce-width.parts={list(self.parts)} is not made of {', '.join(KINDS)}.",
                fix="name one or more of them.",
            )

    @property
    def needs_calibration(self) -> bool:
        return True

    @property
    def _needs_gradients(self) -> bool:
        return self.method == "two-sided" or self.allocation == "global"

    def run(self, program: Program, rewriter: Rewriter, context: Context) -> PassResult:
        """Narrow what the budget says.

        Raises:
            BudgetError: BUDGET-001 where the least widths are still too much.
            CalibrationError: CALIBRATION-001 to -004.
            GraphError: GRAPH-002 where weights are on the meta device.
            OptionError: OPTION-002 where targets match no layer.
        """
        windows = context.calibration_for(self.name)
        choice, notes = choose_layers(program, self.name, self.targets, self.ignore)
        counted = list(choice)
        parts = find_parts(program, choice, self.parts, self.method)
        records: dict[str, LayerRecord] = {}
        if parts and self.keep < 1.0:
            self._plan(program, parts, context, windows)
            widths = self._widths(program, parts, counted, windows, context.padding)
            chosen = {part: width for part, width in zip(parts, widths, strict=True) if width < part.width}
            book = self._cut(program, rewriter, chosen, context, windows)
            records, notes = book.records, [*notes, *book.notes]
        rewriter.finish()
        for layer in choice:
            if layer.weight in records:
                choice.record(layer, records[layer.weight])
            else:
                choice.leave(layer, "the budget leaves its width as it is")
        return choice.result(rewriter, notes)

    def _plan(self, program: Program, parts: Sequence[Part], context: Context, windows: Tensor) -> None:
        """Price the widths of every part."""
        names = list(dict.fromkeys(name for part in parts for name in part.prices_need))
        biased = {part.query.weight: part for part in parts if isinstance(part, ScorePart) and part.biased}
        for name, mean in input_means(program, biased, windows, context.padding).items():
            biased[name].mean = mean
        stream: Iterator[Mapping[str, Moments] | Mapping[str, Covariance]]
        options: dict[str, Any] = {"progress": context.progress, "padding": context.padding}
        if self._needs_gradients:
            stream = stream_moments(program, windows, names, seed=context.seed, **options)
        else:
            stream = stream_covariances(program, windows, names, **options)
        waiting, found = list(parts), dict[str, Any]()
        for some in stream:
            found.update(some)
            for part in [part for part in waiting if found.keys() >= set(part.prices_need)]:
                inputs, gradients = means({name: found[name] for name in part.prices_need})
                part.plan(program, inputs, gradients if self._needs_gradients else None)
                waiting.remove(part)
            needed = {name for part in waiting for name in part.prices_need}
            found = {name: moments for name, moments in found.items() if name in needed}

    def _widths(
        self, program: Program, parts: Sequence[Part], counted: Sequence[LinearLayer], windows: Tensor, padding: Any
    ) -> list[int]:
        prices = pricing(self.budget, program, Workload.parse(self.workload))
        offers = [widths_on_offer(part, multiple=self.multiple_of, floor=self.floor) for part in parts]
        budget, fixed = budget_for(parts, counted, prices, self.keep)
        if self.allocation == "global":
            return by_loss(parts, offers, prices, budget, fixed=fixed)
        importance = [0.0] * len(parts)
        if self.allocation == "block-influence":
            importance = [found / self.smoothing for found in block_influence(program, parts, windows, padding)]
        return by_share(parts, offers, prices, budget, importance, fixed=fixed)

    def _cut(
        self, program: Program, rewriter: Rewriter, chosen: Mapping[Part, int], context: Context, windows: Tensor
    ) -> "_Book":
        """Narrow the chosen parts."""
        book = _Book(program)
        blocks: dict[fx.Node, dict[str, Part]] = {}
        for part in chosen:
            blocks.setdefault(part.edited, {})[part.kind] = part
        waiting = list(blocks.values())
        names = list(dict.fromkeys(part.cut_needs for part in chosen if part.cut_needs))
        done = dict[str, Covariance]()
        if names:
            for done in stream_covariances(program, windows, names, padding=context.padding):
                inputs, _ = means(done)
                book.count(done)
                for block in [block for block in waiting if _ready(block, inputs)]:
                    waiting.remove(block)
                    self._narrow(program, rewriter, block, chosen, inputs, book)
        for block in waiting:
            self._narrow(program, rewriter, block, chosen, {}, book)
        return book

    def _narrow(
        self,
        program: Program,
        rewriter: Rewriter,
        block: Mapping[str, Part],
        chosen: Mapping[Part, int],
        inputs: Mapping[str, Tensor],
        book: "_Book",
    ) -> None:
        """One edit: a feed-forward block, or values and scores of an attention together."""
        before = {layer.weight: layer for part in block.values() for layer in part.layers}
        detail = ", ".join(f"{part.kind} {chosen[part]} of {part.width}" for part in block.values())
        errors: dict[str, float] = {}
        first = next(iter(block.values()))
        if isinstance(first, FeedForwardPart):
            new, errors[first.lead.weight] = first.cut(program, chosen[first], inputs[first.lead.weight])
            edited = narrow_feed_forward(program, rewriter, first.block, new, chosen[first], detail)
        else:
            edited = self._narrow_heads(program, rewriter, block, chosen, inputs, errors, detail)
        if edited:
            book.write(before, {part: chosen[part] for part in block.values()}, errors)

    def _narrow_heads(
        self,
        program: Program,
        rewriter: Rewriter,
        block: Mapping[str, Part],
        chosen: Mapping[Part, int],
        inputs: Mapping[str, Tensor],
        errors: dict[str, float],
        detail: str,
    ) -> bool:
        heads: dict[str, Heads] = {}
        output, table = None, None
        attention: Attention | None = None
        for part in block.values():
            if isinstance(part, ScorePart):
                attention = part.attention
                found, table = part.cut(program, chosen[part])
                heads.update(found)
            elif isinstance(part, ValuePart):
                attention = part.attention
                heads["value"], output, error = part.cut(program, chosen[part], inputs[part.lead.weight])
                errors[part.lead.weight] = error
        if attention is None:
            return False
        if attention.fused:
            names = ("query", "key", "value")
            heads = {name: heads.get(name) or heads_of(program, branch_of(attention, name)) for name in names}
        return narrow_attention(program, rewriter, attention, heads, output, table, detail)


class _Book:
    """The records of narrowed layers, by weight, and what text they saw."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self.records: dict[str, LayerRecord] = {}
        self._seen: list[tuple[str, int, int]] = []

    @property
    def notes(self) -> list[str]:
        """Where there is less text than a fit needs."""
        return notes_on_few_tokens(self._seen, "what the text does not tell apart is fitted to chance.")

    def count(self, found: Mapping[str, Covariance]) -> None:
        """Put down how much text there is for each."""
        self._seen += [(name.removesuffix(".weight"), each.tokens, len(each.total)) for name, each in found.items()]

    def write(self, layers: Mapping[str, LinearLayer], widths: Mapping[Part, int], errors: Mapping[str, float]) -> None:
        """Put down an edit; what it loses stands with the layer that leads each part, and 0 with the others."""
        losses: dict[str, float] = {}
        for part, width in widths.items():
            if part.losses is not None:
                losses.update({layer.weight: 0.0 for layer in part.layers if layer.weight not in losses})
                losses[part.lead.weight] += float(part.losses[width])
        for name, layer in layers.items():
            self.records[name] = LayerRecord(
                name=layer.name,
                kind="linear",
                shape=layer.shape,
                decision="narrowed",
                parameters_before=layer.parameters,
                parameters_after=self._program.weight(name).numel(),
                predicted_error=errors.get(name),
                predicted_loss=losses.get(name),
            )


def _ready(block: Mapping[str, Part], inputs: Mapping[str, Tensor]) -> bool:
    needs = {part.cut_needs for part in block.values() if part.cut_needs}
    return bool(needs) and needs <= inputs.keys()
