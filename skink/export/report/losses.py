"""What the edits were predicted to add to the loss, beside what was measured; all in the report's `loss_unit`."""

from skink.export.report import formatting as fmt
from skink.export.report.layers import KEPT
from skink.export.report.measures import RELATIVE_ERROR
from skink.export.report.model import Report
from skink.export.report.summary import smallest

# Losses that differ by less are the same up to rounding.
_ROUNDING = 1e-7


def loss_sentence(report: Report) -> str:
    """The sums over all layers, predicted and measured; "" where nothing was predicted."""
    predicted = [layer.predicted_loss for layer in report.layers if layer.predicted_loss is not None]
    if not predicted:
        return ""
    text = f"Predicted to add {nats(sum(predicted))} {report.loss_unit} in all"
    missing = sum(layer.decision != KEPT and layer.predicted_loss is None for layer in report.layers)
    text += f", and {missing} layers without a prediction" if missing else ""
    both = [
        (layer.predicted_loss, layer.measured_loss)
        for layer in report.layers
        if layer.predicted_loss is not None and layer.measured_loss is not None
    ]
    if both:
        text += f"; measured one by one, {len(both)} layers add {nats(sum(measured for _, measured in both))}"
        text += f" where {nats(sum(expected for expected, _ in both))} was predicted"
    together = _together(report)
    text += f"; measured, all of them at once add {nats(together)}" if together is not None else ""
    return text + "."


def nats(value: float | None) -> str:
    """A loss as the reader sees it."""
    if value is None:
        return fmt.MISSING
    return fmt.plain(0.0 if abs(value) < _ROUNDING else value, 3)


def _together(report: Report) -> float | None:
    """What the whole recipe added on held-out text, where both ends were measured alike."""
    index = smallest(report)
    if index is None:
        return None
    for measure in report.forms[index].quality:
        if measure.name == RELATIVE_ERROR:
            return measure.value
    before, after = report.forms[0].perplexity, report.forms[index].perplexity
    comparable = before is not None and after is not None and before.settings == after.settings
    return after.nats - before.nats if comparable else None  # type: ignore[union-attr]
