import copy
from dataclasses import replace

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertModel

import skink
from skink.errors import CalibrationError, OptionError, RecoveryError
from skink.evaluation import Documents, perplexity
from skink.exploration.points import DENSE, Point
from skink.exploration.workbench import Workbench, point_key
from skink.passes.recipe import load_recipe

WORDS = ("beginning", "middle", "end", "reason", "sum", "heart", "title", "author", "sound", "point", "length", "sense")


def point(text):
    return Point("family", {}, load_recipe(text))


@pytest.fixture(scope="module")
def bench(captured, tokenizer, options):
    return Workbench(captured, tokenizer, "tiny", options)


def test_a_point_is_what_compress_makes(bench, llama):
    record = bench.run(point("low-rank{keep=0.5,method=plain}"))
    model = skink.compress(llama, "low-rank{keep=0.5,method=plain}")
    assert record["metrics"]["parameters"] == sum(weight.numel() for weight in model.parameters())
    expected = perplexity(model, bench.texts[1].tokens).value
    assert record["metrics"]["perplexity"] == pytest.approx(expected, rel=1e-6)
    assert record["details"]["layers_changed"] > 0


def test_points_do_not_touch_each_other(bench):
    first = bench.run(DENSE)
    bench.run(point("low-rank{keep=0.3,method=plain}"))
    assert bench.run(DENSE)["metrics"] == first["metrics"]


def test_a_model_in_skink_s_form_is_left_as_it_was(bench, captured):
    before = str(captured.program)
    bench.run(point("low-rank{keep=0.3,method=plain}"))
    assert str(captured.program) == before


def test_any_other_model_is_captured(bench, llama, tokenizer, options):
    other = Workbench(llama, tokenizer, "tiny", options)
    assert other.facts == bench.facts
    assert other.fingerprint == bench.fingerprint


def test_errors_are_recorded(bench, monkeypatch):
    assert bench.run(point("low-rank{method=plain,targets=[*.nowhere]}"))["error"]["code"] == "OPTION-002"

    def fail(self, point):
        raise ZeroDivisionError("by a pass")

    monkeypatch.setattr(Workbench, "compress", fail)
    error = bench.run(DENSE)["error"]
    assert (error["code"], error["what"]) == ("DEFECT-001", "ZeroDivisionError: by a pass")
    assert "fail (" in error["why"]


def test_what_cannot_run_is_refused_before_anything_does(captured, tokenizer, options):
    bare = Workbench(captured, tokenizer, "tiny", replace(options, calibration=None))
    bare.refuse((point("low-rank{method=plain}"),))
    with pytest.raises(CalibrationError, match="needs calibration text") as caught:
        bare.refuse((point("low-rank{method=whitened}"),))
    assert caught.value.code == "CALIBRATION-002"
    with pytest.raises(CalibrationError, match="held-out text"):
        Workbench(captured, tokenizer, "tiny", replace(options, calibration=None, held_out=None)).refuse(())
    unread = replace(options, calibration=None, held_out=None, quality=("questions",))
    with pytest.raises(CalibrationError, match="no tokenizer"):
        Workbench(captured, None, "tiny", unread).refuse(())
    with pytest.raises(OptionError, match="is not for a decoder"):
        Workbench(captured, tokenizer, "tiny", replace(options, quality=("embedding",)))


def test_the_fingerprint_is_of_the_weights(bench, captured, tokenizer, options):
    again = Workbench(captured, tokenizer, "another name", options)
    assert again.fingerprint == bench.fingerprint
    changed = Workbench(captured, tokenizer, "tiny", options)
    name, weight = next(iter(changed.program.weights()))
    changed.program.set_weight(name, torch.nn.Parameter(weight.detach() + 1e-3))
    assert changed.fingerprint != bench.fingerprint


def test_keys_are_of_all_that_counts(bench):
    first = point("low-rank{keep=0.5,method=plain}")
    arguments = ("f", {"seed": 0}, {"torch": "2"}, first)
    key = point_key(*arguments)
    assert key == point_key("f", {"seed": 0}, {"torch": "2"}, replace(first, family="other", values={"x": 1}))
    others = ("g", {"seed": 1}, {"torch": "3"}, point("low-rank{keep=0.6,method=plain}"))
    for place, other in enumerate(others):
        assert point_key(*(*arguments[:place], other, *arguments[place + 1 :])) != key
    assert bench.settings["calibration"]["windows"] == 2


def test_encoders_are_judged_by_their_embeddings(tokenizer, options):
    reader = copy.deepcopy(tokenizer)
    reader.pad_token = reader.eos_token
    model = BertModel(
        BertConfig(
            vocab_size=4096,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
        )
    ).eval()
    text = Documents("prose", tuple(f"The {word} of this text is near.\n\nIt is {word} and not far." for word in WORDS))
    found = Workbench(model, reader, "tiny", replace(options, calibration=text, held_out=text))
    assert found.encoder
    assert found.facts.layers == (0, 1)
    assert found.run(DENSE)["metrics"]["cosine"] == pytest.approx(1.0)
    record = found.run(point("low-rank{keep=0.5,method=plain}"))
    assert 0 < record["metrics"]["cosine"] < 1
    assert "perplexity" not in record["metrics"]


def test_encoders_with_a_head_are_judged_by_its_choices(tokenizer, options):
    reader = copy.deepcopy(tokenizer)
    reader.pad_token = reader.eos_token
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = BertForSequenceClassification(BertConfig(vocab_size=4096, num_labels=5, **sizes)).eval()
    text = Documents("prose", tuple(f"The {word} of this text is near.\n\nIt is {word} and not far." for word in WORDS))
    found = Workbench(model, reader, "tiny", replace(options, calibration=text, held_out=text))
    assert found.run(DENSE)["metrics"]["same"] == 1.0
    assert found.run(point("low-rank{keep=0.1,method=plain}"))["metrics"]["same"] <= 1.0


TRAINED = "low-rank{keep=0.5,method=plain}, recover{ce=1,steps=3,batch=4,learning_rate=0.003}"


def test_points_that_train_read_text_that_is_not_judged(captured, tokenizer, options):
    text = Documents("text", (" ".join(f"{word} {i}" for i in range(500) for word in WORDS),))
    bench = Workbench(captured, tokenizer, "tiny", replace(options, calibration=text, held_out=None, latency=False))
    cut, trained = point("low-rank{keep=0.5,method=plain}"), point(TRAINED)
    bench.refuse((cut, trained))
    assert "training" in bench.settings
    before, after = bench.run(cut), bench.run(trained)
    assert "error" not in after, after
    assert after["metrics"]["perplexity"] < before["metrics"]["perplexity"]
    assert after["metrics"]["parameters"] == before["metrics"]["parameters"]
    assert bench.run(trained)["metrics"] == after["metrics"]


def test_settings_without_training_are_as_they_were(bench):
    bench.refuse((point("low-rank{keep=0.5,method=plain}"),))
    assert "training" not in bench.settings


def test_points_that_train_without_text_are_refused(captured, tokenizer, options):
    bench = Workbench(captured, tokenizer, "tiny", replace(options, calibration=None))
    with pytest.raises(RecoveryError, match=r"\[RECOVER-005\]"):
        bench.refuse((point("low-rank{method=plain}"), point(TRAINED)))
