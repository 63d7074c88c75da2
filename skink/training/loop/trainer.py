"""The training loop: text in, trained weights in the module and a record out.

A step's loss is the mean over the tokens that count in the global batch: over all micro-batches and processes. Modules
return sums and counts, gradients are summed as they come, and are divided once by the count of all. So neither
accumulation nor the number of processes changes anything but rounding.

Which windows a step reads and its learning rate follow from the step's number. So a run goes on from a checkpoint as if
it had never been interrupted: on one process, to the same bits.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from skink.errors import RecoveryError
from skink.graph.windows import Windows
from skink.training.loop.breakdown import Taught, breakdown, damaged, input_fault
from skink.training.loop.options import TrainingRecord, TrainOptions
from skink.training.loop.order import Order, text_lengths
from skink.training.loop.pace import Pace
from skink.training.loop.processes import Processes, processes, whole
from skink.training.loop.saving import Saved, run_identity
from skink.training.loop.state import RunState
from skink.training.loop.steps import adamw, check_text, rate_of, windows_read
from skink.training.loop.sums import Sums

__all__ = ["TrainOptions", "TrainingRecord", "train"]

MakeInputs = Callable[[Tensor, Tensor | None], dict[str, Tensor]]

_NO_BETTER = (
    "No evaluation on held-out text was better than the one before the first step, so the weights stay as they were: "
    "try a lower learning_rate, or more text."
)
_AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def train(
    module: nn.Module,
    text: Windows,
    options: TrainOptions,
    *,
    make_inputs: MakeInputs,
    held_out: Windows | None = None,
    checkpoints: Path | None = None,
    identity: str = "",
    progress: Callable[[int, int], None] = lambda done, total: None,
    status: Callable[[str], None] = lambda said: None,
) -> TrainingRecord:
    """Train the parameters of `module` that require gradients, in place, with AdamW (Loshchilov and Hutter 2019).

    Args:
        module: `module(**inputs)` returns `loss`, the sum over the tokens that count, `tokens`, their count, and the
            sum of any other term under its name. Parameters that train become float32.
        text: what it learns from; at least one window.
        options: how long and how.
        make_inputs: the module's inputs by name from windows int64[n, T] and their padding int64[n, T] or None.
        held_out: what it is judged by: by its term `ce` where it has one, else by `loss`. With `options.evaluate_every`
            the weights with the least held-out loss stay, those from before the first step among them.
        checkpoints: the folder in which the run has its own; None: nothing is kept.
        identity: which run this is, in hexadecimal: runs that should not go on from each other's checkpoints differ in
            it. Empty: made from options, text and weights.
        progress: told (tokens read, tokens to read) after each step, in process 0.
        status: told loss, tokens a second and the time left, in process 0.

    Raises:
        RecoveryError: RECOVER-003 loss or gradient not finite, -004 no checkpoint that can be read, -008 no text.
    """
    check_text(text)
    if held_out is not None:
        check_text(held_out, "held-out")
    trained = {name: entry for name, entry in module.named_parameters() if entry.requires_grad}
    if not trained:
        raise ValueError("no parameter of the module requires gradients")
    for parameter in trained.values():
        # Some are stored transposed, which messages between processes cannot be.
        parameter.data = parameter.data.float().contiguous()
    damage = damaged(module.own_weights() if isinstance(module, Taught) else module.named_parameters())
    if checkpoints and not identity:
        identity = run_identity(module, [text, held_out], options)
    device = next(module.parameters()).device
    with processes(device, options.sharding) as group, _own_randomness(group.device), _modes(module):
        torch.manual_seed(options.seed + group.index)
        group.start(module, list(trained.values()))
        identity = group.first(identity)
        folder = checkpoints / f"recover-{identity[:12]}" if checkpoints else None
        run = _Run(module, text, options, make_inputs, held_out, group, folder, identity, damage)
        record = run.go(progress if group.main else None, status if group.main else None)
        group.finish(module)
    return record


class _Run:
    """One run: what it reads, where it stands, and its steps."""

    def __init__(
        self,
        module: nn.Module,
        text: Windows,
        options: TrainOptions,
        make_inputs: MakeInputs,
        held_out: Windows | None,
        group: Processes,
        folder: Path | None,
        identity: str,
        damage: str,
    ) -> None:
        self.module, self.text, self.options, self.make_inputs, self.group = module, text, options, make_inputs, group
        self.held_out, self.damage = held_out if options.evaluate_every else None, damage
        # Sharding has put other objects into the place of parameters.
        self.trained = {name: entry for name, entry in module.named_parameters() if entry.requires_grad}
        self.optimizer = adamw(self.trained.values(), options)
        self.lengths = text_lengths(text)
        self.order = Order(len(text.tokens), options.seed)
        self.places = windows_read(text, self.order, options)
        self.steps = -(-self.places // options.batch)
        self.tokens = self.order.tokens_in(self.places, self.lengths, text.tokens.shape[1])
        self.state = RunState()
        self.saved = Saved(folder, identity, group, self.trained, self.optimizer)

    def go(self, progress: Callable[[int, int], None] | None, status: Callable[[str], None] | None) -> TrainingRecord:
        """All steps that are left, and the best weights at the end."""
        self.state, notes = self.saved.load()
        resumed_at = self.state.step or None
        if not resumed_at:
            self._evaluate()
        pace, since = Pace(), time.perf_counter()
        if progress:
            progress(self.state.tokens, self.tokens)
        while self.state.step < self.steps and not self.state.stopped:
            before = self.state.tokens
            loss = self._step()
            if self._due(self.options.evaluate_every, before):
                self._evaluate()
            now = time.perf_counter()
            self.state.seconds, since = self.state.seconds + now - since, now
            if self._due(self.options.checkpoint_every, before):
                self.saved.write(self.state)
            pace.add(self.state.tokens - before)
            if progress:
                progress(self.state.tokens, self.tokens)
            if status:
                status(pace.text(loss, self.tokens - self.state.tokens))
        if self.state.best is not None:
            self.saved.restore_best()
        return self._record(resumed_at, notes)

    def _step(self) -> float:
        """One step; its loss."""
        options, state = self.options, self.state
        start = state.step * options.batch
        rows = self.order.rows(start, min(start + options.batch, self.places))
        scale = state.scale.value if options.precision == "float16" else 1.0
        # Near the count that divides at the end, so that sums stay in the range of a mean.
        near = len(rows) * self.text.tokens.shape[1]
        sums = Sums()
        parts = self.group.share(rows, options.micro_batch)
        for part in parts:
            # A process whose share is shorter takes part in the work of others with a window that does not count.
            found = self._forward(self.text, part if len(part) else rows[:1])
            (found["loss"] * (scale / near if len(part) else 0.0)).backward()
            sums.add(found, counts=bool(len(part)))
        means, counted = sums.means(self.group)
        # The terms first: they say more than their sum.
        for name, value in sorted(means.items(), key=lambda entry: entry[0] == "loss"):
            if not math.isfinite(value):
                what = f"its term {name!r}" if name != "loss" else "its loss"
                raise self._broken(f"{what} is {value}", self.text, parts)
        norm = self._update(near / (scale * counted))
        if not (math.isfinite(norm) or (options.precision == "float16" and state.scale.value >= 1)):
            raise self._broken(f"its gradient is {norm}", self.text, parts)
        state.step += 1
        state.tokens += len(rows) * self.text.tokens.shape[1] if self.lengths is None else int(self.lengths[rows].sum())
        loss: float = means.pop("loss")
        state.losses.append((state.tokens, loss))
        for name, value in means.items():
            state.terms.setdefault(name, []).append(value)
        return loss

    def _update(self, factor: float) -> float:
        """Let the optimizer use the gradients times `factor`, clipped, unless they overflow; the norm that they had."""
        parameters = list(self.trained.values())
        self.group.sum_gradients(parameters)
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = whole(torch.nn.utils.get_total_norm(grads)).item() * factor
        finite = math.isfinite(norm)
        if self.options.precision == "float16":
            self.state.scale.update(finite)
        if finite:
            clip = self.options.clip
            factor *= min(1.0, clip / (norm + 1e-6)) if clip else 1.0
            for grad in grads:
                grad.mul_(factor)
            for entry in self.optimizer.param_groups:
                entry["lr"] = rate_of(self.state.step, self.steps, self.options)
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def _broken(self, what: str, windows: Windows, parts: Iterable[Tensor]) -> RecoveryError:
        """What to raise where something is not finite, after these micro-batches."""
        state = self.state
        taught = self.module if isinstance(self.module, Taught) else None
        inputs = (self._inputs(windows, part) for part in parts if len(part))
        cause = self.damage or next(filter(None, (input_fault(entry, taught) for entry in inputs)), "")
        at = f"at step {state.step + 1} of {self.steps}" if state.step else ""
        rate = rate_of(state.step, self.steps, self.options)
        return breakdown(what, self.options, rate, at=at, tokens=state.tokens, cause=cause)

    @torch.no_grad()
    def _evaluate(self) -> None:
        """The held-out loss of the weights as they are; the best are kept."""
        if self.held_out is None or (self.state.held_out and self.state.held_out[-1][0] == self.state.tokens):
            return
        size = self.options.micro_batch or -(-self.options.batch // self.group.count)
        rows = torch.arange(len(self.held_out.tokens))
        sums = Sums()
        with _modes(self.module, training=False):
            parts = self.group.share(rows, size)
            for part in parts:
                sums.add(self._forward(self.held_out, part if len(part) else rows[:1]), counts=bool(len(part)))
        means, _ = sums.means(self.group)
        loss = means["ce" if "ce" in means else "loss"]
        if not math.isfinite(loss):
            raise self._broken(f"its loss on held-out text is {loss}", self.held_out, parts)
        if self.state.evaluated(loss, self.options.patience):
            self.saved.keep_best()

    def _forward(self, windows: Windows, rows: Tensor) -> dict[str, Tensor]:
        dtype = _AUTOCAST.get(self.options.precision)
        with torch.autocast(self.group.device.type, dtype=dtype) if dtype else nullcontext():
            found: dict[str, Tensor] = self.module(**self._inputs(windows, rows))
        return found

    def _inputs(self, windows: Windows, rows: Tensor) -> dict[str, Tensor]:
        tokens = windows.tokens[rows].to(self.group.device)
        padding = None if windows.padding is None else windows.padding[rows].to(self.group.device)
        return self.make_inputs(tokens, padding)

    def _due(self, every: int, before: int) -> bool:
        """Whether a multiple of `every` tokens was passed in the step that ended, or it was the last one."""
        last = self.state.step == self.steps or self.state.stopped
        return bool(every) and (last or self.state.tokens // every > before // every)

    def _record(self, resumed_at: int | None, notes: tuple[str, ...]) -> TrainingRecord:
        state = self.state
        if state.best is not None and state.tokens and not state.best[0]:
            notes = (*notes, _NO_BETTER)
        return TrainingRecord(
            steps=state.step,
            tokens=state.tokens,
            seconds=state.seconds,
            losses=tuple(state.losses),
            terms={name: tuple(values) for name, values in state.terms.items()},
            held_out=tuple(state.held_out),
            best=state.best,
            stopped_early=state.stopped,
            resumed_at=resumed_at,
            processes=self.group.count,
            options=self.options.as_dict(),
            notes=notes,
        )


@contextmanager
def _own_randomness(device: torch.device) -> Iterator[None]:
    """Let the caller's random numbers go on afterwards as if nothing had been drawn."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


@contextmanager
def _modes(module: nn.Module, training: bool = True) -> Iterator[None]:
    """The module in training (or evaluation), and then each of its modules as it was."""
    before = [(child, child.training) for child in module.modules()]
    module.train(training)
    try:
        yield
    finally:
        for child, mode in before:
            child.training = mode
