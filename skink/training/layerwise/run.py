"""The text on its way through the original's layers, and the groups of layers that train as it comes by."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from skink.errors import RecoveryError, SkinkError
from skink.graph.program import Program
from skink.graph.windows import Windows
from skink.training.layerwise.group import Batch, LayerGroup
from skink.training.layerwise.layer import Half, Layer, Target, weights_for
from skink.training.layerwise.pieces import Piece
from skink.training.layerwise.reading import Reading
from skink.training.layerwise.record import MatchingRecord, Outcome, record_of
from skink.training.layerwise.streams import Streams
from skink.training.loop import checkpoint
from skink.training.loop.options import TrainOptions
from skink.training.loop.pace import Pace
from skink.training.loop.processes import Processes
from skink.training.loop.steps import rate_of
from skink.training.weights.trainable import rounded


@dataclass(frozen=True)
class Job:
    """A piece, and what it is held to; where there are no targets or weights, its values only go on."""

    piece: Piece
    targets: Sequence[Target]

    @property
    def trains(self) -> bool:
        return bool(self.targets) and bool(self.piece.trained)


class LayerRun:
    """The text on its way through the layers.

    Args:
        original: whose values they are.
        program: whose layers train; their new weights are put in place group by group.
        text: windows.
        options: of the steps of each layer.
        weights: of the terms `hidden` and `attention`.
        jobs: in order; what lies behind the last one does not run.
        group: the processes, which take groups of layers in turn.
        held_bytes: see `Streams`.
        folder: of the run's checkpoints.
        identity: of the run.
    """

    def __init__(
        self,
        original: Program,
        program: Program,
        text: Windows,
        options: TrainOptions,
        weights: tuple[float, float],
        jobs: Sequence[Job],
        group: Processes,
        held_bytes: int,
        folder: Path | None,
        identity: str,
    ) -> None:
        self.original, self.program, self.options, self.jobs, self.group = original, program, options, jobs, group
        self.weights = weights
        self.folder, self.identity = folder, identity
        self.progress: Callable[[int, int], None] | None = None
        self.status: Callable[[str], None] | None = None
        self.reading = Reading(program, text, options)
        self.device = next((tensor.device for _, tensor in program.weights()), torch.device("cpu"))
        self.streams = Streams(self.reading.count, held_bytes)
        self.outcomes: dict[int, Outcome] = {}
        self.resumed: set[int] = set()
        self._done, self._total, self._tokens_left = 0, 0, 0
        self._pace = Pace()

    def go(self, layers_at_once: int) -> MatchingRecord:
        """All groups, and what came of them."""
        groups = [self.jobs[start : start + layers_at_once] for start in range(0, len(self.jobs), layers_at_once)]
        owner = {job.piece.index: at % self.group.count for at, jobs in enumerate(groups) for job in jobs}
        failure: SkinkError | None = None
        try:
            self._load(owner)
            self._plan(owner, groups)
            self._fill()
            for at, jobs in enumerate(groups):
                self._train(jobs, owner)
                if at + 1 < len(groups):
                    for job in jobs:
                        self._go_on(job)
        except SkinkError as error:
            # The others wait for this process: it tells them before it leaves.
            failure = error
        self._agree(failure)
        self._exchange(owner)
        return self._record()

    def _is_mine(self, job: Job, owner: Mapping[int, int]) -> bool:
        index = job.piece.index
        return job.trains and owner[index] == self.group.index and index not in self.outcomes

    def _plan(self, owner: Mapping[int, int], groups: Sequence[Sequence[Job]]) -> None:
        """How many micro-batches there are to do."""
        text = self.reading
        training = sum(text.parts(text.step(step)) for step in range(text.steps)) + 2 * text.parts(text.sample())
        mine = sum(any(self._is_mine(job, owner) for job in jobs) for jobs in groups)
        self._total = text.parts(text.all()) * (1 + sum(map(len, groups[:-1]))) + training * mine
        self._tokens_left = sum(text.tokens(text.step(step)) for step in range(text.steps)) * mine

    def _batches(self, rows: Tensor) -> Iterator[Batch]:
        """Some windows with the values that the next layers receive, in micro-batches."""
        for part in rows.split(self.reading.size):
            inputs, real = self.reading.inputs(part)
            entry = [value.to(self.device) for value in self.streams.read(part)]
            yield Batch(inputs, entry, real, self.reading.tokens(part))
            self._report()

    def _report(self) -> None:
        self._done += 1
        if self.progress is not None:
            self.progress(self._done, self._total)

    def _fill(self) -> None:
        """What the first layer receives."""
        first = self.jobs[0].piece.begin.teacher
        # In the dtype of the weights: an embedding table is large, and only looked up in.
        self._pass_through(Half(self.original, (), first, weights_for(self.original, "bfloat16")), wide=True)

    def _go_on(self, job: Job) -> None:
        """Let the original's values pass a layer."""
        begin, end = job.piece.begin.teacher, job.piece.end.teacher
        frozen = weights_for(self.original, self.options.precision)
        self._pass_through(Half(self.original, begin, end, frozen))

    def _pass_through(self, half: Half, *, wide: bool = False) -> None:
        for rows in self.reading.all().split(self.reading.size):
            inputs, _ = self.reading.inputs(rows)
            values = half.run(inputs, [value.to(self.device) for value in self.streams.read(rows)])
            if wide and self.options.precision == "float32":
                values = [value.float() if value.is_floating_point() else value for value in values]
            self.streams.write(rows, values)
            self._report()
        self.streams.advance()

    def _train(self, jobs: Sequence[Job], owner: Mapping[int, int]) -> None:
        """Train the layers of a group on what the first of them receives."""
        mine = [job for job in jobs if self._is_mine(job, owner)]
        if not mine:
            return
        began, text = time.perf_counter(), self.reading
        group = LayerGroup([self._member(job, job in mine) for job in jobs], self.options, self.weights)
        outcomes = [Outcome(before=loss) for loss in group.measure(self._batches(text.sample()))]
        for step in range(text.steps):
            rows = text.step(step)
            errors = group.step(self._batches(rows), text.tokens(rows), rate_of(step, text.steps, self.options))
            for outcome, error in zip(outcomes, errors, strict=True):
                outcome.errors.append(error)
            self._say(mine, errors, text.tokens(rows))
        for outcome, loss in zip(outcomes, group.measure(self._batches(text.sample())), strict=True):
            outcome.after = loss
            outcome.seconds = (time.perf_counter() - began) / len(mine)
        for job, layer, outcome in zip(mine, group.layers, outcomes, strict=True):
            if not outcome.after <= outcome.before:
                layer.begin_again()
                outcome.after = outcome.before
            self.outcomes[job.piece.index] = outcome
            self._save(job, layer, outcome)
            self._put(layer.weights)

    def _member(self, job: Job, trains: bool) -> Layer | Half:
        if trains:
            return Layer(self.original, self.program, job.piece, job.targets, self.options.precision)
        frozen = weights_for(self.original, self.options.precision)
        return Half(self.original, job.piece.begin.teacher, job.piece.end.teacher, frozen)

    def _say(self, jobs: Sequence[Job], errors: Sequence[Sequence[float]], tokens: int) -> None:
        self._pace.add(tokens)
        self._tokens_left -= tokens
        if self.status is not None:
            loss = sum(self._weighted(error) for error in errors) / len(errors)
            self.status(f"{_span(jobs)} · {self._pace.text(loss, self._tokens_left)}")

    def _weighted(self, error: Sequence[float]) -> float:
        return sum(weight * value for weight, value in zip(self.weights, error, strict=True))

    def _put(self, weights: Mapping[str, Tensor]) -> None:
        # All are rounded before one is put in place.
        found = {name: rounded(name, tensor, self.program.weight(name)) for name, tensor in weights.items()}
        for name, tensor in found.items():
            self.program.set_weight(name, tensor)

    def _save(self, job: Job, layer: Layer, outcome: Outcome) -> None:
        if self.folder is not None:
            checkpoint.write(
                self.folder / _folder(job),
                step=self.reading.steps,
                identity=self.identity,
                state=dataclasses.asdict(outcome),
                tensors=dict(layer.weights),
            )

    def _load(self, owner: Mapping[int, int]) -> None:
        """Take what an earlier run finished of this process's layers."""
        for job in self.jobs:
            found = None
            if self.folder is not None and self._is_mine(job, owner):
                found = checkpoint.newest(self.folder / _folder(job), self.identity)
            if found is not None:
                self.outcomes[job.piece.index] = Outcome(**found.state)
                self.resumed.add(job.piece.index)
                self._put(checkpoint.read_tensors(found.folder, 0))

    def _agree(self, failure: SkinkError | None) -> None:
        """Leave together where one process failed."""
        self.group.wait_long()
        failed = int(self.group.sum(torch.tensor(int(failure is not None), device=self.device)))
        if failure is not None:
            raise failure
        if failed:
            raise RecoveryError(
                "RECOVER-003",
                "another process of this training broke down.",
                fix="see what it says.",
            )

    def _exchange(self, owner: Mapping[int, int]) -> None:
        """Give every process what the others have trained."""
        if self.group.count == 1:
            return
        for job in self.jobs:
            if not job.trains:
                continue
            index = job.piece.index
            outcome = self.outcomes.setdefault(index, Outcome(errors=[[0.0, 0.0]] * self.reading.steps))
            numbers = [outcome.before, outcome.after, outcome.seconds, float(index in self.resumed)]
            numbers += [value for error in outcome.errors for value in error]
            every = self.group.sum(torch.tensor(numbers, dtype=torch.float64, device=self.device)).tolist()
            errors = [every[at : at + 2] for at in range(4, len(every), 2)]
            self.outcomes[index] = Outcome(every[0], every[1], every[2], errors)
            if every[3]:
                self.resumed.add(index)
            for name in job.piece.trained:
                # Some are stored transposed, which messages between processes cannot be.
                tensor = self.program.weight(name).detach().clone(memory_format=torch.contiguous_format)
                torch.distributed.broadcast(tensor, owner[index])
                self.program.set_weight(name, tensor)

    def _record(self) -> MatchingRecord:
        text = self.reading
        tokens = list(accumulate(text.tokens(text.step(step)) for step in range(text.steps)))
        trained = [job.piece for job in self.jobs if job.trains]
        outcomes = [(piece, self.outcomes[piece.index]) for piece in trained]
        return record_of(
            outcomes, tokens, self.weights, self.options, processes=self.group.count, resumed=len(self.resumed)
        )


def _folder(job: Job) -> str:
    return f"layer-{job.piece.index:04d}"


def _span(jobs: Sequence[Job]) -> str:
    first, last = jobs[0].piece.name, jobs[-1].piece.name
    return first if len(jobs) == 1 else f"{first} to {last}"
