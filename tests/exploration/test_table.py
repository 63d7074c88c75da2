import re
from xml.etree import ElementTree

from skink.exploration.table import point_table
from tests.exploration.samples import sample


def rows():
    table, _ = point_table(sample())
    return ElementTree.fromstring(table).findall(".//tbody/tr")


def head(text):
    heads = ElementTree.fromstring(point_table(sample())[0]).findall(".//thead/tr/th")
    return next(index for index, entry in enumerate(heads) if entry.text == text)


def order(column):
    """Ids of the rows as the column's upper button sorts them."""
    found = {row.get("id"): int(re.search(rf"--o{column}:(\d+)", row.get("style")).group(1)) for row in rows()}
    return sorted(found, key=found.__getitem__)


def test_every_point_that_did_not_fail_has_a_row():
    assert [row.get("id") for row in rows()] == ["p0", "p1", "p2", "p3", "p4"]
    assert rows()[1].get("title") == "low-rank{keep=0.9}"


def test_columns_sort_the_best_first():
    assert order(head("#")) == ["p0", "p1", "p2", "p3", "p4"]
    assert order(head("Perplexity")) == ["p0", "p1", "p2", "p3", "p4"]
    assert order(head("Accuracy")) == ["p1", "p0", "p2", "p3", "p4"]
    assert order(head("Bytes")) == ["p4", "p2", "p3", "p1", "p0"]
    assert order(head("Time/token")) == ["p4", "p2", "p1", "p0", "p3"]


def test_each_column_has_two_buttons_and_the_rules_for_them():
    table, style = point_table(sample())
    buttons = [entry.get("id") for entry in ElementTree.fromstring(table).iter("input")]
    assert len(buttons) == len(set(buttons)) > 10
    for button in buttons:
        assert f"#{button}:checked" in style
    assert "<" not in style
    assert "&" not in style


def test_fronts_are_marked():
    last = [row.findall("*")[-1].text for row in rows()]
    assert last[1] == "P: SMT, A: SMT"
    assert last[3] is None
    assert "best" in rows()[1].get("class")
    assert rows()[3].get("class") is None
