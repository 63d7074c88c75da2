"""Train a model that passes have changed, on text and against the model that it was.

    loss = ce · CE(text) + kl · KL(original ‖ model) + ... + hidden · |h - h'|² / |h'|²

What trains, against what, and for how long are options; `skink.training.losses.objectives` has the terms with their
sources. Several of these passes in a recipe are stages. Exactness: approximate; no graph is edited.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from skink.errors import RangeError, check_range
from skink.graph.passes import Context, Pass, PassResult
from skink.graph.program import Program, Stage
from skink.graph.rewriter import Rewriter
from skink.passes.recover.options import ON_LOGITS, WITHIN, applies, check_together
from skink.training.loop.options import Precision, TrainOptions
from skink.training.loop.processes import Sharding
from skink.training.loop.schedule import Schedule
from skink.training.losses.objectives import Terms
from skink.training.weights.adapters import LoraOptions

# Tokens that are read where the recipe does not say how many.
TOKENS = 1_000_000
# So many evaluations where the recipe does not say when.
EVALUATIONS = 10
_FINAL = 0.1


@dataclass(frozen=True)
class Recover(Pass):
    """Options of the pass.

    Args:
        train: what trains: `all` weights; `new`, those that passes introduced; `lora`, adapters of low rank on linear
            layers.
        by: `model`: all at once, end to end; `layer`: each layer by itself, on what the original's layer receives and
            gives.
        ce: weight of the cross-entropy with the text; where no weight is given, 1 by model.
        kl: of the KL divergence from the original's distribution of the next token; where no weight is given, 1 by
            model.
        reverse_kl: of the divergence the other way.
        js: of the Jensen-Shannon divergence.
        hidden: of the relative squared error of layers' outputs; where no weight is given, 1 by layer.
        attention: of that of attention's outputs.
        temperature: of the distributions that kl, reverse_kl and js compare, > 0.
        at: shell-style patterns on modules' names, where `hidden` and `attention` compare; empty: at every layer.
        tokens: of text to read; 1,000,000 where `steps` is not given either.
        steps: to make, in place of `tokens`.
        batch: windows of a step, over all processes.
        micro_batch: most windows at once in a process; 0: all of its share. Less takes less memory.
        learning_rate: the highest.
        schedule: the way down from it.
        warmup: share of the steps in which it rises, 0 to 1.
        final: share of it that is left at the end, 0 to 1; by default 0.1.
        weight_decay: decoupled, of matrices.
        beta1, beta2, epsilon: of AdamW.
        clip: largest norm of a step's gradient; 0: any.
        precision: that products are computed in; what trains is held in float32.
        gradient_checkpointing: keep less for the way back and compute it again: less memory, a third more time.
        sharding: `full` spreads weights, gradients and optimizer state over the processes.
        evaluate_every: tokens between evaluations on held-out text, the best weights of which stay; 0: none. By default
            a tenth of all that is read, but no fewer than there are to judge by.
        patience: evaluations without a better one after which training ends; 0: it never does early.
        checkpoint_every: tokens between checkpoints, where there is a folder for them.
        layers_at_once: layers that train in one reading of the text, by layer; 0: all of them. More is quicker and
            takes more memory.
        rank: of adapters.
        alpha: what adapters add is scaled by alpha / rank.
        dropout: share of an adapter's inputs left out while it trains.
        targets: patterns of linear layers that get adapters; empty: all but the output head.
        variant: `lora`, `rslora` (scaled by alpha / sqrt(rank)) or `dora`.
        merge: add adapters to the weights at the end.
        adapter: folder for adapters that are not merged, in PEFT's form.
        ignore: patterns of weights or layers that do not train.
    """

    train: Literal["all", "new", "lora"] = "all"
    by: Literal["model", "layer"] = "model"
    ce: float | None = None
    kl: float | None = None
    reverse_kl: float | None = None
    js: float | None = None
    hidden: float | None = None
    attention: float | None = None
    temperature: float = 1.0
    at: tuple[str, ...] = ()
    tokens: int | None = None
    steps: int | None = None
    batch: int = 8
    micro_batch: int = 0
    learning_rate: float = 1e-4
    schedule: Schedule = "cosine"
    warmup: float = 0.05
    final: float | None = None
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    clip: float = 1.0
    precision: Precision = "float32"
    gradient_checkpointing: bool = False
    sharding: Sharding = "none"
    evaluate_every: int | None = None
    patience: int = 0
    checkpoint_every: int = 200_000
    layers_at_once: int = 1
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ()
    variant: Literal["lora", "rslora", "dora"] = "lora"
    merge: bool = True
    adapter: str = ""
    ignore: tuple[str, ...] = ()

    name: ClassVar[str] = "recover"
    summary: ClassVar[str] = "train what passes have changed, on text and against the original"
    requires: ClassVar[Stage] = Stage.CANONICAL
    exactness: ClassVar[Literal["exact", "approximate"]] = "approximate"

    def __post_init__(self) -> None:
        check_range("recover.layers_at_once", self.layers_at_once, low=0, high=1 << 20)
        check_together(self)
        try:
            # What is out of range is refused by those who use it.
            self.terms()
            self.train_options(seed=0, length=1)
            self.lora()
        except RangeError as error:
            raise error.of(self.name) from None

    @property
    def needs_original(self) -> bool:
        return self.train == "new" or self.terms().needs_teacher

    def check_start(self, program: Program, original: Program) -> None:
        from skink.training.losses.student import check_fit

        check_fit(program, original, self.terms())

    def training_tokens(self, length: int) -> int:
        if self.steps is not None:
            return self.steps * self.batch * length
        return TOKENS if self.tokens is None else self.tokens

    def resolved(self) -> "Recover":
        losses: dict[str, Any] = {name: weight or None for name, weight in self.losses().items()}
        tokens = None if self.steps is not None else self.training_tokens(1)
        final = _FINAL if self.final is None and self.schedule != "constant" else self.final
        return replace(self, **losses, tokens=tokens, final=final)

    def applies(self, option: str) -> bool:
        return applies(self, option)

    def losses(self) -> dict[str, float]:
        """The weight of every term; where none is given, those that go with `by`."""
        given = {name: getattr(self, name) for name in (*ON_LOGITS, *WITHIN)}
        if all(weight is None for weight in given.values()):
            given |= {"hidden": 1.0} if self.by == "layer" else {"ce": 1.0, "kl": 1.0}
        return {name: weight or 0.0 for name, weight in given.items()}

    def terms(self) -> Terms:
        """The loss."""
        return Terms(**self.losses(), temperature=self.temperature)

    def train_options(self, *, seed: int, length: int, held_out: int = 1) -> TrainOptions:
        """How to train on windows of `length` tokens, with `held_out` tokens to judge by."""
        every = self.evaluate_every
        if every is None:
            every = max(held_out, self.training_tokens(length) // EVALUATIONS)
        return TrainOptions(
            tokens=None if self.steps is not None else self.training_tokens(length),
            steps=self.steps,
            batch=self.batch,
            micro_batch=self.micro_batch,
            learning_rate=self.learning_rate,
            schedule=self.schedule,
            warmup=self.warmup,
            final=_FINAL if self.final is None else self.final,
            weight_decay=self.weight_decay,
            beta1=self.beta1,
            beta2=self.beta2,
            epsilon=self.epsilon,
            clip=self.clip,
            precision=self.precision,
            evaluate_every=0 if self.by == "layer" else every,
            patience=self.patience,
            checkpoint_every=self.checkpoint_every,
            seed=seed,
            sharding=self.sharding,
        )

    def lora(self) -> LoraOptions:
        """What adapters are like."""
        return LoraOptions(self.rank, self.alpha, self.dropout, self.targets, self.ignore, self.variant)

    def run(self, program: Program, rewriter: Rewriter, context: Context) -> PassResult:
        """Train the program's weights.

        Raises:
            RecoveryError: RECOVER-001 nothing to train, -002 text that is judged by too, -003 a loss that is not
                finite, -004 checkpoints that cannot be read, -005 no text, -006 another teacher, -007 no places to
                compare, -010 weights beyond their dtype, -011 an adapter that cannot be.
            OptionError: OPTION-002 for a loss that the model has not.
        """
        from skink.passes.recover.training import Training

        return Training(self, program, context).result()
