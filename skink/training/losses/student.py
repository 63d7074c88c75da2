"""`Student`: a program as a module that trains, with the loss against the text and against the program it came from."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, get_args

import torch
from torch import Tensor, fx, nn

from skink.errors import GraphError, OptionError, RecoveryError, suggest
from skink.graph.dtypes import with_dtype
from skink.graph.output_heads import results_by_name
from skink.graph.program import PADDING_INPUT, Input, Program
from skink.kernels import ATTENTION
from skink.training.loop.breakdown import is_finite
from skink.training.loop.options import Precision
from skink.training.losses.objectives import Terms, counted_positions, logit_sums
from skink.training.losses.places import corresponding, holds_tokens, relative_error
from skink.training.losses.segments import LOW, ModuleWeights, Runs, StoredWeights

aten = torch.ops.aten


class Student(nn.Module):
    """A program in training: `student(**inputs)` gives its loss.

    The child `model` is the program as `Program.module` emits it; its parameters train, and layers of it may be
    replaced (PEFT). The teacher is no child: it runs on `original`'s own weights, without gradients and only where a
    term asks for it, and moves along when the module is moved to another device.

    Args:
        program: the student, not lowered; its tensors are left alone.
        original: the teacher, a canonical program; None where the text alone teaches (`ce`).
        terms: the loss.
        precision: float32: everything is computed in at least float32, weights in half precision are held in float32
            by the student and read as float32 from the teacher. bfloat16, float16: products are computed in it, by
            autocast, and weights stay in the dtype that they are stored in.
        checkpointing: keep less for the backward pass, and compute it anew (`Segments`).
        patterns: places that `hidden` and `attention` compare, by modules' names (`skink.training.losses.places`).
        copy: give the module tensors of its own. Without, those that need not be cast are the program's: for a caller
            who gives what trains a tensor of its own, as `choose_trainable` does.

    Raises:
        OptionError: OPTION-002 for an unknown precision, and for terms that this model has no logits for.
        RecoveryError: RECOVER-006 where the teacher is missing or takes other inputs or another vocabulary, -007 where
            no place of both corresponds.
    """

    def __init__(
        self,
        program: Program,
        original: Program | None,
        terms: Terms,
        *,
        precision: Precision = "float32",
        checkpointing: bool = False,
        patterns: Sequence[str] = (),
        copy: bool = True,
    ) -> None:
        super().__init__()
        if precision not in get_args(Precision):
            raise OptionError(
                "OPTION-002", f"precision={precision!r} is unknown.", fix=suggest(precision, get_args(Precision))
            )
        _check_logits(program, terms)
        self.terms, self.precision = terms, precision
        self.model = program.module(copy=False)
        _own_tensors(self.model, widen=precision == "float32", copy=copy)
        self._names = tuple(entry.name for entry in program.inputs)
        self._tokens = main_input(program).name
        self._predicts = _logits(program) is not None
        student = _runnable(program)
        wanted, exact = [node for node in [_logits(student)] if node is not None and terms.on_logits], list[fx.Node]()
        self._teacher: StoredWeights | None = None
        self._places: dict[str, int] = {}
        if terms.needs_teacher:
            original = _fitting(original, program)
            teacher = _runnable(original)
            exact += [node for node in [_logits(teacher)] if node is not None and terms.compares_logits]
            for kind in terms.by_layer:
                pairs = corresponding(teacher, student, kind, patterns)
                exact += [one for one, _ in pairs]
                wanted += [two for _, two in pairs]
                self._places[kind] = len(pairs)
            self._teacher = StoredWeights(original)
            self._teacher_run = Runs(teacher, exact, precision=precision)
        self._run = Runs(student, wanted, precision=precision, recompute=checkpointing)
        stored = {name for name, tensor in program.weights() if tensor.is_floating_point()} - program.buffers
        self._idle = frozenset(stored - self._run.weights)

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        """The loss of a batch.

        A position counts where it is text and followed by text; in a model without logits of each token, where it is
        text.

        Args:
            inputs: the program's inputs by name, as `skink.graph.calibration.token_batches` makes them.

        Returns:
            Scalars: `loss`, the weighted sum of the terms, each a sum over the positions that count; `tokens`, how many
            these are, int64; and each term's own sum, without weight and detached, by its name.

        Raises:
            GraphError: GRAPH-003 where inputs are missing or unknown.
        """
        self._check(inputs)
        tokens, mask = inputs[self._tokens], inputs.get(PADDING_INPUT)
        exact = self._taught(inputs)
        with self._autocast(tokens.device):
            made = self._run.run(ModuleWeights(self.model), inputs)
        sums: dict[str, Tensor] = {}
        if self.terms.on_logits:
            teacher = exact.pop(0) if self.terms.compares_logits else None
            sums = logit_sums(made.pop(0), teacher, tokens, mask, self.terms)
        counted = self._counted(tokens, mask)
        for kind, number in self._places.items():
            pairs = zip(made[:number], exact[:number], strict=True)
            sums[kind] = torch.stack([relative_error(one, two, counted) for one, two in pairs]).mean()
            del made[:number], exact[:number]
        sums.setdefault("tokens", counted.sum())
        weighted = [weight * sums[name] for name, weight in self.terms.weights().items()]
        return {"loss": torch.stack(weighted).sum(), **{name: value.detach() for name, value in sums.items()}}

    def own_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The parameters by the program's names; with adapters, theirs beside them."""
        return ((name.replace(".base_layer.", "."), entry) for name, entry in self.model.named_parameters())

    def teacher_fault(self, inputs: Mapping[str, Tensor]) -> str:
        """What of the teacher is not finite for these inputs, a sentence; empty where all is."""
        if self._teacher is None or all(is_finite(value) for value in self._taught(inputs)):
            return ""
        return self._teacher.damaged() or "the teacher gives values that are not finite for this text."

    @property
    def idle(self) -> frozenset[str]:
        """Names of the program's weights that the loss does not depend on: without logits, the output head's, say."""
        return self._idle

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Student":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._teacher is not None:
            # Where the function puts a tensor is asked with an empty one, so that nothing else is done to the teacher.
            self._teacher.move(lambda tensor: fn(tensor.new_empty(0)).device)
        return self

    def _taught(self, inputs: Mapping[str, Tensor]) -> list[Any]:
        """The teacher's values, of logits and places; none without a teacher."""
        device = inputs[self._tokens].device
        if self._teacher is None:
            return []
        self._teacher.move(lambda tensor: device)
        with torch.no_grad(), self._autocast(device):
            return self._teacher_run.run(self._teacher, inputs)

    def _autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(device.type, getattr(torch, self.precision))

    def _counted(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """Which positions count: bool[B, T]."""
        if self._predicts:
            return counted_positions(tokens, mask)
        return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device) if mask is None else mask != 0

    def _check(self, inputs: Mapping[str, Tensor]) -> None:
        wrong = [
            *(name for name in self._names if name not in inputs),
            *(name for name in inputs if name not in self._names),
        ]
        if wrong:
            what = "is missing" if wrong[0] in self._names else "is unknown"
            raise GraphError(
                "GRAPH-003", f"the input {wrong[0]!r} {what}.", fix=f"its inputs are {', '.join(self._names)}."
            )


