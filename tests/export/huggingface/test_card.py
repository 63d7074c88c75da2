from pathlib import Path

import pytest

from skink.export.huggingface import SkinkConfig
from skink.export.huggingface.card import card_text, write_card


def test_the_card_says_how_to_load_and_what_it_is_made_from() -> None:
    text = card_text("small", SkinkConfig(source={"model_type": "llama", "class": "LlamaForCausalLM", "name": "a/b"}))
    assert text.startswith("---\nlibrary_name: skink\npipeline_tag: text-generation\nbase_model: a/b\n---\n")
    assert "import skink\n" in text
    assert 'model = skink.load("small")\n' in text
    assert "Made from `a/b` (LlamaForCausalLM)" in text


@pytest.mark.parametrize("name", ["/home/somebody/llama", "./llama", "~/llama", "stdlib-llama", ""])
def test_a_path_of_a_machine_is_no_hub_id(name: str) -> None:
    text = card_text("small", SkinkConfig(source={"name": name}))
    assert "base_model" not in text
    assert "somebody" not in text


def test_the_lines_are_python(tmp_path: Path) -> None:
    write_card(tmp_path, SkinkConfig())
    text = (tmp_path / "README.md").read_text()
    compile(text.split("```python\n")[1].split("```")[0], "card", "exec")
    assert f"# {tmp_path.name}" in text


@pytest.mark.parametrize(
    ("name", "task", "line"),
    [
        ("SkinkModel", "feature-extraction", "print(model(**inputs).last_hidden_state.shape)"),
        ("SkinkForMaskedLM", "fill-mask", "print(model(**inputs).logits.shape)"),
        ("SkinkForQuestionAnswering", "question-answering", "print(model(**inputs).start_logits.shape)"),
        ("SkinkForCausalLM", "text-generation", "model.generate("),
    ],
)
def test_each_kind_of_model_has_its_task_and_its_lines(name: str, task: str, line: str) -> None:
    text = card_text("small", SkinkConfig(architectures=[name]))
    assert f"pipeline_tag: {task}\n" in text
    assert line in text
    compile(text.split("```python\n")[1].split("```")[0], "card", "exec")


def test_a_folder_for_sentences_is_loaded_by_sentence_transformers(tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text("[]")
    write_card(tmp_path, SkinkConfig(architectures=["SkinkModel"]))
    text = (tmp_path / "README.md").read_text()
    assert "pipeline_tag: sentence-similarity\n" in text
    assert f'SentenceTransformer("{tmp_path.name}")' in text
    assert text.index("import skink") < text.index("from sentence_transformers")
