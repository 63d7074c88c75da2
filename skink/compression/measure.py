"""Measures the source, the captured and the compressed model side by side, and writes down what came out."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from skink.compression.compress import Compression
from skink.evaluation import Perplexity as MeasuredPerplexity
from skink.evaluation import Speed as MeasuredSpeed
from skink.evaluation import Spread, machine
from skink.evaluation import perplexity as measure_perplexity
from skink.export import report as rep
from skink.export.report.measures import Setting
from skink.graph.cost import ProgramCost
from skink.graph.objective import loss_unit
from skink.graph.passes import LayerRecord
from skink.graph.run import PassRecord
from skink.graph.windows import Windows

SOURCE = "transformers"
DENSE = "skink, empty recipe"
RESULT = "skink, compressed"
RUNTIME = "ONNX Runtime, compressed"


@dataclass(frozen=True)
class SpeedOptions:
    """The workload that speed is measured on.

    Args:
        batch: sequences at once.
        prompt: tokens in each prompt.
        new_tokens: tokens generated one by one after it.
        rounds: how often each model runs, in turn with the others.
    """

    batch: int = 1
    prompt: int = 128
    new_tokens: int = 64
    rounds: int = 7


@dataclass(frozen=True)
class Measured:
    """One form of the model: its size, and what was measured of it.

    Args:
        cost: in the dtype that it is stored in.
        perplexity: on held-out text.
        speed: of generation.
        linear_seconds: that its linear layers take for the workload that `speed` was measured on.
    """

    cost: ProgramCost
    perplexity: MeasuredPerplexity | None = None
    speed: MeasuredSpeed | None = None
    linear_seconds: Spread | None = None
    quality: tuple[rep.Quality, ...] = ()


def score(model: Any, windows: Windows) -> MeasuredPerplexity:
    """Perplexity of a model on windows, with their source among its settings."""
    measured = measure_perplexity(model, windows.tokens)
    return MeasuredPerplexity(**{**asdict(measured), "source": windows.source, "data_hash": windows.sha256})


def speed_notes(forms: Mapping[str, Measured]) -> list[str]:
    """What the recipe did to speed, said plainly: against the same form without it, so that form's gain is left out."""
    before, after = forms[DENSE].speed, forms[RESULT].speed
    if before is None or after is None:
        return []
    notes = []
    for what, old, new in (("decode", before.decode, after.decode), ("prefill", before.prefill, after.prefill)):
        ratio = new.median / old.median
        if new.low > old.high:
            notes.append(f"{what}: the recipe makes it {ratio:.2f} times as fast as the same form without it.")
        elif new.high < old.low:
            notes.append(f"{what}: the recipe gives no speed-up here, it is {ratio:.2f} times as fast as without it.")
        else:
            noise = f"({ratio:.2f}, with ranges that overlap)"
            notes.append(f"{what}: no speed-up from the recipe can be told from noise here {noise}.")
    return notes


def build_report(
    done: Compression,
    forms: Mapping[str, Measured],
    comparisons: Mapping[str, Measured],
    *,
    name: str,
    calibration: Windows | None,
    seed: int,
    dtype: str,
    notes: list[str],
    layer_losses: Mapping[str, float] | None = None,
) -> rep.Report:
    """Everything that was done and measured, as a report; `layer_losses` are what single layers added, by name."""
    here = machine()
    dense = next(iter(forms.values()))
    return rep.Report(
        skink_version=version("skink"),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        source=rep.Source(name=name, model_type=str(done.program.origin.get("model_type", ""))),
        title=f"{name}, {str(done.recipe) or 'empty recipe'}",
        recipe=rep.Recipe(line=done.recipe.describe(), yaml=done.recipe.to_yaml()),
        calibration=None
        if calibration is None
        else rep.Calibration(
            source=calibration.source,
            sha256=calibration.sha256,
            windows=calibration.tokens.shape[0],
            window_length=calibration.tokens.shape[1],
            seed=seed,
        ),
        dtype=dtype,
        machine={key: str(value) for key, value in asdict(here).items() if value not in (None, "")},
        versions={package: version(package) for package in ("torch", "transformers", "onnxruntime", "safetensors")},
        seed=seed,
        forms=[_form(form, measured) for form, measured in forms.items()],
        passes=[_pass_record(record) for record in done.result.passes],
        savings=savings(forms),
        layers=[_layer(layer, (layer_losses or {}).get(layer.name)) for layer in done.result.layers],
        comparisons=_comparisons(comparisons, dense),
        recoveries=[
            rep.Recovery(name=str(record.pass_), **record.result.training)
            for record in done.result.passes
            if record.result.training is not None
        ],
        loss_unit=loss_unit(done.dense),
        notes=notes,
    )


