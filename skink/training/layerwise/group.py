"""Layers that train in one reading of the text: one after the other on each micro-batch, with an optimizer each."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from skink.errors import RecoveryError
from skink.training.layerwise.layer import Half, Layer
from skink.training.loop.breakdown import breakdown
from skink.training.loop.options import TrainOptions
from skink.training.loop.state import LossScale
from skink.training.loop.steps import adamw


@dataclass(frozen=True)
class Batch:
    """A micro-batch as it comes to the first layer of a group.

    Args:
        inputs: of the programs, by name.
        entry: the values that the original's layer receives.
        real: bool[B, T], which tokens count; None: all.
        tokens: how many count.
    """

    inputs: Mapping[str, Tensor]
    entry: Sequence[Tensor]
    real: Tensor | None
    tokens: int


class LayerGroup:
    """Consecutive layers of the original, of which some train what the program has in their place.

    Args:
        members: in order; a `Half` only hands the original's values on.
        options: of the optimizers.
        weights: of the terms `hidden` and `attention`.
    """

    def __init__(self, members: Sequence[Layer | Half], options: TrainOptions, weights: tuple[float, float]) -> None:
        self._members, self._options = members, options
        self.layers = [member for member in members if isinstance(member, Layer)]
        self._optimizers = [adamw(layer.weights.values(), options) for layer in self.layers]
        self._scales = [LossScale() for _ in self.layers]
        self._weights = torch.tensor(weights)
        self._factors: list[Tensor] = []
        self._steps = 0

    def measure(self, batches: Iterable[Batch]) -> list[float]:
        """The loss of each layer that trains; the first time also what errors are measured against from then on.

        Raises:
            RecoveryError: RECOVER-003 where a loss is not finite before the first step.
        """
        squares = [torch.zeros(()).double()] * len(self.layers)
        sizes = list(squares)
        tokens = 0
        sound = [torch.tensor(True)] * len(self.layers)
        for batch in batches:
            tokens += batch.tokens
            for place, layer, entry, exact in self._walk(batch):
                sound[place] = _all_finite(exact) & sound[place]
                squares[place] = squares[place] + layer.squares(batch.inputs, entry, exact, batch.real).double()
                if not self._factors:
                    sizes[place] = sizes[place] + layer.sizes(entry, exact, batch.real)
        tokens = max(1, tokens)
        if not self._factors:
            self._factors = [layer.factors(size, tokens) for layer, size in zip(self.layers, sizes, strict=True)]
        errors = [factors.double() @ square / tokens for factors, square in zip(self._factors, squares, strict=True)]
        losses = [float((error.cpu() * self._weights).sum()) for error in errors]
        for layer, loss, finite in zip(self.layers, losses, sound, strict=True):
            if not self._steps and not math.isfinite(loss):
                raise self._broken(layer, "error", 0.0, taught=bool(finite))
        return losses

    def step(self, batches: Iterable[Batch], tokens: int, rate: float) -> list[list[float]]:
        """Read one batch in parts, and change the weights: the relative error of each layer by kind, per token.

        Args:
            batches: micro-batches.
            tokens: how many count in all of them.
            rate: the learning rate.

        Raises:
            RecoveryError: RECOVER-003 where an error or a gradient is not finite.
        """
        errors = [torch.zeros(2, dtype=torch.float64) for _ in self.layers]
        sound = [torch.tensor(True)] * len(self.layers)
        for batch in batches:
            for place, layer, entry, exact in self._walk(batch):
                found = self._factors[place] @ layer.squares(batch.inputs, entry, exact, batch.real, training=True)
                loss = (found * self._weights.to(found.device)).sum()
                scale = self._scales[place].value if self._options.precision == "float16" else 1.0
                (loss * (scale / max(1, tokens))).backward()
                errors[place] += found.detach().double().cpu()
                sound[place] = _all_finite(exact) & sound[place]
                # The insides of this layer are free before the next one runs.
                del found, loss
        result = []
        for place, layer in enumerate(self.layers):
            error = errors[place] / max(1, tokens)
            if not bool(error.isfinite().all()):
                raise self._broken(layer, "error", rate, taught=bool(sound[place]))
            self._update(place, rate)
            result.append(error.tolist())
        self._steps += 1
        return result

    def _walk(self, batch: Batch) -> Iterable[tuple[int, Layer, Sequence[Tensor], Sequence[Tensor]]]:
        """(place, layer, what the original's receives, what the program's is held to) of each layer that trains."""
        entry, place = batch.entry, 0
        for member in self._members:
            if isinstance(member, Layer):
                following, exact = member.exact(batch.inputs, entry)
                yield place, member, entry, exact
                place += 1
            else:
                following = member.run(batch.inputs, entry)
            entry = following

    def _update(self, place: int, rate: float) -> None:
        """Let one layer's optimizer use its gradients; float16 leaves out a step that overflows."""
        optimizer, scale, clip = self._optimizers[place], self._scales[place], self._options.clip
        half = self._options.precision == "float16"
        factor = 1 / scale.value if half else 1.0
        grads = [weight.grad for weight in self.layers[place].weights.values() if weight.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(grads)) * factor
        finite = norm < float("inf")
        if half:
            scale.update(finite)
        if finite:
            torch._foreach_mul_(grads, factor * min(1.0, clip / (norm + 1e-6) if clip else 1.0))
            for entry in optimizer.param_groups:
                entry["lr"] = rate
            optimizer.step()
        elif not half or scale.value < 1:
            raise self._broken(self.layers[place], "gradient", rate)
        optimizer.zero_grad()

    def _broken(self, layer: Layer, what: str, rate: float, *, taught: bool = True) -> RecoveryError:
        """What to raise where something is not finite; `taught`: what the layer is held to is."""
        cause = layer.damaged() or ("" if taught else "the teacher gives values that are not finite for this text.")
        at = f"at step {self._steps + 1}" if self._steps else ""
        of = f"training of {layer.piece.name}"
        return breakdown(f"its {what} is not finite", self._options, rate, of=of, at=at, cause=cause)


def _all_finite(tensors: Sequence[Tensor]) -> Tensor:
    # On their device, so that nothing waits for it.
    return torch.stack([end.float() for tensor in tensors for end in tensor.aminmax()]).isfinite().all()
