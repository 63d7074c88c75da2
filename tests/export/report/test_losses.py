"""Predicted losses beside measured ones."""

import math

from skink.export.report import formatting as fmt
from skink.export.report.losses import loss_sentence, nats
from skink.export.report.measures import RELATIVE_ERROR, Quality


def with_layers(report, **changes):
    layers = [layer.model_copy(update=changes) if layer.rank else layer for layer in report.layers]
    return report.model_copy(update={"layers": layers})


def test_the_sum_of_predictions_beside_what_all_added_at_once(report):
    added = fmt.plain(math.log(4.3401) - math.log(4.3121), 3)
    assert loss_sentence(report) == (
        f"Predicted to add 0.00400 nats per token in all; measured, all of them at once add {added}."
    )


def test_layers_measured_one_by_one(report):
    text = loss_sentence(with_layers(report, measured_loss=0.0006))
    assert "measured one by one, 8 layers add 0.00480 where 0.00400 was predicted; measured, all" in text


def test_layers_without_a_prediction_are_counted(report):
    layers = list(report.layers)
    layers[0] = layers[0].model_copy(update={"predicted_loss": None})
    text = loss_sentence(report.model_copy(update={"layers": layers}))
    assert text.startswith("Predicted to add 0.00350 nats per token in all, and 1 layers without a prediction")


def test_numbers_measured_under_other_settings_are_not_compared(report):
    forms = list(report.forms)
    other = forms[2].perplexity.model_copy(update={"settings": {"windows": 8}})
    forms[2] = forms[2].model_copy(update={"perplexity": other})
    text = loss_sentence(report.model_copy(update={"forms": forms}))
    assert text == "Predicted to add 0.00400 nats per token in all."


def test_one_form_has_nothing_to_compare_with(report):
    assert "measured" not in loss_sentence(report.model_copy(update={"forms": report.forms[:1]}))


def test_nothing_predicted_says_nothing(report, bare):
    assert loss_sentence(with_layers(report, predicted_loss=None)) == ""
    assert loss_sentence(bare) == ""


def test_rounding_is_no_loss():
    assert (nats(None), nats(-1e-9), nats(-0.00125)) == (fmt.MISSING, "0", f"{fmt.MINUS}0.00125")


def test_an_encoders_losses_are_of_its_results(report):
    forms = list(report.forms)
    error = Quality(name=RELATIVE_ERROR, value=0.0125, better="less", settings={"texts": 20})
    forms[2] = forms[2].model_copy(update={"perplexity": None, "quality": [error]})
    text = loss_sentence(report.model_copy(update={"forms": forms, "loss_unit": "of the results' squared norm"}))
    assert text == (
        "Predicted to add 0.00400 of the results' squared norm in all; measured, all of them at once add 0.0125."
    )
