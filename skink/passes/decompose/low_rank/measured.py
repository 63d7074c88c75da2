"""What factoring one matrix alone adds to the loss on calibration text, measured at a few ranks and interpolated.

For methods that predict nothing that compares across layers. Between the ranks that were measured, the ratio of the
loss to the energy left out is interpolated: the energy knows the shape of the curve, the measurement its height.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from skink.budget.interpolate import interpolate
from skink.graph.calibration import counted_rows, real_tokens, token_batches
from skink.graph.output_heads import predicts_next_tokens
from skink.graph.passes import Context
from skink.graph.program import Program
from skink.passes.decompose.low_rank.candidates import Candidate

# Windows of calibration text that are run, evenly spread over it.
_WINDOWS = 8


def measured_losses(program: Program, candidates: Sequence[Candidate], keep: float, context: Context) -> list[Tensor]:
    """For each candidate float64[K + 1], at [r] the rise of the loss in nats per token when it alone has rank r.

    Where logits are of something else than the next token, the loss is their divergence from the dense program's
    (Kullback-Leibler, for each row of them); without logits it is |o' - o|^2 / |o|^2 of the outputs.

    Args:
        program: dense; it is as before when this returns.
        candidates: each of one layer.
        keep: measured are half of this share of a weight's ranks, this share, and halfway from there to all of them.
        context: its calibration text.
    """
    loss = _Loss(program, context)
    result: list[Tensor] = []
    for entry in candidates:
        most = entry.factors.rank
        ranks = sorted({max(1, round(most * share)) for share in (keep / 2, keep, (1 + keep) / 2)})
        energies = entry.factors.discarded.cpu()
        ratios = []
        for rank in ranks:
            up, down = entry.factors.at(rank)
            rise = max(0.0, loss.with_weight(entry.stack.layers[0].weight, up @ down))
            ratios.append(rise / max(float(energies[rank]), torch.finfo(torch.float64).tiny))
        # Beyond the ranks that were measured it stays what it is at the nearest.
        ratio = interpolate(torch.arange(most + 1).clamp(ranks[0], ranks[-1]), ranks, ratios)
        # Noise of the measurement must not make a larger rank look worse.
        result.append((ratio * energies).flip(0).cummax(0).values.flip(0))
    return result


class _Loss:
    """The rise of a program's loss on a few windows of calibration text."""

    def __init__(self, program: Program, context: Context) -> None:
        windows = context.calibration_for("allocation=measured")
        count = len(windows)
        picked = torch.linspace(0, count - 1, min(count, _WINDOWS)).round().long()
        padding = None if context.padding is None else context.padding[picked]
        self._program = program
        self._batches = token_batches(program, windows[picked], padding=padding)
        self._logits = program.outputs.index("logits") if "logits" in program.outputs else None
        self._has_labels = predicts_next_tokens(program)
        self._dense = [] if self._has_labels else [self._outputs(batch) for batch in self._batches]
        self._before = self._mean()

    def with_weight(self, name: str, weight: Tensor) -> float:
        """The rise while one weight is another."""
        program = self._program
        dense, is_buffer = program.weight(name), name in program.buffers
        program.set_weight(name, weight, buffer=is_buffer)
        try:
            return self._mean() - self._before
        finally:
            program.set_weight(name, dense, buffer=is_buffer)

    def _outputs(self, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return tuple(self._program(**batch))

    def _mean(self) -> float:
        if self._logits is None:
            return self._distance()
        total, count = 0.0, 0
        for index, batch in enumerate(self._batches):
            logits = self._outputs(batch)[self._logits]
            rows, labels = self._labelled(logits, batch) if self._has_labels else self._beside_dense(logits, index)
            total += float(cross_entropy(rows.float(), labels, reduction="sum"))
            count += len(rows)
        return total / max(1, count)

    def _labelled(self, logits: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Rows of the logits, and the token that follows each."""
        rows, labels = logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten()
        real = real_tokens(batch)
        if real is None:
            return rows, labels
        counted = (real[:, 1:] & real[:, :-1]).flatten()
        return rows[counted], labels[counted]

    def _beside_dense(self, logits: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """Rows of the logits, and the dense program's shares of each."""
        batch, dense = self._batches[index], self._dense[index][self._logits or 0]
        counted = counted_rows(logits, real_tokens(batch))
        rows, wanted = (value.reshape(-1, value.shape[-1]) for value in (logits, dense))
        if counted is not None:
            rows, wanted = rows[counted], wanted[counted]
        return rows, wanted.float().softmax(-1)

    def _distance(self) -> float:
        away = size = 0.0
        for batch, dense in zip(self._batches, self._dense, strict=True):
            real = real_tokens(batch)
            for one, other in zip(self._outputs(batch), dense, strict=True):
                # What comes out at padding is nobody's.
                rows = counted_rows(other, real)
                flat = other.double().reshape(-1, other.shape[-1])
                change = one.double().reshape(flat.shape) - flat
                away += float((change if rows is None else change[rows]).square().sum())
                size += float((flat if rows is None else flat[rows]).square().sum())
        return away / size if size > 0 else 0.0
