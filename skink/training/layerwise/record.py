"""What came of matching layers."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from skink.training.layerwise.pieces import Piece
from skink.training.loop.options import TrainingRecord, TrainOptions

KINDS = ("hidden", "attention")


@dataclass(frozen=True)
class LayerLoss:
    """What matching did for one layer.

    Args:
        name: of the layer, or of the first and the last of several that had to be trained as one.
        before: its loss on a part of the text, with the weighted terms of `skink.training.layerwise.layer`.
        after: likewise; that of a layer which training made worse, and which was left as it was, is as before.
    """

    name: str
    before: float
    after: float


@dataclass(frozen=True)
class MatchingRecord(TrainingRecord):
    """As `TrainingRecord`: steps and tokens are those of each layer, losses and terms the mean over layers.

    Args:
        layers: those that trained, in order.
        layers_resumed: how many of them were taken from checkpoints.
        trained: names of the weights that trained.
    """

    layers: tuple[LayerLoss, ...] = ()
    layers_resumed: int = 0
    trained: tuple[str, ...] = ()


@dataclass
class Outcome:
    """What came of one piece.

    Args:
        before: its loss before training.
        after: and behind it.
        seconds: that training took; of layers that trained at once, its share.
        errors: at each step, the relative error of each of `KINDS`.
    """

    before: float = 0.0
    after: float = 0.0
    seconds: float = 0.0
    errors: list[list[float]] = field(default_factory=list)


def record_of(
    outcomes: Sequence[tuple[Piece, Outcome]],
    tokens: Sequence[int],
    weights: Sequence[float],
    options: TrainOptions,
    *,
    processes: int,
    resumed: int,
) -> MatchingRecord:
    """The record of a run.

    Args:
        outcomes: of the pieces that trained, in order.
        tokens: read by the end of each step.
        weights: of `KINDS` in the loss.
        options: as given.
        processes: how many trained together.
        resumed: how many outcomes come from checkpoints.
    """
    # [steps, kinds]
    means = torch.tensor([outcome.errors for _, outcome in outcomes], dtype=torch.float64).mean(0)
    losses = (means * torch.tensor(weights, dtype=torch.float64)).sum(1).tolist()
    return MatchingRecord(
        steps=len(tokens),
        tokens=tokens[-1],
        seconds=sum(outcome.seconds for _, outcome in outcomes),
        losses=tuple(zip(tokens, losses, strict=True)),
        terms={kind: tuple(means[:, at].tolist()) for at, kind in enumerate(KINDS) if weights[at]},
        processes=processes,
        options=options.as_dict(),
        layers=tuple(LayerLoss(piece.name, outcome.before, outcome.after) for piece, outcome in outcomes),
        layers_resumed=resumed,
        trained=tuple(name for piece, _ in outcomes for name in piece.trained),
    )
