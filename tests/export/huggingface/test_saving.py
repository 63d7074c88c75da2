import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GenerationConfig

from skink.export.huggingface import load, save, to_huggingface
from tests.export.huggingface.built import (
    factored_model,
    factored_program,
    fingerprint,
    skink_model,
    word_tokenizer,
)
from tests.models import tiny
from tests.programs import batch, canonical

# What a user's program does with a folder, in a process that knows nothing of how it was made.
_USER = """
import json, sys
from skink.export.huggingface import load, register
register()
import torch
from transformers import AutoModelForCausalLM, pipeline
torch.set_num_threads(1)
folder, tokens, mask = sys.argv[1], *(torch.tensor(json.loads(text)) for text in sys.argv[2:])
results = []
for model in (load(folder), AutoModelForCausalLM.from_pretrained(folder), pipeline("text-generation", folder).model):
    results.append(model.generate(tokens, attention_mask=mask, max_new_tokens=8, min_new_tokens=8).tolist())
print(json.dumps(results))
"""


def save_factored(folder: Path, **options: object) -> None:
    source = tiny("llama")
    save(factored_program(), source.config, source.generation_config, word_tokenizer(), folder, **options)


def test_the_folder_holds_what_users_look_for(tmp_path: Path) -> None:
    save_factored(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "README.md",
        "config.json",
        "generation_config.json",
        "graph.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("skink", ["SkinkForCausalLM"])
    assert "auto_map" not in config
    assert (config["hidden_size"], config["num_hidden_layers"], config["num_key_value_heads"]) == (64, 2, 2)
    stored = load_file(tmp_path / "model.safetensors")
    assert "model.layers.0.self_attn.q_proj.down.weight" in stored
    assert "model.layers.0.self_attn.q_proj.weight" not in stored
    assert stored["model.rotary_emb.inv_freq"].dtype == torch.float32
    assert json.loads((tmp_path / "graph.json").read_text())["format"] == 1


def test_a_fresh_process_gets_the_same_tokens(tmp_path: Path) -> None:
    save_factored(tmp_path)
    inputs = batch(2, 7, padding=3)
    expected = factored_model().generate(
        inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=8, min_new_tokens=8, do_sample=False
    )
    arguments = [json.dumps(inputs.input_ids.tolist()), json.dumps(inputs.attention_mask.tolist())]
    found = subprocess.run(
        [sys.executable, "-c", _USER, str(tmp_path), *arguments], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout.splitlines()[-1]) == [expected.tolist()] * 3


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "opt", "phi3"])
def test_saved_and_loaded_is_the_same(family: str, tmp_path: Path) -> None:
    model, inputs = skink_model(family), batch(2, 9, padding=2)
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert fingerprint(loaded) == fingerprint(model)
    with torch.no_grad():
        assert torch.equal(loaded(*inputs[:2]).logits, model(*inputs[:2]).logits)
    loaded.save_pretrained(tmp_path / "again")
    for name in ("graph.json", "model.safetensors", "generation_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    model = skink_model("gpt2")
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = load(tmp_path)
    assert loaded.config.tie_word_embeddings
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


def test_large_weights_go_into_several_files(tmp_path: Path) -> None:
    save_factored(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert fingerprint(load(tmp_path)) == fingerprint(factored_model())


def test_it_loads_in_low_memory_onto_a_device_and_in_a_dtype(tmp_path: Path) -> None:
    save_factored(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu", dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert {buffer.dtype for buffer in model.buffers()} == {torch.float32}
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


def test_the_generation_configuration_is_carried_over(tmp_path: Path) -> None:
    source = tiny("llama")
    generation = GenerationConfig(do_sample=True, top_k=7, eos_token_id=[2, 5], pad_token_id=0)
    model = to_huggingface(canonical("llama"), source.config, generation)
    assert (model.generation_config.top_k, model.generation_config.eos_token_id) == (7, [2, 5])
    model.save_pretrained(tmp_path)
    assert load(tmp_path).generation_config.eos_token_id == [2, 5]
    assert model.generation_config is not generation


def test_a_model_has_tensors_of_its_own_unless_told_to_share() -> None:
    program, source = canonical("llama"), tiny("llama")
    weight = source.model.norm.weight
    assert to_huggingface(program, source.config).model.norm.weight.data_ptr() != weight.data_ptr()
    assert to_huggingface(program, source.config, copy=False).model.norm.weight.data_ptr() == weight.data_ptr()
    before = fingerprint(source)
    to_huggingface(program, source.config).model.norm.weight.data.zero_()
    assert fingerprint(source) == before


def test_a_card_that_is_there_is_left(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    factored_model().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_a_variant_is_loaded_by_its_name(tmp_path: Path) -> None:
    factored_model().save_pretrained(tmp_path, variant="other")
    assert (tmp_path / "model.other.safetensors").is_file()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, variant="other")
    assert fingerprint(loaded) == fingerprint(factored_model())
