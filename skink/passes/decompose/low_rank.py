"""Replace a linear layer by two thin ones.

    y = x W^T + b   ->   y = (x down^T) up^T + b      W: [out, in], down: [R, in], up: [out, R]

R = floor(keep * out * in / (out + in)), the same share for every layer. Exactness: approximate; the relative error of
each layer's output on calibration text is known beforehand (the discarded energy) and recorded.
Source: SVD-LLM (arXiv 2403.07378), Swift-SVD (arXiv 2604.01609); see `skink.passes.decompose.factorize`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx

from skink.errors import CalibrationError, GraphError, OptionError, check_range
from skink.graph.calibration import Covariance, stream_covariances
from skink.graph.passes import Context, LayerRecord, Pass, PassResult
from skink.graph.pattern import NoMatch
from skink.graph.program import Program, Stage
from skink.graph.rewriter import Rewriter, describe
from skink.passes.decompose.factorize import Factors, plain, saves, uniform_rank, whitened
from skink.passes.decompose.selection import LinearLayer, linear_layers, output_heads, structural_reason

RULE = "linear-to-low-rank"


@dataclass(frozen=True)
class LowRank(Pass):
    """Options of the pass.

    Args:
        keep: share of the parameters of each factored weight that is kept, in (0, 1].
        method: `whitened` loses the least of each layer's output on calibration text; `plain`, the truncated SVD, the
            least of the weight, and needs no text.
        targets: shell-style patterns on layers' qualified names, as `*.mlp.*`; empty: every linear layer but the output
            head.
        ignore: patterns of layers to leave alone.
    """

    keep: float = 0.8
    method: Literal["whitened", "plain"] = "whitened"
    targets: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()

    name: ClassVar[str] = "low-rank"
    summary: ClassVar[str] = "replace linear layers by two thin ones"
    requires: ClassVar[Stage] = Stage.CANONICAL
    yields: ClassVar[Stage | None] = Stage.REWRITTEN
    exactness: ClassVar[Literal["exact", "approximate"]] = "approximate"

    def __post_init__(self) -> None:
        check_range("low-rank.keep", self.keep, low=0.0, high=1.0, open_low=True)

    @property
    def needs_calibration(self) -> bool:
        return self.method == "whitened"

    def run(self, program: Program, rewriter: Rewriter, context: Context) -> PassResult:
        """Factor what is chosen.

        Raises:
            CalibrationError: CALIBRATION-001 to -004, see `stream_covariances`.
            GraphError: GRAPH-002 where weights are on the meta device.
            OptionError: OPTION-002 where targets match no layer.
        """
        layers = linear_layers(program)
        notes = self._check_patterns(layers)
        heads = output_heads(program)
        chosen: dict[str, LinearLayer] = {}
        refused: list[NoMatch] = []
        records: dict[str, LayerRecord] = {}
        for layer in layers:
            unwanted = self._unwanted(layer)
            reason = unwanted or self._reason_against(layer, heads)
            if reason is None:
                _refuse_meta(program, layer)
                chosen[layer.weight] = layer
                continue
            records[layer.weight] = _kept_dense(layer, reason)
            if unwanted is None:
                refused.append(NoMatch(reason, layer.readers[0]))
        for name, factors, tokens in self._factors(program, chosen, context):
            layer = chosen[name]
            if factors is None:
                records[name] = _kept_dense(layer, "the weight is not finite")
                refused.append(NoMatch("the weight is not finite", layer.readers[0]))
                continue
            records[name] = _replace(program, rewriter, layer, factors)
            if tokens is not None and tokens < layer.shape[1]:
                notes.append(
                    f"{layer.name}: {tokens} tokens of calibration text for {layer.shape[1]} input features; "
                    "directions that they do not reach are kept by the weight's size."
                )
        rewriter.finish()
        return PassResult(
            edits=rewriter.count,
            refused=tuple(refused),
            layers=tuple(records[layer.weight] for layer in layers),
            notes=tuple(notes),
        )

    def _check_patterns(self, layers: list[LinearLayer]) -> list[str]:
        """Notes on patterns that fit no layer; an error where that leaves nothing to do."""
        idle = [pattern for pattern in self.targets if not any(layer.matches((pattern,)) for layer in layers)]
        if idle and len(idle) == len(self.targets):
            names = [layer.name for layer in layers]
            raise OptionError(
                "OPTION-002",
                f"low-rank.targets={list(self.targets)} match none of the {len(names)} linear layers.",
                why=f"layers are {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}.",
                fix="use shell-style patterns on these names, as '*.mlp.*'.",
            )
        idle += [pattern for pattern in self.ignore if not any(layer.matches((pattern,)) for layer in layers)]
        return [f"no linear layer is named like {pattern!r}." for pattern in idle]

    def _unwanted(self, layer: LinearLayer) -> str | None:
        if self.targets and not layer.matches(self.targets):
            return "not among the targets"
        return "ignored, as asked" if layer.matches(self.ignore) else None

    def _reason_against(self, layer: LinearLayer, heads: frozenset[fx.Node]) -> str | None:
        reason = structural_reason(layer, heads, asked=bool(self.targets))
        if reason is not None:
            return reason
        rank, most = uniform_rank(self.keep, *layer.shape), uniform_rank(1.0, *layer.shape)
        if rank == 0:
            return f"keep={self.keep:g} of {layer.shape[0]}x{layer.shape[1]} leaves no rank"
        if not saves(rank, layer.shape):
            return f"rank {rank} of {layer.shape[0]}x{layer.shape[1]} saves nothing; break-even is {most}"
        return None

    def _factors(
        self, program: Program, chosen: dict[str, LinearLayer], context: Context
    ) -> Iterator[tuple[str, Factors | None, int | None]]:
        """Weight, factors (None where it has none) and the calibration tokens behind them, one weight at a time."""
        progress = _Progress(context, len(chosen))
        if self.method == "plain":
            for name, layer in chosen.items():
                yield name, self._factor(program.weight(name), layer, None), None
                progress.factored()
            return
        if context.calibration is None:
            raise CalibrationError(
                "CALIBRATION-002",
                "low-rank with method=whitened needs calibration text, and none was given.",
                fix="give calibration text, or choose method=plain.",
            )
        if not chosen:
            return
        for found in stream_covariances(program, context.calibration, list(chosen), progress=progress.calibrated):
            for name in list(found):
                factors = self._factor(program.weight(name), chosen[name], found[name])
                # Taken out of the dictionary: its memory is free once the last weight that shares it is done.
                yield name, factors, found.pop(name).tokens
                progress.factored()

    def _factor(self, weight: Tensor, layer: LinearLayer, covariance: Covariance | None) -> Factors | None:
        if not torch.isfinite(weight).all():
            return None
        rank = uniform_rank(self.keep, *layer.shape)
        return plain(weight, rank) if covariance is None else whitened(weight, covariance.total, rank)


class _Progress:
    """Steps of calibration and weights factored, as one count."""

    def __init__(self, context: Context, weights: int) -> None:
        self._report = context.progress
        self._weights = weights
        self._factored = 0
        self._steps = (0, 0)

    def calibrated(self, done: int, total: int) -> None:
        self._steps = (done, total)
        self._report(self._factored + done, self._weights + total)

    def factored(self) -> None:
        self._factored += 1
        self.calibrated(*self._steps)


def _refuse_meta(program: Program, layer: LinearLayer) -> None:
    if program.weight(layer.weight).is_meta:
        raise GraphError(
            "GRAPH-002",
            f"the weight {layer.weight!r} is on the meta device: it has a shape but no values to factor.",
            where=describe(layer.readers[0]),
            fix="load the checkpoint with its weights, then capture again.",
        )


def _kept_dense(layer: LinearLayer, reason: str) -> LayerRecord:
    return LayerRecord(
        name=layer.name,
        kind="linear",
        shape=layer.shape,
        decision="kept dense",
        parameters_before=layer.parameters,
        parameters_after=layer.parameters,
        reason=reason,
    )


def _replace(program: Program, rewriter: Rewriter, layer: LinearLayer, factors: Factors) -> LayerRecord:
    rank = factors.up.shape[1]
    error = factors.predicted_error if factors.predicted_error is not None else factors.weight_error
    detail = f"rank {rank} of {min(layer.shape)}, relative error {error:.4g}"
    is_buffer = layer.weight in program.buffers
    prefix = _free_prefix(program, layer.weight)
    bias_name = layer.weight.removesuffix("weight") + "bias"
    owns_bias = _owns_bias(layer, bias_name)
    with rewriter.before(layer.readers[0]):
        down = rewriter.weight(f"{prefix}down.weight", factors.down, buffer=is_buffer)
        up = rewriter.weight(f"{prefix}up.weight", factors.up, buffer=is_buffer)
        bias = None
        if owns_bias:
            tensor = program.weight(bias_name)
            bias = rewriter.weight(f"{prefix}up.bias", tensor, buffer=bias_name in program.buffers)
    for node in layer.readers:
        own = bias if bias is not None else (node.args[2] if len(node.args) > 2 else None)
        with rewriter.before(node):
            inner = rewriter.call(node.target, node.args[0], down, rule=RULE)
            outer = rewriter.call(node.target, inner, up, *([own] if own is not None else []), rule=RULE)
        rewriter.replace(node, outer, rule=RULE, detail=detail)
        rewriter.erase_dead(node)
    # The dense weight goes at once, so that its memory is free before the next one is factored.
    program.drop_unused_weights()
    return LayerRecord(
        name=layer.name,
        kind="linear",
        shape=layer.shape,
        decision="factored",
        parameters_before=layer.parameters,
        parameters_after=factors.up.numel() + factors.down.numel(),
        rank=rank,
        predicted_error=factors.predicted_error,
        weight_error=factors.weight_error,
        baseline_error=factors.plain_error,
    )


def _owns_bias(layer: LinearLayer, bias_name: str) -> bool:
    """Whether every reader adds the layer's own bias, which nothing else reads."""
    biases = {node.args[2] if len(node.args) > 2 else None for node in layer.readers}
    bias = next(iter(biases))
    return (
        len(biases) == 1
        and isinstance(bias, fx.Node)
        and bias.op == "get_attr"
        and bias.target == bias_name
        and set(bias.users) <= set(layer.readers)
    )


def _free_prefix(program: Program, weight: str) -> str:
    """Where the factors go: below the layer, `q_proj.` for `q_proj.weight`, unless names there are taken."""
    owner, _, leaf = weight.rpartition(".")
    prefix = (f"{owner}." if owner else "") if leaf == "weight" else f"{weight}_factored."
    taken = {name for name, _ in program.weights()}
    while taken & {f"{prefix}down.weight", f"{prefix}up.weight", f"{prefix}up.bias"}:
        prefix = f"{prefix.removesuffix('.')}_factored."
    return prefix
