"""Let neighbouring layers share one basis of their inputs, and factor by itself what does not share.

    y_i = x_i W_i^T + b_i   ->   y_i = (x_i B^T) A_i^T + b_i       W_i: [out, in], B: [R, in], A_i: [out, R]

B is one weight that the layers of a group read. Where they see similar inputs through similar weights, a common basis
holds more of them than bases of their own in the same number of parameters. Exactness: approximate.
Source: Basis Sharing (Wang et al. 2024, arXiv 2410.03765); see `basis_sharing.factors` for the mathematics. New here
are gradients as a second metric, coefficients refitted to each layer's own inputs, and ranks, and whether to share at
all, by predicted loss.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from skink.budget import Curve, Pricing, Unit, Workload, allocate, pricing
from skink.errors import OptionError, check_range
from skink.graph.passes import Context, Pass, PassResult
from skink.graph.program import Program, Stage
from skink.graph.rewriter import Rewriter
from skink.passes.decompose.basis_sharing.factors import coefficients, shared_basis, shared_rank
from skink.passes.decompose.basis_sharing.groups import Plan, Prices, private_curve, shared_curve, sharing_groups
from skink.passes.decompose.basis_sharing.statistics import Statistics, stream_statistics
from skink.passes.decompose.factorize.factorize import factorize
from skink.passes.decompose.replacement import free_prefix, replace_by_factors
from skink.passes.decompose.selection import Choice, LinearLayer, choose_layers

RULE = "linear-to-shared-basis"

# Query, key, value, gate and up, alone or fused, as the families that Skink knows call them.
SHARED = (
    *("*q_proj", "*k_proj", "*v_proj", "*qkv_proj", "*query", "*key", "*value", "*query_key_value", "*c_attn"),
    *("*gate_proj", "*up_proj", "*gate_up_proj", "*fc1", "*c_fc", "*dense_h_to_4h", "intermediate.dense"),
)

STAYS = "the budget is better spent on leaving it whole"

Group = tuple[LinearLayer, ...]


@dataclass(frozen=True)
class BasisSharing(Pass):
    """Options of the pass.

    Args:
        keep: share of the budget that the layers in question may take afterwards, in (0, 1].
        group: neighbouring blocks that share a basis, 1 or more; at the end of the model there may be fewer.
        method: `two-sided` loses the least of the loss on calibration text, as gradients predict it; `whitened` the
            least of each layer's output, as in the paper.
        allocation: `global` shares the budget out over all layers by predicted loss, and lets layers share only where
            that is the cheaper way; `uniform` has every group of `shared` share at the same `keep`, as in the paper. By
            default `global` where `two-sided`, otherwise `uniform`.
        refit: whether each layer's coefficients are the best for its own inputs, or, as in the paper, for the sum of
            the group's.
        shared: shell-style patterns on names below a block of the tensors that share; others have factors of their own.
        targets: patterns on qualified names of what is factored; empty: every linear layer but the output head.
        ignore: patterns of layers to leave alone.
        budget: what `keep` counts: params, bytes, flops or latency. Sharing saves size, not work.
        workload: for latency, as `1x128+64`.
        multiple_of: ranks are multiples of it.
        damping: of the gradients' metric, as a share of its mean.
    """

    keep: float = 0.8
    group: int = 2
    method: Literal["two-sided", "whitened"] = "two-sided"
    allocation: Literal["global", "uniform"] | None = None
    refit: bool = True
    shared: tuple[str, ...] = SHARED
    targets: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    budget: Unit = "params"
    workload: str = "1x128+64"
    multiple_of: int = 1
    damping: float = 0.05

    name: ClassVar[str] = "basis-sharing"
    summary: ClassVar[str] = "let the same tensors of neighbouring layers share one basis"
    requires: ClassVar[Stage] = Stage.CANONICAL
    yields: ClassVar[Stage | None] = Stage.REWRITTEN
    exactness: ClassVar[Literal["exact", "approximate"]] = "approximate"

    def __post_init__(self) -> None:
        check_range("basis-sharing.keep", self.keep, low=0.0, high=1.0, open_low=True)
        check_range("basis-sharing.group", self.group, low=1, high=1 << 20)
        check_range("basis-sharing.multiple_of", self.multiple_of, low=1, high=1 << 20)
        check_range("basis-sharing.damping", self.damping, low=0.0, high=1.0)
        Workload.parse(self.workload)
        if self.allocation == "global" and self.method != "two-sided":
            raise OptionError(
                "OPTION-002",
                f"basis-sharing: allocation=global does not go with method={self.method}.",
                why="it compares losses between layers, and only method=two-sided predicts them.",
                fix="choose method=two-sided, or allocation=uniform.",
            )
        if not self._by_loss and self.budget not in ("params", "bytes"):
            raise OptionError(
                "OPTION-002",
                f"basis-sharing: allocation=uniform does not go with budget={self.budget}.",
                why="the paper's rule counts parameters.",
                fix="choose budget=params, or allocation=global.",
            )

    @property
    def needs_calibration(self) -> bool:
        return True

    @property
    def _by_loss(self) -> bool:
        return self.method == "two-sided" if self.allocation is None else self.allocation == "global"

    def run(self, program: Program, rewriter: Rewriter, context: Context) -> PassResult:
        """Factor what is chosen.

        Raises:
            BudgetError: BUDGET-001 where `keep` is too small for the layers that can be factored.
            CalibrationError: CALIBRATION-001 to -004, see `stream_covariances`.
            GraphError: GRAPH-002 where weights are on the meta device.
            OptionError: OPTION-002 where targets match no layer.
        """
        choice, notes = choose_layers(program, self.name, self.targets, self.ignore)
        groups = sharing_groups(tuple(choice), self.shared, self.group)
        plans = self._global(program, groups, context) if self._by_loss else self._uniform(groups, choice)
        for group, plan in list(plans.items()):
            if not plan.shared and not any(plan.ranks):
                for layer in group:
                    choice.leave(layer, STAYS)
                del plans[group]
        for group, statistics in self._statistics(program, tuple(plans), context, part=1):
            self._apply(program, rewriter, choice, group, plans[group], statistics)
        rewriter.finish()
        return choice.result(rewriter, notes)

    def _uniform(self, groups: tuple[Group, ...], choice: Choice) -> dict[Group, Plan]:
        plans = {}
        for group in groups:
            out, in_ = group[0].shape
            count, shape = len(group), f"{out}x{in_}" if len(group) == 1 else f"{len(group)} of {out}x{in_}"
            rank = shared_rank(self.keep, count, out, in_) // self.multiple_of * self.multiple_of
            most = shared_rank(1.0, count, out, in_)
            reason = None
            if rank == 0:
                reason = f"keep={self.keep:g} of {shape} leaves no rank"
            elif rank >= most:
                reason = f"rank {rank} of {shape} saves nothing; break-even is {most}"
            if reason is None:
                plans[group] = Plan(shared=rank) if count > 1 else Plan(ranks=(rank,))
                continue
            for layer in group:
                choice.refuse(layer, reason)
        return plans

    def _global(self, program: Program, groups: tuple[Group, ...], context: Context) -> dict[Group, Plan]:
        """The least predicted loss within the budget, over all ranks and over sharing or not."""
        prices_of = pricing(self.budget, program, Workload.parse(self.workload))
        dense = sum(prices_of.linear(*layer.shape, uses=len(layer.readers)) for group in groups for layer in group)
        prices = [
            self._price(program, group, statistics, prices_of)
            for group, statistics in self._statistics(program, groups, context, part=0)
        ]
        together = [entry.together() for entry in prices]
        chosen = allocate([curve for curve, _ in together], self.keep * dense)
        first = [plans[at] for (_, plans), at in zip(together, chosen, strict=True)]
        # Who shares is settled. What steps of whole groups left over goes to single layers and bases.
        curves: list[Curve] = []
        for entry, plan in zip(prices, first, strict=True):
            curves += [entry.shared[0]] if plan.shared and entry.shared else [curve for curve, _ in entry.private]
        final = iter(allocate(curves, self.keep * dense))
        plans = {}
        for entry, plan in zip(prices, first, strict=True):
            if plan.shared and entry.shared:
                plans[entry.layers] = Plan(shared=entry.shared[1][next(final)])
            else:
                plans[entry.layers] = Plan(ranks=tuple(ranks[next(final)] for _, ranks in entry.private))
        return plans

    def _price(self, program: Program, group: Group, statistics: dict[str, Statistics], prices: Pricing) -> Prices:
        private = []
        for layer in group:
            known = statistics[layer.weight]
            found = factorize(
                program.weight(layer.weight), left=known.output, right=known.inputs.total, left_damping=self.damping
            )
            losses = found.discarded * known.scale
            private.append(private_curve(layer, losses, prices, multiple=self.multiple_of))
        shared = None
        if len(group) > 1:
            most = shared_rank(1.0, len(group), *group[0].shape)
            basis, inputs = self._basis(program, group, statistics, most)
            losses = torch.zeros(len(basis) + 1, dtype=torch.float64, device=basis.device)
            for layer in group:
                known = statistics[layer.weight]
                own = known.inputs.total if self.refit else inputs / len(group)
                weight = program.weight(layer.weight)
                losses += coefficients(weight, basis, own, known.output).discarded * known.scale
            per_use = self.budget in ("flops", "latency")
            shared = shared_curve(group, losses, prices, per_use=per_use, multiple=self.multiple_of)
        return Prices(group, shared, tuple(private))

    def _basis(
        self, program: Program, group: Group, statistics: dict[str, Statistics], rank: int
    ) -> tuple[Tensor, Tensor]:
        """The basis of a group, and the sum of its layers' C."""
        known = [statistics[layer.weight] for layer in group]
        inputs = torch.stack([entry.inputs.total for entry in known]).sum(0)
        weights = [program.weight(layer.weight) for layer in group]
        outputs = [entry.output for entry in known]
        return shared_basis(weights, inputs, outputs, rank=rank, output_damping=self.damping), inputs

    def _apply(
        self,
        program: Program,
        rewriter: Rewriter,
        choice: Choice,
        group: Group,
        plan: Plan,
        statistics: dict[str, Statistics],
    ) -> None:
        if plan.shared:
            self._share(program, rewriter, choice, group, plan.shared, statistics)
            return
        for layer, rank in zip(group, plan.ranks, strict=True):
            if not rank:
                choice.leave(layer, STAYS)
                continue
            known, weight = statistics[layer.weight], program.weight(layer.weight)
            found = factorize(weight, left=known.output, right=known.inputs.total, rank=rank, left_damping=self.damping)
            up, down = found.at(rank)
            detail = f"rank {rank} of {min(layer.shape)}"
            done = replace_by_factors(program, rewriter, layer, up, down, rule=RULE, detail=detail)
            product = up.double() @ down.double()
            choice.record(layer, known.record(layer, weight, product, rank, up.numel() + down.numel()), done=done)

    def _share(
        self,
        program: Program,
        rewriter: Rewriter,
        choice: Choice,
        group: Group,
        rank: int,
        statistics: dict[str, Statistics],
    ) -> None:
        basis, inputs = self._basis(program, group, statistics, rank)
        ups = []
        for layer in group:
            own = statistics[layer.weight].inputs.total if self.refit else inputs
            ups.append(coefficients(program.weight(layer.weight), basis, own, None).at(rank))
        # Component i has as much norm in row i of the basis as, on average, in column i of the coefficients.
        length = torch.stack([up.square().sum(0) for up in ups]).mean(0).pow(0.25)
        length = torch.where(length > 0, length, 1.0)
        dtype = program.weight(group[0].weight).dtype
        down = (basis * length[:, None]).to(dtype).contiguous()
        name = f"{free_prefix(program, group[0].weight)}down.weight"
        for place, (layer, exact) in enumerate(zip(group, ups, strict=True)):
            weight, up = program.weight(layer.weight), (exact / length).to(dtype).contiguous()
            detail = f"rank {rank}, one basis for {len(group)} layers"
            done = replace_by_factors(program, rewriter, layer, up, name if place else down, rule=RULE, detail=detail)
            parameters = up.numel() + (0 if place else down.numel())
            product = up.double() @ down.double()
            choice.record(layer, statistics[layer.weight].record(layer, weight, product, rank, parameters), done=done)

    def _statistics(
        self, program: Program, groups: tuple[Group, ...], context: Context, *, part: int
    ) -> Iterator[tuple[Group, dict[str, Statistics]]]:
        """Each group with the statistics of all its layers, as soon as they are complete.

        Args:
            program: what is edited.
            groups: which; the caller may rewrite a group when it gets it.
            context: with the text.
            part: which of the two readings of the text this is, for the progress.
        """
        parts = 2 if self._by_loss else 1

        def progress(done: int, total: int) -> None:
            context.progress(done + (part * total if parts == 2 else 0), parts * total)

        group_of = {layer.weight: group for group in groups for layer in group}
        waiting: dict[Group, dict[str, Statistics]] = {group: {} for group in groups}
        for name, statistics in stream_statistics(program, list(group_of), self.method, context, progress=progress):
            group = group_of[name]
            waiting[group][name] = statistics
            if len(waiting[group]) == len(group):
                yield group, waiting.pop(group)
