import re
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

from skink.exploration.page import flat, page
from tests.exploration.samples import sample


def parsed(text):
    return ElementTree.fromstring(text.partition("\n")[2])


def test_the_page_is_well_formed_and_loads_nothing():
    text = page(sample())
    root = parsed(text)
    HTMLParser().feed(text)
    names = {element.tag for element in root.iter()}
    assert not names & {"script", "link", "img", "iframe", "object"}
    assert "://" not in re.sub(r"https?://www\.w3\.org/\S+", "", text)
    assert "url(" not in text
    assert "@import" not in text
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    for element in root.iter():
        for key, value in element.attrib.items():
            assert not key.startswith("on")
            if key in ("href", "src"):
                assert value[0] == "#"
                assert value[1:] in ids
    (policy,) = [meta.get("content") for meta in root.iter("meta") if meta.get("http-equiv")]
    assert policy.startswith("default-src 'none'")


def test_what_users_name_is_escaped():
    text = page(sample())
    assert "a &lt;model&gt;" in text
    assert "a <model>" not in text
    assert "broke &lt;here&gt;" in text


def test_every_quality_is_plotted_against_every_cost():
    root = parsed(page(sample()))
    plots = [svg.find("title").get("id") for svg in root.iter("svg")]
    assert plots == [
        f"{quality}-{cost}-title"
        for quality in ("perplexity", "accuracy")
        for cost in ("linear_parameters", "macs_per_token", "latency")
    ]
    # The model whose perplexity is infinite is on no scale, and the page says so.
    assert "1 point is off the scale" in page(sample())


def test_the_best_point_at_each_size_is_named():
    root = parsed(page(sample()))
    tables = [table for table in root.iter("table") if table.get("class") == "best"]
    links = [[link.get("href") for link in table.iter("a")] for table in tables]
    assert links == [["#p1", "#p2"], ["#p1", "#p2", "#p4"]]


def test_settings_and_failures_are_there():
    text = page(sample())
    for part in ("0123456789ab", "a processor", "DEFECT-001", "recipe: low-rank{keep=$keep}", "What &amp; why."):
        assert part in text
    assert "0123456789abc" not in text


def test_a_map_without_speed_or_failures():
    found = sample()
    metrics = {name: value for name, value in found.dense.metrics.items() if name != "latency"}
    bare = replace(found, dense=replace(found.dense, metrics=metrics), points=found.points[:1])
    text = page(bare)
    assert "perplexity-latency" not in text
    assert "Failed" not in text


def test_a_space_of_nothing_but_failures_has_a_page():
    found = sample()
    assert "Failed" in page(replace(found, points=found.points[-1:]))


def test_nested_settings_on_one_level():
    assert flat({"a_b": {"c": 1.5, "d": [1, 2]}, "sha256": "f" * 64, "e": None}) == {
        "a b, c": "1.5",
        "a b, d": "1, 2",
        "sha256": "f" * 12,
        "e": "none",
    }