def savings(forms: Mapping[str, Measured]) -> list[rep.Saving]:
    """What the recipe saves in each unit: the result against the same form without it, so that form's gain is left out.

    Latency is the time to read the prompt and then to step `new_tokens` times.
    """
    if DENSE not in forms or RESULT not in forms:
        return []
    before, after = forms[DENSE], forms[RESULT]

    def counted(name: str) -> rep.Saved:
        ends = [rep.Amount(value=getattr(each.cost, name)) for each in (before, after)]
        return rep.Saved(before=ends[0], after=ends[1])

    found = [
        rep.Saving(unit="params", linear=counted("linear_parameters"), model=counted("parameters")),
        rep.Saving(unit="bytes", linear=counted("linear_bytes"), model=counted("bytes")),
        rep.Saving(
            unit="flops",
            linear=counted("linear_macs_per_token"),
            model=counted("macs_per_token"),
            settings={"context": f"{after.cost.context} tokens"},
        ),
    ]
    linear = _saved(before.linear_seconds, after.linear_seconds)
    model = _saved(_seconds(before.speed), _seconds(after.speed))
    if after.speed is not None and (linear or model):
        settings = {key: value for key, value in _speed_settings(after.speed).items() if key != "seed"}
        found.append(rep.Saving(unit="latency", linear=linear, model=model, settings=settings))
    return found


def _seconds(speed: MeasuredSpeed | None) -> Spread | None:
    """Seconds to read the prompt and then to step `new_tokens` times."""
    if speed is None:
        return None
    first, tokens = speed.first_token, speed.batch * speed.new_tokens
    return Spread(
        first.median + tokens / speed.decode.median,
        first.low + tokens / speed.decode.high,
        first.high + tokens / speed.decode.low,
    )


def _saved(before: Spread | None, after: Spread | None) -> rep.Saved | None:
    if before is None or after is None:
        return None
    ends = [rep.Amount(value=spread.median, low=spread.low, high=spread.high) for spread in (before, after)]
    return rep.Saved(before=ends[0], after=ends[1])


def _comparisons(comparisons: Mapping[str, Measured], dense: Measured) -> list[rep.Comparison]:
    return [
        rep.Comparison(
            name=text,
            keep=measured.cost.linear_parameters / dense.cost.linear_parameters,
            perplexity=measured.perplexity.value,
            ratio_to_dense=measured.perplexity.value / dense.perplexity.value,
            settings=_perplexity_settings(measured.perplexity),
        )
        for text, measured in comparisons.items()
        if measured.perplexity is not None and dense.perplexity is not None
    ]


def _form(name: str, measured: Measured) -> rep.Form:
    perplexity, speed = measured.perplexity, measured.speed
    return rep.Form(
        name=name,
        parameters=measured.cost.parameters,
        linear_parameters=measured.cost.linear_parameters,
        bytes=measured.cost.bytes,
        macs_per_token=measured.cost.macs_per_token,
        context=measured.cost.context,
        perplexity=None
        if perplexity is None
        else rep.Perplexity(
            value=perplexity.value, nats=perplexity.nats_per_token, settings=_perplexity_settings(perplexity)
        ),
        speed=None if speed is None else _speed(speed),
        quality=list(measured.quality),
    )


def _perplexity_settings(measured: MeasuredPerplexity) -> dict[str, Setting]:
    settings = {key: value for key, value in asdict(measured).items() if key not in ("value", "nats_per_token")}
    settings["data_hash"] = measured.data_hash[:12]
    return {key: value for key, value in settings.items() if value is not None}


def _speed(measured: MeasuredSpeed) -> rep.Speed:
    return rep.Speed(
        prefill=_rate(measured.prefill),
        decode=_rate(measured.decode),
        first_token_ms=measured.first_token.median * 1e3,
        prefill_ratio=measured.prefill_ratio.median,
        decode_ratio=measured.decode_ratio.median,
        settings=_speed_settings(measured),
    )


def _speed_settings(measured: MeasuredSpeed) -> dict[str, Setting]:
    return {key: getattr(measured, key) for key in ("batch", "prompt", "new_tokens", "rounds", "seed")}


def _rate(spread: Spread) -> rep.Rate:
    return rep.Rate(median=spread.median, min=spread.low, max=spread.high)


def _pass_record(record: PassRecord) -> rep.PassRecord:
    text = str(record.pass_)
    return rep.PassRecord(
        name=record.pass_.name,
        options=text.removeprefix(record.pass_.name).strip("{}"),
        seconds=record.seconds,
        edits=record.result.edits,
        error=None if record.numbers is None else record.numbers.relative,
        kl=None if record.numbers is None else record.numbers.divergence,
        verified=record.verified,
        skipped=len(record.result.refused),
        rejections=[rep.Rejection(where=where, reason=reason) for where, reason in record.rejections()],
        notes=[] if record.result.training is not None else list(record.result.notes),
    )


def _layer(layer: LayerRecord, measured_loss: float | None) -> rep.LayerRecord:
    return rep.LayerRecord(**{**asdict(layer), "shape": layer.shape}, measured_loss=measured_loss)
