"""What the gradients of `skink.graph.gradients` are of: a model's loss on text, or its outputs themselves.

With logits, the loss is the negative log-likelihood of labels. Labels drawn from the model's own softmax make the
second moments of its gradients those of the Fisher information (Kunstner et al. 2019, arXiv 1905.12558, section 2);
the text's own next tokens make them those of the "empirical" one.

Without logits, it is the sum over outputs o of <v, o>, v ~ N(0, I) for each token and feature. As the gradient is
J^T v, its second moment is J^T J: the Gauss-Newton matrix of the squared error of o (Martens & Grosse 2015, arXiv
1503.05671, section 2). v is scaled so that the price 1/2 tr(G D C D^T) is a relative squared error |o' - o|^2 / |o|^2.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, fx

from skink.errors import OptionError
from skink.graph.calibration import counted_rows, real_tokens
from skink.graph.output_heads import predicts_next_tokens, results_by_name
from skink.graph.program import PADDING_INPUT, Program

Labels = Literal["sampled", "text"]

# Most numbers of logits that are held in float32 beside the model's own: 64 MiB.
_CHUNK = 2**24


def objective_of(
    program: Program, batches: Sequence[Mapping[str, Tensor]], *, labels: Labels, samples: int, seed: int
) -> "LogLikelihood | Probes":
    """The loss of a program with an output `logits`, else its outputs under random probes.

    Raises:
        OptionError: OPTION-002 for labels=text where no next token can be read.
    """
    named = results_by_name(program)
    if isinstance(named.get("logits"), fx.Node):
        if labels == "text" and not predicts_next_tokens(program):
            raise OptionError(
                "OPTION-002",
                "labels='text' needs a decoder: logits of the token after each one of input_ids.",
                fix="take labels='sampled'.",
            )
        return LogLikelihood(named["logits"], batches, labels=labels, samples=samples, seed=seed)
    if labels == "text":
        raise OptionError(
            "OPTION-002",
            f"labels='text' needs a model with logits; this one gives {', '.join(program.outputs)}.",
            fix="take labels='sampled'.",
        )
    nodes = [node for node in dict.fromkeys(named.values()) if isinstance(node, fx.Node) and node.op == "call_function"]
    return Probes(nodes, batches, samples=samples, seed=seed)


def loss_unit(program: Program) -> str:
    """Of the prices that `objective_of` leads to, in words that go after a number."""
    return "nats per token" if "logits" in program.outputs else "of the results' squared norm"


class _Draws:
    """Generators for each draw and window, so that numbers do not depend on how windows are put into batches."""

    def __init__(self, sizes: Sequence[int], draws: int, seed: int) -> None:
        source = torch.Generator().manual_seed(seed)
        seeds = torch.randint(2**62, (draws, sum(sizes)), generator=source)
        self._seeds = [part.tolist() for part in seeds.split(list(sizes), dim=1)]

    def uniform(self, batch: int, draw: int, rows: int) -> Tensor:
        """Numbers in [0, 1) for the rows of a batch: float64[rows]."""
        return self._each(
            batch, draw, rows, lambda count, source: torch.rand(count, generator=source, dtype=torch.float64)
        )

    def normal(self, batch: int, draw: int, numbers: int) -> Tensor:
        """Numbers of mean 0 and variance 1: float32[numbers]."""
        return self._each(batch, draw, numbers, lambda count, source: torch.randn(count, generator=source))

    def _each(self, batch: int, draw: int, numbers: int, make: Callable[[int, torch.Generator], Tensor]) -> Tensor:
        seeds = self._seeds[batch][draw]
        return torch.cat([make(numbers // len(seeds), torch.Generator().manual_seed(seed)) for seed in seeds])


def _sizes(batches: Sequence[Mapping[str, Tensor]]) -> list[int]:
    return [len(next(iter(batch.values()))) for batch in batches]


class LogLikelihood:
    """The negative log-likelihood in nats, summed over all tokens that are no padding.

    Args:
        node: the logits, float[B, ..., V]; one row of them is one label.
        batches: inputs by name.
        labels: `sampled`: drawn from the softmax, at every row; `text`: the next token, for all but the last, of a
            program that predicts it.
        samples: labels per row, each with a gradient of its own; for `text` there is one.
        seed: of the draws.
    """

    observes = False

    def __init__(
        self, node: fx.Node, batches: Sequence[Mapping[str, Tensor]], *, labels: Labels, samples: int, seed: int
    ) -> None:
        self.nodes, self.draws = (node,), samples if labels == "sampled" else 1
        self._batches, self._sampled = batches, labels == "sampled"
        self._draws = _Draws(_sizes(batches), self.draws, seed)

    def observe(self, node: fx.Node, value: Tensor, batch: int) -> None:
        """Nothing is needed beforehand."""

    def gradient(self, node: fx.Node, value: Tensor, batch: int, draw: int) -> Tensor:
        """softmax(logits) less 1 at the label; 0 where there is none."""
        rows = value.reshape(-1, value.shape[-1])
        counted = self._counted(value, batch)
        result = torch.empty_like(rows)
        # Numbers in [0, 1) to draw labels by, or the labels themselves.
        given = self._draws.uniform(batch, draw, len(rows)) if self._sampled else self._next_tokens(batch)
        given = given.to(rows.device)
        step = max(1, _CHUNK // rows.shape[-1])
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            share = rows[part].to(torch.promote_types(rows.dtype, torch.float32)).softmax(-1)
            label = _drawn(share, given[part]) if self._sampled else given[part]
            share.scatter_add_(1, label[:, None], share.new_full((len(label), 1), -1.0))
            result[part] = share if counted is None else share.masked_fill_(~counted[part, None], 0.0)
        return result.reshape(value.shape)

    def _next_tokens(self, batch: int) -> Tensor:
        """The next token of each; the last one's does not count."""
        return self._batches[batch]["input_ids"].roll(-1, dims=1).reshape(-1)

    def _counted(self, value: Tensor, batch: int) -> Tensor | None:
        """Which rows have a label."""
        inputs = self._batches[batch]
        real = real_tokens(inputs)
        if self._sampled:
            return counted_rows(value, real)
        has_next = torch.ones(value.shape[:2], dtype=torch.bool, device=value.device)
        has_next[:, -1] = False
        if real is not None:
            has_next[:, :-1] = real[:, :-1] & real[:, 1:]
        return has_next.reshape(-1)


