"""What "20% smaller" means, as it is shown."""

from skink.export.report import formatting as fmt
from skink.export.report.savings import card_section, saving_lines, saving_rows


def shown(report) -> list[tuple[str, str, str]]:
    rows = saving_rows(report)
    return [
        (row.label, f"{row.linear.text} {row.linear.ratio_text}", f"{row.model.text} {row.model.ratio_text}")
        for row in rows
    ]


def test_every_unit_at_once_of_the_linear_layers_and_of_all(report):
    minus = fmt.MINUS
    assert shown(report) == [
        ("Parameters", f"5.24 M → 4.19 M {minus}20.0%", f"7.24 M → 6.19 M {minus}14.5%"),
        ("Bytes", f"21.0 MB → 16.8 MB {minus}20.0%", f"29.0 MB → 24.8 MB {minus}14.5%"),
        ("MACs per token", f"5.24 M → 4.19 M {minus}20.0%", f"6.24 M → 5.19 M {minus}16.8%"),
        ("Latency", f"120 ms → 100 ms {minus}16.7%", f"305 ms → 290 ms {minus}4.9% (noise)"),
    ]


def test_latencies_whose_ranges_overlap_are_neither_better_nor_worse(report):
    latency = saving_rows(report)[-1]
    assert (latency.linear.tone, latency.model.tone) == ("better", "even")


def test_more_is_worse_and_the_same_is_even(report):
    first = report.savings[0]
    turned = first.model.model_copy(update={"before": first.model.after, "after": first.model.before})
    same = first.model.model_copy(update={"after": first.model.before})
    changed = report.model_copy(update={"savings": [first.model_copy(update={"linear": same, "model": turned})]})
    (row,) = saving_rows(changed)
    assert (row.linear.tone, row.linear.ratio_text) == ("even", "±0.0%")
    assert (row.model.tone, row.model.ratio_text) == ("worse", "+16.9%")


def test_what_is_not_measured_is_a_gap(report):
    latency = report.savings[-1].model_copy(update={"linear": None})
    (row,) = saving_rows(report.model_copy(update={"savings": [latency]}))
    assert (row.linear.text, row.linear.ratio_text) == (fmt.MISSING, "")


def test_nothing_of_nothing_has_no_ratio(report):
    nothing = report.savings[0].linear.model_copy(
        update={end: report.savings[0].linear.before.model_copy(update={"value": 0}) for end in ("before", "after")}
    )
    saving = report.savings[0].model_copy(update={"linear": nothing})
    (row,) = saving_rows(report.model_copy(update={"savings": [saving]}))
    assert (row.linear.text, row.linear.ratio) == ("0 → 0", None)


def test_the_words_are_explained_with_their_settings(report):
    lines = saving_lines(report)
    assert "1 MAC is 2 FLOPs; context 256 tokens." in lines
    assert "once for each new token: batch 1 · prompt 128 · new tokens 64 · rounds 7." in lines[-1]
    assert len(saving_lines(report.model_copy(update={"savings": report.savings[:3]}))) == 2


def test_the_section_of_the_card(report):
    lines = card_section(report).splitlines()
    assert lines[:3] == ["## What was saved", "", "| | linear layers | whole model |"]
    assert f"| Parameters | 5.24 M → 4.19 M {fmt.MINUS}20.0% | 7.24 M → 6.19 M {fmt.MINUS}14.5% |" in lines
    assert lines[-1].startswith("Predicted to add ")


def test_a_report_without_savings_shows_none(bare):
    assert saving_rows(bare) == []
    assert saving_lines(bare) == []
    assert card_section(bare) == ""
