import math
from xml.etree import ElementTree

import pytest

from skink.export.report.page_plots import comparison_plot, form_plots, layer_plots, pass_plots


def drawings(markup):
    return {svg.find("title").text: svg for svg in ElementTree.fromstring(f"<p>{markup}</p>").iter("svg")}


def spoken(markup):
    return {title: svg.find("desc").text for title, svg in drawings(markup).items()}


def test_one_plot_for_each_quantity_with_whiskers_on_speeds(report):
    found = drawings(form_plots(report))
    assert list(found) == ["Parameters", "Bytes", "MACs per token", "Perplexity", "Prefill, tok/s", "Decode, tok/s"]
    whiskers = {title: sum(p.get("class") == "whisker" for p in svg.iter("path")) for title, svg in found.items()}
    assert whiskers == {"Parameters": 0, "Bytes": 0, "MACs per token": 0, "Perplexity": 0, "Prefill, tok/s": 3,
                        "Decode, tok/s": 3}  # fmt: skip


def test_no_forms_no_plots(bare):
    assert form_plots(bare) is None


def test_methods_are_compared_by_the_loss_they_add(report):
    text = spoken(comparison_plot(report.comparisons))["Loss added, nats per token"]
    assert f"plain SVD: +{math.log(5.71 / 4.3121):.3g}" in text
    row = report.comparisons[0].model_copy(update={"perplexity": math.inf, "ratio_to_dense": math.inf})
    assert "+∞" in spoken(comparison_plot([row]))["Loss added, nats per token"]


def test_a_pass_whose_error_was_not_measured(report):
    passes = [report.passes[0], report.passes[1].model_copy(update={"error": None})]
    assert spoken(pass_plots(passes))["Error after each pass"].endswith("low-rank: not measured")
    assert list(drawings(pass_plots(passes[1:]))) == ["Time of each pass"]


def test_each_role_has_its_errors_beside_plain_svds_and_its_ranks(report):
    found = drawings(layer_plots(report.layers))
    errors = found["Relative output error, self_attn.v_proj"]
    drawn = [rect.get("class") for rect in errors.iter("rect")]
    assert (drawn.count("ours"), drawn.count("theirs")) == (2, 2)
    assert sum(path.get("class") == "cross" for path in errors.iter("path")) == 1
    ranks = [rect.get("class") for rect in found["Rank, self_attn.v_proj"].iter("rect")]
    assert (ranks.count("ours"), ranks.count("ours alone")) == (2, 1)


def test_all_roles_share_one_scale(report):
    layers = [
        *report.layers[:-1],
        report.layers[0].model_copy(update={"name": "model.layers.3.mlp.down_proj", "rank": 200}),
    ]
    tallest = [
        max(float(rect.get("height")) for rect in svg.iter("rect"))
        for title, svg in drawings(layer_plots(layers)).items()
        if title in ("Rank, self_attn.q_proj", "Rank, mlp.down_proj")
    ]
    assert tallest[1] / tallest[0] == pytest.approx(200 / 96, rel=0.01)


def test_layers_without_predictions_show_their_ranks_alone(report):
    layers = [layer.model_copy(update={"predicted_error": None, "baseline_error": None}) for layer in report.layers]
    assert all(title.startswith("Rank") for title in drawings(layer_plots(layers)))
