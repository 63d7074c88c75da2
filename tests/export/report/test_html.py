import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from skink.export.report.html import page

# What would make a browser fetch something.
_LOADING = {"src", "href", "srcset", "data", "action", "poster", "background", "xlink:href"}


def parsed(text):
    assert text.startswith("<!DOCTYPE html>\n")
    return ElementTree.fromstring(text)


def words(root):
    return " ".join("".join(root.itertext()).split())


def test_the_page_is_well_formed_and_its_ids_are_unique(report):
    root = parsed(page(report))
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    assert len(ids) == len(set(ids)) > 0
    for drawing in root.iter("svg"):
        assert set(drawing.get("aria-labelledby").split()) <= set(ids)


def test_nothing_is_loaded_and_nothing_runs(report):
    text = page(report)
    elements = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag, attrs):
            elements.append((tag, dict(attrs)))

    Parser().feed(text)
    assert not {"script", "link", "iframe", "object", "embed", "img", "base"} & {tag for tag, _ in elements}
    assert not [(tag, attrs) for tag, attrs in elements if _LOADING & attrs.keys()]
    assert not [attrs for _, attrs in elements if any(name.startswith("on") for name in attrs)]
    assert not re.search(r"https?:|url\(|@import", text)


def test_every_number_and_layer_is_there(report):
    root = parsed(page(report))
    shown = words(root)
    tables = {table.get("class"): table for table in root.iter("table")}
    names = [row.find("th").find("span").text for row in tables["layers"].find("tbody")]
    assert names == [layer.name for layer in report.layers]
    for part in (
        report.title, "7.24 M", "24.8 MB", "4.340", "287.1", "plain SVD", "saves less than 10%", "ab" * 32,
        "Example 9000", "2.13.0", "keep: 0.8", "Four layers run", "0.1.0", "128 of 256 tokens",
    ):  # fmt: skip
        assert part in shown, part


def test_what_was_saved_is_a_table_of_its_own(report):
    section = next(each for each in parsed(page(report)).iter("section") if words(each).startswith("What was saved"))
    assert [row.find("th").text for row in section.iter("tr")][1:] == [
        "Parameters",
        "Bytes",
        "MACs per token",
        "Latency",
    ]
    assert "1 MAC is 2 FLOPs; context 256 tokens." in words(section)


def test_losses_have_columns_where_some_are_known(report):
    layers = [layer.model_copy(update={"measured_loss": 0.0625}) for layer in report.layers]
    known = words(parsed(page(report.model_copy(update={"layers": layers}))))
    assert "Loss, predicted" in known
    assert "0.0625" in known
    layers = [layer.model_copy(update={"predicted_loss": None}) for layer in report.layers]
    assert "Loss, predicted" not in words(parsed(page(report.model_copy(update={"layers": layers}))))


def test_perplexity_stands_with_its_settings_wherever_it_is_shown(report):
    root = parsed(page(report))
    settings = "text held-out · windows 64 · window length 256"
    sections = [words(section) for section in root.iter("section")]
    telling = [text for text in sections if "Perplexity" in text]
    assert len(telling) == 3
    assert all(settings in text for text in telling)


def test_tables_have_captions_and_their_heads_have_scopes(report):
    for table in parsed(page(report)).iter("table"):
        assert table.find("caption").text
        assert all(head.get("scope") in ("col", "row") for head in table.iter("th"))


def poisoned(report, text, free=False, key=""):
    """The JSON of a report with `text` before every string that is free to choose, keys of settings included."""
    if isinstance(report, dict):
        return {
            text + name if free else name: poisoned(value, text, name in ("settings", "machine", "versions"), name)
            for name, value in report.items()
        }
    if isinstance(report, list):
        return [poisoned(each, text, key=key) for each in report]
    return text + report if isinstance(report, str) and key not in ("created", "decision", "unit") else report


def test_hostile_text_is_escaped_everywhere(report):
    def page_with(text):
        return page(type(report).model_validate(poisoned(report.model_dump(mode="json"), text)))

    hostile = "<script>alert('x')</script>\"&\x00"
    root = parsed(page_with(hostile))
    assert "<script" not in page_with(hostile)
    assert "<script>alert('x')</script>\"&\ufffdlm_head" in words(root)
    assert "<script>alert('x')</script>\"&\ufffdcpu" in words(root)
    assert [element.tag for element in root.iter()] == [element.tag for element in parsed(page_with("x")).iter()]


def test_missing_parts(bare):
    shown = words(parsed(page(bare)))
    assert "No model was measured." in shown
    assert "No calibration data was used." in shown
    for absent in ("Layers", "Passes", "Methods compared", "Notes", "Size, quality, speed"):
        assert absent not in shown.removeprefix(bare.title)


@pytest.mark.parametrize("field", ["perplexity", "speed"])
def test_a_quantity_that_was_not_measured_is_said_to_be_so(report, field):
    forms = [form.model_copy(update={field: None}) for form in report.forms]
    shown = words(parsed(page(report.model_copy(update={"forms": forms, "comparisons": []}))))
    assert f"{field.title()}not measured" in shown


def test_one_form_alone_has_no_comparison(report):
    root = parsed(page(report.model_copy(update={"forms": report.forms[:1]})))
    assert not [element for element in root.iter("ul") if element.get("class") == "tiles"]


def test_hundreds_of_layers(make_report):
    large = make_report(120)
    text = page(large)
    root = parsed(text)
    assert all(layer.name in text for layer in large.layers)
    assert len([e for e in root.iter("div") if e.get("class") == "role"]) == 4
    assert len(text) < 500_000


def test_the_same_report_gives_the_same_page(report):
    assert page(report) == page(type(report).from_json(report.to_json()))


def test_what_passes_have_to_say_is_listed(report):
    record = report.passes[1].model_copy(update={"notes": ["too <little> text"]})
    assert "low-rank: too <little> text" in words(parsed(page(report.model_copy(update={"passes": [record]}))))
