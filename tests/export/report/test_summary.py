from skink.export.report import Quality
from skink.export.report import formatting as fmt
from skink.export.report.summary import headline, settings_lines, smallest


def cells(report, label):
    return next(row.cells for row in headline(report) if row.label == label)


def replaced(report, index, **changes):
    forms = list(report.forms)
    forms[index] = forms[index].model_copy(update=changes)
    return report.model_copy(update={"forms": forms})


def test_size_is_always_shown_as_parameters_bytes_macs_and_speed(report):
    labels = [row.label for row in headline(report) if not row.minor]
    assert labels == [
        "Parameters", "Bytes", "MACs per token", "Perplexity", "Prefill, tok/s", "Decode, tok/s", "First token, ms",
    ]  # fmt: skip


def test_ratios_are_to_the_first_form(report):
    first, empty, compressed = cells(report, "Parameters")
    assert (first.text, first.ratio) == ("7.24 M", None)
    assert (empty.ratio, empty.tone) == (1.0, "even")
    assert compressed.ratio_text == f"{fmt.TIMES}0.855"
    assert compressed.tone == "better"


def test_more_perplexity_is_worse_and_more_speed_is_better(report):
    assert cells(report, "Perplexity")[2].tone == "worse"
    assert cells(report, "nats/token")[2].ratio_text == "+0.0065"
    assert cells(report, "Decode, tok/s")[2].tone == "better"


def test_a_measured_ratio_goes_before_that_of_the_medians(report):
    assert cells(report, "Decode, tok/s")[2].ratio == 1.61
    assert cells(report, "Prefill, tok/s")[2].ratio == 3642 / 3211


def test_speeds_whose_repeats_overlap_are_neither_better_nor_worse(report):
    assert cells(report, "Prefill, tok/s")[1].tone == "even"
    assert cells(report, "Prefill, tok/s")[1].ratio_text == f"{fmt.TIMES}1.02"


def test_numbers_measured_under_other_settings_are_not_compared(report):
    perplexity = report.forms[2].perplexity.model_copy(update={"settings": {"windows": 8}})
    speed = report.forms[2].speed.model_copy(update={"settings": {"threads": 1}, "decode_ratio": None})
    other = replaced(report, 2, perplexity=perplexity, speed=speed, context=8)
    for label in ("Perplexity", "nats/token", "MACs per token", "Decode, tok/s", "First token, ms"):
        assert cells(other, label)[2].ratio_text == "", label
    lines = {line.label: line.text for line in settings_lines(other)}
    assert lines["Perplexity, skink, compressed"] == "windows 8"
    assert lines["Speed, skink, compressed"] == "threads 1"
    assert "context 8 tokens" in lines["MACs, skink, compressed"]


def test_shared_settings_are_told_once(report):
    assert [(line.label, line.text) for line in settings_lines(report)] == [
        ("MACs", "context 256 tokens · linear layers and attention; 1 MAC is 2 FLOPs"),
        ("Perplexity", "text held-out · windows 64 · window length 256"),
        ("Speed", "threads 4 · prompt 128 · output 64 · repeats 7"),
    ]


def test_one_form_without_a_measurement_leaves_a_gap(report):
    row = cells(replaced(report, 1, perplexity=None, speed=None), "Decode, tok/s")
    assert [cell.text for cell in row] == ["182.3", fmt.MISSING, "287.1"]
    first_missing = cells(replaced(report, 0, perplexity=None, speed=None), "Perplexity")
    assert first_missing[2].ratio is None


def test_nothing_measured_is_said(report):
    plain = report.model_copy(
        update={"forms": [form.model_copy(update={"perplexity": None, "speed": None}) for form in report.forms]}
    )
    assert [row.label for row in headline(plain)] == ["Parameters", "linear layers", "Bytes", "MACs per token"]
    assert [line.text for line in settings_lines(plain)][1:] == ["not measured", "not measured"]


def test_smallest_is_never_the_reference(report):
    assert smallest(report) == 2
    assert smallest(report.model_copy(update={"forms": report.forms[:1]})) is None


def test_other_measures_of_quality_stand_in_the_table_with_their_settings(report):
    settings = {"texts": 5}
    recall = [Quality(name="Recall", value=value, better="more", settings=settings) for value in (0.8, 0.4, 0.9)]
    divergence = Quality(name="Divergence", value=0.5, better="less", settings=settings)
    changed = replaced(report, 0, quality=[recall[0]], perplexity=None)
    changed = replaced(changed, 1, quality=[recall[1], divergence], perplexity=None)
    first, second, *_ = cells(changed, "Recall")
    assert (first.text, first.ratio) == ("0.8000", None)
    assert (second.ratio_text, second.tone) == (f"{fmt.TIMES}0.5000", "worse")
    # What compares with the first form has nothing to be divided by.
    assert [cell.ratio for cell in cells(changed, "Divergence")][:2] == [None, None]
    assert "texts 5" in next(line.text for line in settings_lines(changed) if line.quantity == "Quality")
