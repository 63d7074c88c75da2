import copy
import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, BertModel, GPT2Config

from skink.errors import ModelError, OptionError
from skink.export.huggingface import SkinkForCausalLM, load, load_source
from skink.export.huggingface.encoders import SkinkModel
from skink.export.huggingface.loading import encoder_class, holds_encoder, is_encoder, refuse_encoder
from skink.export.huggingface.saving import save
from skink.graph.capture import capture
from tests.export.huggingface.built import factored_model, fingerprint, word_tokenizer
from tests.models import tiny
from tests.programs import batch


@pytest.fixture(scope="module")
def skink_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("skink")
    factored_model().save_pretrained(folder)
    return folder


@pytest.fixture
def llama_folder(tmp_path: Path) -> Path:
    tiny("llama").save_pretrained(tmp_path)
    return tmp_path


def change_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refused(path: object, code: str, loader=load_source) -> ModelError:
    with pytest.raises(ModelError) as caught:
        loader(path)
    assert caught.value.code == code
    assert caught.value.fix
    return caught.value


def test_loads_what_was_saved(skink_folder: Path) -> None:
    model = load(skink_folder)
    assert fingerprint(model) == fingerprint(factored_model())
    assert not model.training
    tokens = batch(2, 6).input_ids
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, factored_model()(tokens).logits)


def test_half_precision_is_widened_on_the_cpu_unless_asked_for(tmp_path: Path) -> None:
    model = copy.deepcopy(factored_model()).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert load(tmp_path).dtype == torch.float32
    stored = load(tmp_path, dtype="bfloat16")
    assert fingerprint(stored) == fingerprint(model)
    assert load(tmp_path, dtype=torch.float16).dtype == torch.float16
    assert {buffer.dtype for buffer in stored.buffers()} == {torch.float32}
    assert load_source(tmp_path)[0].dtype == torch.float32


def test_refuses_a_dtype_that_is_none(skink_folder: Path) -> None:
    with pytest.raises(OptionError, match="dtype='float23' is not a dtype to load in") as caught:
        load(skink_folder, dtype="float23")
    assert caught.value.code == "OPTION-002"
    assert "did you mean 'float32'?" in caught.value.fix


def test_a_source_is_loaded_with_its_tokenizer_where_it_has_one(llama_folder: Path) -> None:
    model, tokenizer = load_source(llama_folder)
    assert fingerprint(model) == fingerprint(tiny("llama"))
    assert tokenizer is None
    word_tokenizer().save_pretrained(llama_folder)
    _, tokenizer = load_source(str(llama_folder))
    assert tokenizer("w5 w6").input_ids == [5, 6]


def test_a_skink_folder_is_a_source_too(skink_folder: Path) -> None:
    model, _ = load_source(skink_folder)
    assert isinstance(model, SkinkForCausalLM)


def test_the_model_that_ships_is_loaded_by_name() -> None:
    model, tokenizer = load_source("stdlib-llama")
    assert (model.config.model_type, model.dtype) == ("llama", torch.float32)
    assert len(tokenizer("def f(x):").input_ids) < 8


def test_a_name_that_is_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    error = refused("nobody/has-made-this", "MODEL-001")
    assert (
        error.what
        == "'nobody/has-made-this' is no folder here, and no model that could be had from the Hugging Face hub."
    )
    assert "stdlib-llama" in error.fix


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    assert "is a file, not a folder" in refused(tmp_path / "model.gguf", "MODEL-001").what


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    assert "config.json is missing" in refused(tmp_path, "MODEL-001").what


def test_load_wants_a_skink_folder(llama_folder: Path) -> None:
    error = refused(llama_folder, "MODEL-001", load)
    assert "is a llama checkpoint, not a Skink model" in error.what
    assert "skink compress" in error.fix


def test_a_truncated_file_is_refused_by_every_way_in(skink_folder: Path, llama_folder: Path, tmp_path: Path) -> None:
    for folder, loader in (
        (llama_folder, load_source),
        (skink_folder, load),
        (skink_folder, SkinkForCausalLM.from_pretrained),
    ):
        copied = tmp_path / f"copy-{loader.__name__}"
        copied.mkdir()
        for path in folder.iterdir():
            if path.is_file():
                (copied / path.name).write_bytes(path.read_bytes())
        weights = copied / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        assert "model.safetensors is damaged" in refused(copied, "MODEL-002", loader).what