def _drawn(share: Tensor, number: Tensor) -> Tensor:
    """One label of each row: the first at which the sum of the shares passes the row's number."""
    sums = share.cumsum(-1)
    # Of the sum that was reached, not of 1, so that rounding leaves no gap at the end.
    wanted = (number.to(sums.dtype) * sums[:, -1])[:, None]
    return torch.searchsorted(sums, wanted, right=True).clamp_(max=share.shape[-1] - 1).squeeze(1)


class Probes:
    """<v, o> for each output o, v random with mean 0 and variance 2 N / (n S).

    N tokens, S sum of squares of o, n its rows (as many as tokens, or one for each window): then the price of an error
    is the relative squared error of each output, summed over outputs.

    Args:
        nodes: outputs, float[B, ...].
        batches: inputs by name.
        samples: draws of v.
        seed: of the draws.
    """

    observes = True

    def __init__(
        self, nodes: Sequence[fx.Node], batches: Sequence[Mapping[str, Tensor]], *, samples: int, seed: int
    ) -> None:
        self.nodes, self.draws = tuple(nodes), samples
        self._batches = batches
        sizes = _sizes(batches)
        self._draws = {node: _Draws(sizes, samples, seed + index) for index, node in enumerate(nodes)}
        self._squares = dict.fromkeys(nodes, 0.0)
        self._tokens = sum(count_tokens(batch) for batch in batches)

    def observe(self, node: fx.Node, value: Tensor, batch: int) -> None:
        """Add up its square."""
        rows, counted = value.reshape(-1, value.shape[-1]), self._counted(value, batch)
        self._squares[node] += float((rows if counted is None else rows[counted]).double().square().sum())

    def gradient(self, node: fx.Node, value: Tensor, batch: int, draw: int) -> Tensor:
        """v itself; 0 where the row is padding."""
        probe = self._draws[node].normal(batch, draw, value.numel()).to(value.device).reshape(-1, value.shape[-1])
        counted = self._counted(value, batch)
        if counted is not None:
            probe.masked_fill_(~counted[:, None], 0.0)
        # An output that is 0 everywhere has no relative error: any change of it is infinitely large.
        probe *= (2.0 * self._tokens / self._squares[node]) ** 0.5 if self._squares[node] else torch.inf
        return probe.reshape(value.shape).to(value.dtype)

    def _counted(self, value: Tensor, batch: int) -> Tensor | None:
        inputs = self._batches[batch]
        return counted_rows(value, real_tokens(inputs))


def count_tokens(batch: Mapping[str, Tensor]) -> int:
    """How many tokens of a batch are text; of examples that are no tokens, how many rows."""
    if PADDING_INPUT in batch:
        return int((batch[PADDING_INPUT] != 0).sum())
    main = next(iter(batch.values()))
    return main[..., 0].numel() if main.is_floating_point() else main.numel()