def check_fit(program: Program, original: Program | None, terms: Terms) -> None:
    """Refuse a loss that a model has not, and a teacher that cannot teach it.

    Raises:
        OptionError: OPTION-002.
        RecoveryError: RECOVER-006.
    """
    _check_logits(program, terms)
    if terms.needs_teacher:
        _fitting(original, program)


def main_input(program: Program) -> Input:
    """The input that gives a program its tokens: `input_ids`, or else the first."""
    return next((entry for entry in program.inputs if entry.name == "input_ids"), program.inputs[0])


def _runnable(program: Program) -> Program:
    """The program's graph without casts to half precision, which would round whatever its weights are."""
    return with_dtype(program, torch.float32, shapes_only=True, without=LOW)


def _own_tensors(module: nn.Module, *, widen: bool, copy: bool) -> None:
    """Give a module that shares its tensors with a program some of its own: those to be cast; with `copy`, all."""
    for tensor in (*module.parameters(), *module.buffers()):
        if widen and tensor.dtype in LOW:
            tensor.data = tensor.data.float()
        elif copy:
            tensor.data = tensor.data.clone()


def _logits(program: Program) -> fx.Node | None:
    """The logits of each token, float[B, T, V]; None where a program has no such output."""
    node = results_by_name(program).get("logits")
    fits = isinstance(node, fx.Node) and node.meta["val"].dim() == 3 and holds_tokens(program, node)
    return node if fits and main_input(program).name == "input_ids" else None


def _check_logits(program: Program, terms: Terms) -> None:
    """Refuse terms that the model has no logits for."""
    if not terms.on_logits:
        return
    if _logits(program) is None:
        raise OptionError(
            "OPTION-002",
            f"{', '.join(terms.on_logits)} needs a model with logits of each token of input_ids; this one gives "
            f"{', '.join(program.outputs)}.",
            fix="compare what layers give: hidden=1.",
        )
    attentions = program.graph.find_nodes(op="call_function", target=ATTENTION.overload)
    if "ce" in terms.on_logits and attentions and not any(_is_causal(node) for node in attentions):
        raise OptionError(
            "OPTION-002",
            "ce is the loss of the next token, which this model has seen: its attention looks both ways.",
            fix="compare with the original: kl=1 or hidden=1.",
        )


def _is_causal(attention: fx.Node) -> bool:
    return bool(ATTENTION.bind(attention.args, attention.kwargs)["causal"])


def _fitting(original: Program | None, program: Program) -> Program:
    """The teacher, where it reads what the student reads."""
    if original is None:
        raise _unfit(
            "there is none, and the loss compares with one.", "pass the program as it was before its rewrites."
        )
    names = [entry.name for entry in program.inputs]
    others = [entry.name for entry in original.inputs if entry.name not in names]
    if others:
        raise _unfit(f"it takes {', '.join(others)}, and the student takes {', '.join(names)}.")
    for what, one, two in (
        ("tokens in its table", _table_rows(original), _table_rows(program)),
        ("logits", _width(_logits(original)), _width(_logits(program))),
    ):
        if one != two:
            raise _unfit(f"it has {one or 'no'} {what}, and the student {two or 'none'}.")
    return original


def _unfit(
    why: str, fix: str = "take the model that the student was made of, or one of the same tokenizer."
) -> RecoveryError:
    return RecoveryError("RECOVER-006", "the teacher does not fit the student.", why=why, fix=fix)


def _table_rows(program: Program) -> int | None:
    """How many tokens a program knows: rows of the table that its tokens index; None where there is none."""
    place = program.inputs.index(main_input(program))
    tokens = program.graph.find_nodes(op="placeholder")[place]
    tables = [user.args[0] for user in tokens.users if user.target is aten.embedding.default]
    return next((int(table.meta["val"].shape[0]) for table in tables if isinstance(table, fx.Node)), None)


def _width(node: fx.Node | None) -> int | None:
    return int(node.meta["val"].shape[-1]) if node is not None else None
