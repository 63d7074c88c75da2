"""Replace linear layers by products of thin ones, as many numbers in all as a budget allows.

    y = x W^T + b   ->   y = (x down^T) up^T + b      W: [out, in], down: [R, in], up: [out, R]

What factors are best is told in `factorize`, what the pivoted form is in `factorize.pivoted`, how ranks are chosen in
`low_rank.ranks`. Exactness: approximate; what it costs is predicted and recorded.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from skink.budget import Unit, Workload, pricing
from skink.errors import OptionError, check_range
from skink.graph.objective import Labels
from skink.graph.passes import Context, Pass, PassResult
from skink.graph.program import Program, Stage
from skink.graph.rewriter import Rewriter
from skink.passes.decompose.factorize.metric import DAMPING
from skink.passes.decompose.low_rank.candidates import Method, Recipe
from skink.passes.decompose.low_rank.ranks import Ranking
from skink.passes.decompose.low_rank.run import Allocation, Run
from skink.passes.decompose.selection import choose_layers

Form = Literal["pivoted", "thin"]


@dataclass(frozen=True)
class LowRank(Pass):
    """Options of the pass.

    Args:
        keep: share of the budget's unit that the layers keep, all together, in (0, 1]; layers that stay dense count.
        method: `two-sided` loses the least of the text's likelihood, by what gradients say about each output;
            `whitened` the least of each layer's output on calibration text; `asvd` and `fisher` are published
            approximations of that; `plain`, the truncated SVD, loses the least of the weight, and needs no text.
        allocation: `global` compares the predicted loss of all ranks of all layers; `uniform` gives each the same
            share; `measured` compares losses measured one layer at a time. By default `global` where `two-sided`,
            otherwise `uniform`.
        form: `thin`: two factors; `pivoted`: rows of the product and what makes the others of them, which takes fewer
            numbers. By default `pivoted` where `two-sided`, otherwise `thin`.
        share_inputs: whether layers that read one input may share the factor that reads it: always where `uniform`,
            where it is better where `global`. By default on where `global`.
        floor: least rank that allocation may give, as a share of the rank at the uniform share; by default 0.5 where
            `measured`, otherwise 0.
        budget: what is counted: `params`, `bytes`, `flops` or `latency`.
        workload: batch x prompt + output, for `latency`.
        multiple_of: ranks are multiples of it; 0: of a power of two up to 64 where layers are wide enough.
        targets: shell-style patterns on layers' qualified names, as `*.mlp.*`; empty: every linear layer but the output
            head.
        ignore: patterns of layers to leave alone.
        left_damping: added to the metric of outputs, as a share of its mean diagonal; by default 0.01 where
            `two-sided`.
        right_damping: likewise of inputs.
        alpha: exponent of the mean size of inputs, for `asvd`.
        labels: what gradients are of: labels `sampled` from the model's own predictions, or the `text`'s next tokens.
        samples: labels drawn for each token.
        refit: whether factors are fitted anew, layer by layer, to what compressed layers before them deliver; for
            `two-sided`, where it is on by default, and `whitened`.
        baseline: whether to record what plain truncation would lose, which takes about as long again.
    """

    keep: float = 0.8
    method: Method = "two-sided"
    allocation: Allocation | None = None
    form: Form | None = None
    share_inputs: bool | None = None
    floor: float | None = None
    budget: Unit = "params"
    workload: str = "1x128+64"
    multiple_of: int = 0
    targets: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    left_damping: float | None = None
    right_damping: float = DAMPING
    alpha: float = 0.5
    labels: Labels = "sampled"
    samples: int = 1
    refit: bool | None = None
    baseline: bool = True

    name: ClassVar[str] = "low-rank"
    summary: ClassVar[str] = "replace linear layers by thin ones"
    requires: ClassVar[Stage] = Stage.CANONICAL
    yields: ClassVar[Stage | None] = Stage.REWRITTEN
    exactness: ClassVar[Literal["exact", "approximate"]] = "approximate"

    def __post_init__(self) -> None:
        check_range("low-rank.keep", self.keep, low=0.0, high=1.0, open_low=True)
        check_range("low-rank.multiple_of", self.multiple_of, low=0, high=1 << 20)
        check_range("low-rank.floor", self._floor, low=0.0, high=1.0)
        check_range("low-rank.left_damping", self.left_damping or 0.0, low=0.0, high=1.0)
        check_range("low-rank.right_damping", self.right_damping, low=0.0, high=1.0)
        check_range("low-rank.alpha", self.alpha, low=0.0, high=1.0)
        check_range("low-rank.samples", self.samples, low=1, high=1 << 16)
        Workload.parse(self.workload)
        if self.allocation == "global" and self.method != "two-sided":
            raise OptionError(
                "OPTION-002",
                f"low-rank.allocation=global does not go with method={self.method}.",
                why="it compares the loss that each layer's rank costs, and only two-sided predicts that.",
                fix="choose method=two-sided, or allocation=measured.",
            )
        if self.allocation == "measured" and self.share_inputs:
            raise OptionError(
                "OPTION-002",
                "low-rank.share_inputs does not go with allocation=measured.",
                why="what is measured is one layer alone.",
                fix="choose allocation=global or uniform.",
            )

        if self.refit and self.method not in ("two-sided", "whitened"):
            raise OptionError(
                "OPTION-002",
                f"low-rank.refit does not go with method={self.method}.",
                why="its factors are not the best for given inputs, so there is nothing to keep up with.",
                fix="choose method=two-sided or whitened.",
            )

    @property
    def needs_calibration(self) -> bool:
        return self.method != "plain" or self.allocation == "measured"

    def run(self, program: Program, rewriter: Rewriter, context: Context) -> PassResult:
        """Factor what is chosen.

        Raises:
            BudgetError: BUDGET-001 where the least ranks take more than `keep`.
            CalibrationError: CALIBRATION-001 to -004, see `stream_moments`.
            GraphError: GRAPH-002 where weights are on the meta device.
            OptionError: OPTION-002 where targets match no layer.
        """
        if self.needs_calibration:
            context.calibration_for(str(self))
        choice, notes = choose_layers(program, self.name, self.targets, self.ignore)
        prices = pricing(self.budget, program, Workload.parse(self.workload))
        ranking = Ranking(prices, self._form == "pivoted", self.multiple_of, self._floor, self.keep)
        run = Run(
            program,
            rewriter,
            context,
            choice,
            recipe=self._recipe,
            ranking=ranking,
            allocation=self._allocation,
            share=self._share,
            fit=self._fit,
        )
        return run.result(notes)

    @property
    def _allocation(self) -> Allocation:
        return self.allocation or ("global" if self.method == "two-sided" else "uniform")

    @property
    def _form(self) -> Form:
        return self.form or ("pivoted" if self.method == "two-sided" else "thin")

    @property
    def _share(self) -> bool:
        return self._allocation == "global" if self.share_inputs is None else self.share_inputs

    @property
    def _fit(self) -> bool:
        return self.method == "two-sided" if self.refit is None else self.refit

    @property
    def _floor(self) -> float:
        return self.floor if self.floor is not None else (0.5 if self._allocation == "measured" else 0.0)

    @property
    def _recipe(self) -> Recipe:
        damping = self.left_damping
        if damping is None:
            damping = 0.01 if self.method == "two-sided" else DAMPING
        return Recipe(self.method, damping, self.right_damping, self.alpha, self.labels, self.samples, self.baseline)