def test_a_checkpoint_that_lacks_a_weight_is_refused(llama_folder: Path, skink_folder: Path, tmp_path: Path) -> None:
    lacking = tmp_path / "lacking"
    lacking.mkdir()
    for folder, loader in ((llama_folder, load_source), (skink_folder, load)):
        for path in folder.iterdir():
            if path.is_file():
                (lacking / path.name).write_bytes(path.read_bytes())
        tensors = load_file(lacking / "model.safetensors")
        del tensors["model.norm.weight"]
        save_file(tensors, lacking / "model.safetensors", metadata={"format": "pt"})
        error = refused(lacking, "MODEL-002", loader)
        assert error.what == "1 weights of the model are not in the checkpoint."
        assert "model.norm.weight" in error.why


def test_weights_of_another_shape_are_refused(skink_folder: Path, tmp_path: Path) -> None:
    for path in skink_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(7)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert "could not be loaded" in refused(tmp_path, "MODEL-002", load).what


def test_pickles_are_refused(llama_folder: Path) -> None:
    (llama_folder / "model.safetensors").unlink()
    torch.save(tiny("llama").state_dict(), llama_folder / "pytorch_model.bin")
    assert "has its weights in pytorch_model.bin, a pickle" in refused(llama_folder, "MODEL-003").what


def test_remote_code_is_refused_and_not_run(llama_folder: Path) -> None:
    change_config(llama_folder, model_type="strange", auto_map={"AutoModelForCausalLM": "evil.Model"})
    (llama_folder / "evil.py").write_text("raise SystemExit('run')")
    error = refused(llama_folder, "MODEL-003")
    assert "needs code of its own to load, and Skink runs no remote code" in error.what
    assert "'strange'" in error.why


def test_code_beside_a_known_model_is_not_run(llama_folder: Path) -> None:
    change_config(llama_folder, auto_map={"AutoModelForCausalLM": "evil.Model"})
    (llama_folder / "evil.py").write_text("raise SystemExit('run')")
    (llama_folder / "custom_generate").mkdir()
    (llama_folder / "custom_generate" / "generate.py").write_text("raise SystemExit('run')")
    model, _ = load_source(llama_folder)
    assert fingerprint(model) == fingerprint(tiny("llama"))


def test_a_model_type_that_nobody_knows_is_refused(llama_folder: Path) -> None:
    change_config(llama_folder, model_type="strange")
    assert "which this transformers does not know" in refused(llama_folder, "MODEL-001").what


def test_a_model_that_is_no_decoder_is_refused(llama_folder: Path) -> None:
    change_config(llama_folder, model_type="vit")
    assert "is a vit model, which is not a causal language model" in refused(llama_folder, "MODEL-001").what


@pytest.mark.parametrize(
    ("classes", "found"),
    [
        (["BertModel"], BertModel),
        (["BertForMaskedLM"], BertForMaskedLM),
        (["BertLMHeadModel"], None),
        (["NoSuchModel"], None),
        (["BertConfig"], None),
        (None, None),
    ],
)
def test_encoders_are_known_by_what_they_were_saved_from(classes: list[str] | None, found: type | None) -> None:
    assert encoder_class(BertConfig(architectures=classes)) is found


def test_an_encoder_is_loaded_where_it_is_wanted(tmp_path: Path) -> None:
    sizes = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    BertModel(BertConfig(**sizes, num_hidden_layers=1)).save_pretrained(tmp_path)
    model, tokenizer = load_source(tmp_path, encoders=True)
    assert type(model) is BertModel
    assert tokenizer is None
    with pytest.raises(ModelError, match=r"\[MODEL-005\] .* is an encoder \(BertModel\)"):
        load_source(tmp_path)


def test_an_encoder_in_our_form_is_one(tmp_path: Path) -> None:
    sizes = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    source = BertModel(BertConfig(**sizes, num_hidden_layers=1)).eval()
    save(capture(source), source.config, None, None, tmp_path)
    assert holds_encoder(tmp_path)
    assert type(load_source(tmp_path, encoders=True)[0]) is type(load(tmp_path)) is SkinkModel
    with pytest.raises(ModelError, match=r"\[MODEL-005\] .* is an encoder \(SkinkModel\)"):
        load_source(tmp_path)


def test_decoders_are_no_encoders(skink_folder: Path, llama_folder: Path) -> None:
    assert not holds_encoder(skink_folder)
    assert not holds_encoder(llama_folder)
    assert not holds_encoder("stdlib-llama")
    assert not is_encoder(GPT2Config(architectures=["GPT2Model"]))
    assert is_encoder(BertConfig(architectures=["BertForMaskedLM"]))


def test_a_decoder_without_its_head_is_no_encoder() -> None:
    refuse_encoder("headless", GPT2Config(architectures=["GPT2Model"]))
    refuse_encoder("decoding", BertConfig(architectures=["BertModel"], is_decoder=True))
