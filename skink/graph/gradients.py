"""Second moments on both sides of linear layers: of what they read, and of the gradients at their outputs.

    C = sum over tokens of x x^T,   x: the input of a linear layer
    G = sum over tokens of g g^T,   g: the gradient of the text's loss (nats, summed over its tokens) at the output

Together they price a change D of a weight: 1/2 tr(G/n D C/n D^T) nats per token, n the number of tokens; as many times
as a token passes through the layer (`Moments.uses`). That is the Kronecker-factored Fisher information (Martens &
Grosse 2015, arXiv 1503.05671, equations 1 and 16). What the gradients are of is told in objective.py.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from skink.errors import check_range
from skink.graph.backward import Layer, run_backward
from skink.graph.calibration import (
    Accumulator,
    Covariance,
    counted_rows,
    finished,
    linear_readers,
    not_finite,
    real_tokens,
    token_batches,
)
from skink.graph.objective import Labels, count_tokens, objective_of
from skink.graph.passes import Progress
from skink.graph.program import Program


@dataclass(frozen=True)
class Moments:
    """Both sides of one linear weight over the calibration text.

    Args:
        inputs: C, float64[in, in].
        gradients: G, float64[out, out]; its tokens are those of C times the number of samples.
        row_fisher: float64[out]: the square of dL/dW, L the loss of one window, summed over windows and columns; None
            where it was not asked for. Of a weight that several layers read, each layer's part is squared by itself.
        uses: how many times a token of the text passes through: 2 where two layers read the weight, less than 1 where
            layers see pooled values. The price per token of the text is this many times the price per use.
    """

    inputs: Covariance
    gradients: Covariance
    row_fisher: Tensor | None = None
    uses: float = 1.0


def stream_moments(
    program: Program,
    windows: Tensor,
    names: Collection[str],
    *,
    batch: int | None = None,
    labels: Labels = "sampled",
    samples: int = 1,
    seed: int = 0,
    progress: Progress | None = None,
    row_fisher: bool = False,
    padding: Tensor | None = None,
) -> Iterator[dict[str, Moments]]:
    """The moments of linear weights, a few layers at a time, from the last layers to the first.

    Memory: what lies between regions for all batches (in a decoder one residual stream for each half of a layer), the
    insides of one region for one batch, and the moments of that region's weights. What is yielded is complete, and the
    caller may rewrite the layers that read those weights before it goes on: gradients are those of the program as it
    was.

    Args:
        program: with linear layers in view, at stage canonical or rewritten.
        windows: see `token_batches`.
        names: qualified names of linear weights. A weight that several layers read gets the sum over them all; weights
            that read the same activations get one and the same `inputs`.
        batch: windows per run; the result does not depend on it.
        labels: `sampled` from the model's own predictions, for the Fisher information; or `text`, its next tokens.
        samples: labels drawn for each token (without logits: probes), at least 1.
        seed: of what is drawn.
        progress: called after each batch in each region of the graph, forward and backward.
        row_fisher: whether it is wanted; one product of a weight's size per window.
        padding: see `token_batches`; tokens that are padding have no loss and do not count.

    Raises:
        CalibrationError: CALIBRATION-001 no text, -003 values that are not finite, -004 text that does not fit.
        GraphError: GRAPH-002 where weights are on the meta device.
        OptionError: OPTION-002 for samples < 1, and for labels=text where no next token can be read.
    """
    check_range("samples", samples, low=1, high=2**16)
    batches = token_batches(program, windows, batch=batch, padding=padding)
    objective = objective_of(program, batches, labels=labels, samples=samples, seed=seed)
    readers = linear_readers(program, names)
    if not readers:
        return
    tokens = sum(count_tokens(entry) for entry in batches)
    statistics = _Statistics(
        [node for nodes in readers.values() for node in nodes],
        batches,
        row_fisher=row_fisher,
    )
    inputs = {name: frozenset(node.all_input_nodes[0] for node in nodes) for name, nodes in readers.items()}
    outputs = {name: frozenset(nodes) for name, nodes in readers.items()}
    passed: set[fx.Node] = set()
    for region in run_backward(
        program, batches, objective, statistics.collect, layers=statistics.gradients, progress=progress
    ):
        passed |= region.nodes
        complete = [name for name in outputs if passed.issuperset(readers[name])]
        if complete:
            # Read before the gradients' accumulators are let go.
            fisher = {name: statistics.row_fisher(readers[name], objective.draws) for name in complete}
            gradients = finished(complete, outputs, statistics.gradients)
            found = finished(complete, inputs, statistics.inputs)
            uses = {name: found[name].tokens / tokens for name in complete}
            moments = {
                name: Moments(found.pop(name), gradients.pop(name), fisher[name], uses[name]) for name in complete
            }
            yield moments


class _Statistics:
    """The sums of all layers, as they grow."""

    def __init__(self, layers: Sequence[fx.Node], batches: Sequence[Mapping[str, Tensor]], *, row_fisher: bool) -> None:
        self.gradients = {node: Accumulator() for node in layers}
        self.inputs = {node.all_input_nodes[0]: Accumulator() for node in layers}
        # How many batches of each input were added: layers that read one input show it once each.
        self._shown = dict.fromkeys(self.inputs, 0)
        self._counted = [real_tokens(batch) for batch in batches]
        self._windows = [len(next(iter(batch.values()))) for batch in batches]
        self._squares: dict[fx.Node, Tensor] | None = {} if row_fisher else None

    def collect(self, batch: int, layers: Sequence[Layer]) -> None:
        """Add one batch at the layers of one region."""
        for layer in layers:
            counted = counted_rows(layer.input, self._counted[batch])
            source = layer.node.all_input_nodes[0]
            if self._shown[source] == batch:
                self._shown[source] += 1
                if not self.inputs[source].add(layer.input, counted):
                    raise not_finite("activations of a layer", layer.node)
            for found in layer.gradients:
                out = layer.node.meta["val"].shape[-1]
                gradient = found if found is not None else layer.input.new_zeros(*layer.input.shape[:-1], out)
                if not self.gradients[layer.node].add(gradient, counted):
                    raise not_finite("gradients at a layer", layer.node)
                if self._squares is not None:
                    if counted is not None:
                        gradient = gradient * counted.view(*gradient.shape[:-1], 1)
                    squares = _row_squares(layer.input, gradient, self._windows[batch])
                    self._squares[layer.node] = self._squares.get(layer.node, 0.0) + squares

    def row_fisher(self, layers: Sequence[fx.Node], draws: int) -> Tensor | None:
        """Of a weight that these layers read, the mean over draws."""
        if self._squares is None:
            return None
        return torch.stack([self._squares.pop(node) for node in layers]).sum(0) / draws


def _row_squares(inputs: Tensor, gradients: Tensor, windows: int) -> Tensor:
    """The square of each window's gradient at the weight, summed over windows and columns: float64[out]."""
    x = inputs.float().reshape(windows, -1, inputs.shape[-1])
    g = gradients.float().reshape(windows, -1, gradients.shape[-1])
    # One window at a time: what a window gives is as large as the weight.
    return sum(
        ((g[window].mT @ x[window]).double().square().sum(1) for window in range(windows)),
        start=torch.zeros(g.shape[-1], dtype=torch.float64, device=g.device),
    )
