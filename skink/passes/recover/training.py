"""One run of `recover`: the parts of `skink.training` put together."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from skink.errors import OutputError, RecoveryError
from skink.graph.calibration import token_batches
from skink.graph.passes import Context, PassResult
from skink.graph.pipeline import check_training_text
from skink.graph.program import Program
from skink.graph.windows import Windows
from skink.passes.recover.identity import identity
from skink.settings import settings
from skink.training.layerwise.match_layers import match_layers
from skink.training.layerwise.record import MatchingRecord
from skink.training.loop.options import TrainingRecord
from skink.training.loop.trainer import train
from skink.training.losses.student import Student
from skink.training.overlap import check_overlap
from skink.training.weights.adapters import add_adapters, merge_adapters, save_adapter
from skink.training.weights.trainable import choose_trainable, idle_patterns, write_back

if TYPE_CHECKING:
    from skink.passes.recover.recover import Recover

# Points of a curve that reports keep.
_POINTS = 400


class Training:
    """One run.

    Args:
        options: the pass.
        program: what trains; its weights are replaced at the end.
        context: text, and what there is to learn from.
    """

    def __init__(self, options: "Recover", program: Program, context: Context) -> None:
        check_training_text([options], given=context.training is not None)
        if context.training is None:
            raise TypeError("there is training text")
        self._options, self._program, self._context = options, program, context
        self._text: Windows = context.training
        self._original = context.original if options.needs_original else None
        judged = 1 if context.held_out is None else context.held_out.tokens.numel()
        length = self._text.tokens.shape[1]
        self._train_options = options.train_options(seed=context.seed, length=length, held_out=judged)
        self._notes: list[str] = []

    def result(self) -> PassResult:
        """Train, and say how it went."""
        self._check_folders()
        self._check_overlap()
        idle = idle_patterns(self._program, self._options.ignore)
        self._notes += [f"ignore: no weight and no layer is named like {pattern!r}." for pattern in idle]
        record, trained = self._by_layer() if self._options.by == "layer" else self._by_model()
        return PassResult(
            edits=0,
            notes=(*self._notes, *record.notes),
            training={
                "trained": trained,
                "loss": self._options.terms().weights(),
                "settings": self._settings(),
                "text": self._text.source,
                "sha256": self._text.sha256,
                "steps": record.steps,
                "tokens": record.tokens,
                "seconds": record.seconds,
                "processes": record.processes,
                "losses": thinned(record.losses, _POINTS),
                "held_out": [list(point) for point in record.held_out],
                "before": record.held_out[0][1] if record.held_out else None,
                "after": record.best[1] if record.best else record.held_out[-1][1] if record.held_out else None,
                "stopped_early": record.stopped_early,
                "resumed_at": record.resumed_at,
                "notes": [*self._notes, *record.notes],
            },
        )

    def _by_model(self) -> tuple[TrainingRecord, int]:
        """All at once; the record, and how many numbers trained."""
        options, program = self._options, self._program
        student = Student(
            program,
            self._original,
            options.terms(),
            precision=options.precision,
            checkpointing=options.gradient_checkpointing,
            patterns=options.at,
            copy=False,
        )
        names: list[str] = []
        if options.train == "lora":
            student.model.requires_grad_(False)
            add_adapters(student.model, options.lora(), program, seed=self._context.seed)
        else:
            idle = [*options.ignore, *student.idle]
            names = choose_trainable(student.model, program, self._original, options.train, ignore=idle)
        trained = sum(entry.numel() for entry in student.parameters() if entry.requires_grad)
        record = train(
            student,
            self._text,
            self._train_options,
            make_inputs=self._inputs,
            held_out=self._context.held_out,
            checkpoints=self._context.checkpoints,
            identity=self._identity(),
            progress=self._context.progress,
            status=self._context.status,
        )
        if options.train != "lora":
            write_back(student.model, program, names)
        elif options.merge:
            merge_adapters(student.model, program)
        else:
            self._keep(student.model)
        return record, trained

    def _by_layer(self) -> tuple[MatchingRecord, int]:
        """Each layer by itself; the record, and how many numbers trained."""
        options, program = self._options, self._program
        if self._original is None:
            raise RecoveryError(
                "RECOVER-006",
                "there is no original to learn from layer by layer.",
                fix="run the pass in a pipeline that begins with the model as it was.",
            )
        record = match_layers(
            self._original,
            program,
            self._text,
            self._train_options,
            terms=options.terms(),
            train=options.train,
            ignore=options.ignore,
            patterns=options.at,
            layers_at_once=options.layers_at_once,
            checkpoints=self._context.checkpoints,
            identity=self._identity(),
            progress=self._context.progress,
            status=self._context.status,
        )
        if record.layers:
            before, after = (sum(losses) / len(losses) for losses in zip(*_losses(record), strict=True))
            self._notes.append(f"The mean error of {len(record.layers)} layers went from {before:.4g} to {after:.4g}.")
        left = sum(not layer.after < layer.before for layer in record.layers if layer.before)
        if left:
            why = "training made them no better; a lower learning_rate may, or more tokens"
            self._notes.append(f"{left} of {len(record.layers)} layers were left as they were: {why}.")
        if record.layers_resumed:
            taken = "layer was" if record.layers_resumed == 1 else "layers were"
            self._notes.append(f"{record.layers_resumed} {taken} taken from checkpoints.")
        return record, sum(program.weight(name).numel() for name in record.trained)

    def _check_folders(self) -> None:
        """Refuse folders that cannot be written to, before hours are spent."""
        if not settings().main_process:
            return
        if self._context.checkpoints is not None:
            _make(self._context.checkpoints)
        if self._options.adapter:
            folder = Path(self._options.adapter)
            if folder.is_dir() and any(folder.iterdir()):
                raise OutputError(
                    "OUTPUT-001",
                    f"the folder for the adapter exists: {folder}",
                    fix="name another, or remove that one.",
                )
            _make(folder)

    def _check_overlap(self) -> None:
        """Refuse text to train on that the model is judged by too."""
        if self._context.held_out is None:
            return
        share = check_overlap(self._text, self._context.held_out)
        if share:
            self._notes.append(f"{share:.1%} of the held-out tokens stand in passages that the training text has too.")

    def _identity(self) -> str:
        if self._context.checkpoints is None:
            return ""
        line = self._options.describe()
        # The best weights so far are the best on this text, and on no other.
        judged = self._context.held_out if self._train_options.evaluate_every else None
        return identity(line, self._context.seed, self._text, judged, self._program, self._original)

    def _settings(self) -> dict[str, Any]:
        """Options as settings of a report: those that say something, lists as text, and what was left open as it was
        decided."""
        options = self._options
        chosen = {name: value for name, value in options.options().items() if options.applies(name)}
        chosen |= {name: value for name, value in self._train_options.as_dict().items() if name in chosen}
        chosen |= {**dict.fromkeys(options.losses()), "seed": self._context.seed}
        written = {name: ", ".join(value) if isinstance(value, tuple) else value for name, value in chosen.items()}
        return {name: value for name, value in written.items() if value not in (None, "")}

    def _inputs(self, tokens: Tensor, padding: Tensor | None) -> dict[str, Tensor]:
        return token_batches(self._program, tokens, batch=len(tokens), padding=padding)[0]

    def _keep(self, module: nn.Module) -> None:
        """Write adapters to their folder."""
        folder = Path(self._options.adapter)
        if settings().main_process:
            name = self._program.origin.get("name")
            save_adapter(module, folder, base_model=None if name is None else str(name))
        self._notes.append(f"The adapter is in {folder}, and the model as it was.")


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            "OUTPUT-002",
            f"cannot write to {folder}: {'it is a file' if folder.is_file() else error.strerror}.",
            fix="name a folder that you may write to.",
        ) from error


def thinned(points: Sequence[tuple[int, float]], most: int) -> list[list[float]]:
    """At most `most` points: means over neighbours, each where its last one lies."""
    size = -(-len(points) // most)
    groups = [points[start : start + size] for start in range(0, len(points), size or 1)]
    return [[group[-1][0], sum(value for _, value in group) / len(group)] for group in groups]


def _losses(record: MatchingRecord) -> list[tuple[float, float]]:
    return [(layer.before, layer.after) for layer in record.layers]
