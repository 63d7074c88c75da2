"""What calibration text says about linear layers, layer by layer, for passes that factor them in one or two metrics."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from skink.graph.calibration import Covariance, stream_covariances
from skink.graph.gradients import stream_moments
from skink.graph.passes import Context, LayerRecord, Progress
from skink.graph.program import Program
from skink.passes.decompose.factorize.factorize import error_energy, output_error
from skink.passes.decompose.replacement import factored
from skink.passes.decompose.selection import LinearLayer
from skink.passes.decompose.tucker.tensor import relative_error


@dataclass(frozen=True)
class Statistics:
    """What the text says about one layer.

    Args:
        inputs: C and its tokens.
        output: G; None where it was not asked for.
        scale: what makes an energy in both metrics a loss in nats per token.
    """

    inputs: Covariance
    output: Tensor | None = None
    scale: float = 0.0

    def record(self, layer: LinearLayer, weight: Tensor, product: Tensor, rank: int, parameters: int) -> LayerRecord:
        """The row of the report for a layer that `product` stands for now.

        Args:
            layer: which.
            weight: as it was, [out, in].
            product: what the stored factors multiply to, float64[out, in].
            rank: of the factors.
            parameters: of all of them.
        """
        exact = weight.double()
        loss = None
        if self.output is not None:
            loss = self.scale * error_energy(exact - product, left=self.output, right=self.inputs.total)
        return factored(
            layer,
            rank,
            parameters,
            predicted_error=output_error(exact, product, self.inputs.total),
            weight_error=relative_error(exact, product),
            predicted_loss=loss,
        )


def stream_statistics(
    program: Program,
    names: Sequence[str],
    method: Literal["two-sided", "whitened"],
    context: Context,
    *,
    progress: Progress | None = None,
) -> Iterator[tuple[str, Statistics]]:
    """The statistics of linear weights, one at a time; the caller may rewrite those that it was given.

    Args:
        program: with linear layers in view.
        names: of their weights.
        method: `two-sided` asks for gradients as well.
        context: with the text.
        progress: instead of the context's own.

    Raises:
        CalibrationError: CALIBRATION-001 to -004, see `stream_covariances`; -002 where there is no text.
    """
    windows, padding = context.calibration_for(f"method={method}"), context.padding
    if not names:
        return
    report = progress if progress is not None else context.progress
    if method == "whitened":
        for found in stream_covariances(program, windows, names, progress=report, padding=padding):
            for name in list(found):
                yield name, Statistics(found.pop(name))
        return
    for both in stream_moments(program, windows, names, seed=context.seed, progress=report, padding=padding):
        for name in list(both):
            moments = both.pop(name)
            scale = 0.5 * moments.uses / (moments.inputs.tokens * moments.gradients.tokens)
            yield name, Statistics(moments.inputs, moments.gradients.total, scale)
