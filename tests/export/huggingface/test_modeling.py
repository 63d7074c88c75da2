import copy
import re
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    TextStreamer,
    pipeline,
)

from skink.errors import ModelError
from skink.export.huggingface import SkinkCache, to_huggingface
from skink.graph.capture import capture
from skink.graph.pipeline import Pipeline
from skink.passes.canonicalize import Canonicalize
from tests.export.huggingface.built import (
    factored_model,
    fingerprint,
    fresh,
    skink_model,
    word_tokenizer,
)
from tests.models import FAMILIES, VOCABULARY, tiny
from tests.programs import Batch, batch, distance, eager_logits


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Each family in turn; of the module, so that tests of one family follow each other: a capture takes seconds."""
    return str(request.param)


def logits(family: str, inputs: Batch, **options: object) -> torch.Tensor:
    with torch.no_grad():
        return skink_model(family)(inputs.input_ids, inputs.attention_mask, **options).logits


def test_logits_are_those_of_the_source_with_padding_and_without(family: str) -> None:
    padded, plain = batch(3, 11, padding=4), batch(2, 13)
    assert distance(logits(family, padded), eager_logits(family, padded), padded.attention_mask) < 1e-5
    assert distance(logits(family, plain), eager_logits(family, plain), plain.attention_mask) < 1e-5
    with torch.no_grad():
        without_cache = skink_model(family)(plain.input_ids, use_cache=False).logits
    assert distance(without_cache, eager_logits(family, plain), plain.attention_mask) < 1e-5


def test_steps_give_what_the_full_sequence_gives(family: str) -> None:
    model, inputs = skink_model(family), batch(3, 17, padding=4)
    expected = eager_logits(family, inputs)
    for gradients in (False, True) if family == "gemma2" else (False,):
        cache, begin, parts = None, 0, []
        with torch.set_grad_enabled(gradients):
            for end in (6, 7, 8, 13, 17):
                part = inputs.part(begin, end)
                output = model(part.input_ids, part.attention_mask, past_key_values=cache, use_cache=True)
                cache, begin = output.past_key_values, end
                parts.append(output.logits.detach())
        assert isinstance(cache, SkinkCache)
        assert cache.get_seq_length() == 17
        assert distance(torch.cat(parts, 1), expected, inputs.attention_mask) < 1e-5


def test_generation_is_that_of_transformers_token_for_token(family: str) -> None:
    source, model = tiny(family), skink_model(family)
    padded, plain = batch(3, 9, padding=4), batch(2, 7)
    ways = (
        {"do_sample": False},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": True, "top_k": 20, "num_return_sequences": 2},
    )
    for inputs in (padded, plain):
        tokens = {"input_ids": inputs.input_ids, "attention_mask": inputs.attention_mask}
        for way in ways:
            torch.manual_seed(3)
            expected = source.generate(**tokens, max_new_tokens=32, min_new_tokens=32, **way)
            torch.manual_seed(3)
            found = model.generate(**tokens, max_new_tokens=32, min_new_tokens=32, **way)
            assert torch.equal(found, expected), (way, inputs.attention_mask)


def test_prompt_lookup_and_assistants_give_the_greedy_tokens() -> None:
    # Gemma 2 here has windows of 5: taking tokens back must mend rings that have gone round.
    prompt = batch(1, 6).input_ids.repeat(1, 3)
    for family in ("llama", "gemma2"):
        model = skink_model(family)
        expected = model.generate(prompt, max_new_tokens=24, do_sample=False)
        assert torch.equal(
            model.generate(prompt, max_new_tokens=24, do_sample=False, prompt_lookup_num_tokens=3), expected
        )
        helped = model.generate(prompt, max_new_tokens=24, do_sample=False, assistant_model=skink_model("gpt2"))
        assert torch.equal(helped, expected)
        source = tiny(family).generate(prompt, max_new_tokens=24, do_sample=False, assistant_model=model)
        assert torch.equal(source, expected)


def test_a_prompt_in_chunks_and_a_cache_carried_on_give_the_same_tokens() -> None:
    model, prompt = skink_model("mistral"), batch(1, 12).input_ids
    expected = model.generate(prompt, max_new_tokens=12, do_sample=False)
    assert torch.equal(model.generate(prompt, max_new_tokens=12, do_sample=False, prefill_chunk_size=5), expected)
    first = model.generate(prompt, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    second = model.generate(
        first.sequences, past_key_values=copy.deepcopy(first.past_key_values), max_new_tokens=7, do_sample=False
    )
    assert torch.equal(second, expected)


def test_streams_tokens_as_they_come(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer, prompt = word_tokenizer(), batch(1, 5).input_ids
    tokens = skink_model("llama").generate(
        prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False, streamer=TextStreamer(tokenizer)
    )
    assert capsys.readouterr().out.split() == tokenizer.decode(tokens[0]).split()


def test_pipeline_generates_text_for_a_batch() -> None:
    generate = pipeline("text-generation", model=skink_model("llama"), tokenizer=word_tokenizer())
    texts = ["w5 w6 w7", "w9"]
    results = generate(texts, max_new_tokens=4, do_sample=False, batch_size=2)
    for text, (result,) in zip(texts, results, strict=True):
        assert result["generated_text"].startswith(text)


def test_logits_to_keep_keeps_the_last_or_those_named() -> None:
    inputs = batch(2, 9, padding=2)
    for family in ("llama", "gemma2"):
        full = logits(family, inputs)
        for use_cache in (False, True):
            last = logits(family, inputs, logits_to_keep=1, use_cache=use_cache)
            assert last.shape == (2, 1, VOCABULARY)
            assert torch.allclose(last, full[:, -1:], atol=2e-6)
        assert torch.allclose(logits(family, inputs, logits_to_keep=3), full[:, -3:], atol=2e-6)
        named = logits(family, inputs, logits_to_keep=torch.tensor([0, 7]))
        assert torch.allclose(named, full[:, [0, 7]], atol=2e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_loss_and_gradients_are_those_of_the_source(name: str) -> None:
    source, model = copy.deepcopy(tiny(name)), fresh(name)
    inputs = batch(2, 9)
    labels = inputs.input_ids.masked_fill(torch.rand(2, 9) < 0.3, -100)
    expected, found = source(inputs.input_ids, labels=labels), model(inputs.input_ids, labels=labels)
    assert found.past_key_values is None
    assert torch.allclose(found.loss, expected.loss, atol=1e-6)
    expected.loss.backward()
    found.loss.backward()
    reference = dict(source.named_parameters())
    checked = 0
    for path, parameter in model.named_parameters():
        if path in reference:
            gradient = reference[path].grad
            # GPT-2 has its linear weights the other way round.
            turned = torch.equal(parameter, reference[path].T) if parameter.dim() == 2 else False
            assert torch.allclose(parameter.grad, gradient.T if turned else gradient, atol=2e-6), path
            checked += 1
    assert checked == {"llama": 21, "gpt2": 28}[name]
    per_item = model(inputs.input_ids, labels=labels, num_items_in_batch=5).loss
    assert torch.allclose(per_item, source(inputs.input_ids, labels=labels, num_items_in_batch=5).loss, atol=1e-6)


def test_training_it_leaves_the_source_alone() -> None:
    before = fingerprint(tiny("llama"))
    model = fresh("llama")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tokens = batch(2, 9).input_ids
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model.train()(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    assert fingerprint(tiny("llama")) == before


def test_half_precision_generates_and_keeps_rotary_frequencies_exact() -> None:
    model = fresh("llama").to(torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in model.buffers()} == {torch.float32}
    inputs = batch(2, 9, padding=2)
    with torch.no_grad():
        found = model(inputs.input_ids, inputs.attention_mask)
    assert found.logits.dtype == torch.bfloat16
    assert found.past_key_values.tensors[0].dtype == torch.bfloat16
    assert distance(found.logits.float(), eager_logits("llama", inputs), inputs.attention_mask) < 0.05
    generated = model.generate(
        inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=5, min_new_tokens=5
    )
    assert generated.shape == (2, 14)
    assert model.float()(inputs.input_ids).logits.dtype == torch.float32


def test_compiles_to_one_graph() -> None:
    model, inputs = fresh("gemma2"), batch(2, 9, padding=3)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for arguments in ((inputs.input_ids,), (inputs.input_ids, inputs.attention_mask), (inputs.input_ids[:, :6],)):
            mask = arguments[1] if len(arguments) > 1 else torch.ones_like(arguments[0])
            assert distance(compiled(*arguments).logits, model(*arguments).logits, mask) < 1e-5
    compiled(inputs.input_ids, labels=inputs.input_ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


# transformers warns of its own attribute, which PEFT still reads.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_adapters_train_and_merge() -> None:
    from peft import LoraConfig, get_peft_model

    model = copy.deepcopy(factored_model())
    adapted = get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["down", "up", "v_proj"], init_lora_weights=False)
    )
    tokens = batch(2, 9).input_ids
    optimizer = torch.optim.Adam((p for p in adapted.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = adapted(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    adapted.eval()
    with pytest.raises(ModelError, match="merge adapters first"):
        model.program  # noqa: B018
    with torch.no_grad():
        expected = adapted(input_ids=tokens).logits
        assert not torch.allclose(expected, factored_model()(tokens).logits, atol=1e-3)
        merged = adapted.merge_and_unload()
        assert torch.allclose(merged(tokens).logits, expected, atol=1e-5)
    assert set(merged.state_dict()) == set(factored_model().state_dict())


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"inputs_embeds": torch.zeros(1, 2, 64)}, "inputs_embeds is not supported: the graph begins at token ids."),
        ({"output_attentions": True}, "output_attentions is not supported: attention weights are never formed."),
        ({"output_hidden_states": True}, "output_hidden_states is not supported: the graph returns logits only."),
        ({"input_ids": None}, "input_ids is missing."),
        (
            {"past_key_values": DynamicCache()},
            "past_key_values is a DynamicCache, which cannot hold this model's state.",
        ),
        ({"attention_mask": torch.ones(1, 1, 4, 4)}, "attention_mask has the shape [1, 1, 4, 4], where [batch, 4]"),
        ({"attention_mask": torch.ones(1, 3)}, "attention_mask has the shape [1, 3], where [batch, 4] was expected."),
    ],
)
def test_refuses_what_a_graph_cannot_do(arguments: dict[str, object], text: str) -> None:
    with pytest.raises(ModelError, match=re.escape(text)) as caught:
        skink_model("llama")(**{"input_ids": torch.ones(1, 4, dtype=torch.long), **arguments})
    assert caught.value.code == "MODEL-005"
    assert caught.value.fix


def test_a_padded_cache_wants_its_mask_at_every_step() -> None:
    model, inputs = skink_model("llama"), batch(2, 5, padding=2)
    cache = model(inputs.input_ids, inputs.attention_mask).past_key_values
    with pytest.raises(ModelError, match="this step comes without attention_mask"):
        model(inputs.input_ids[:, -1:], past_key_values=cache)


@pytest.mark.parametrize("kind", ["static", "offloaded", "quantized"])
def test_generate_refuses_other_caches(kind: str) -> None:
    with pytest.raises(ModelError, match=f"cache_implementation='{kind}' cannot hold this model's state"):
        skink_model("llama").generate(batch(1, 4).input_ids, max_new_tokens=2, cache_implementation=kind)


def test_returns_a_tuple_where_asked() -> None:
    tokens = batch(1, 4).input_ids
    outputs = skink_model("llama")(tokens, labels=tokens, return_dict=False)
    assert [tensor.shape for tensor in outputs] == [torch.Size([]), torch.Size([1, 4, VOCABULARY])]


def test_a_copy_of_a_model_gives_the_same_and_is_its_own() -> None:
    tokens = batch(1, 6).input_ids
    model = copy.deepcopy(skink_model("llama"))
    with torch.no_grad():
        expected = skink_model("llama")(tokens).logits
        assert torch.equal(model(tokens).logits, expected)
        model.get_output_embeddings().weight.zero_()
        assert not model(tokens).logits.any()
        assert torch.equal(skink_model("llama")(tokens).logits, expected)


BART = {"d_model": 32, "decoder_layers": 2, "decoder_ffn_dim": 48, "decoder_attention_heads": 4, "is_decoder": True}
BLOOM = {"hidden_size": 32, "n_layer": 2, "n_head": 4}


@pytest.mark.parametrize(("kind", "options"), [("bart", BART | {"is_encoder_decoder": False}), ("bloom", BLOOM)])
@pytest.mark.parametrize("padding", [0, 3])
def test_models_that_count_positions_or_need_none(kind: str, options: dict[str, Any], padding: int) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=VOCABULARY, max_position_embeddings=64, **options)
    source = AutoModelForCausalLM.from_config(config).eval()
    program = capture(source)
    Pipeline((Canonicalize(),)).run(program)
    model = to_huggingface(program, source.config)
    inputs = batch(2, 7, padding=padding)
    given = {"input_ids": inputs.input_ids, "attention_mask": inputs.attention_mask}
    with torch.no_grad():
        cache, parts = None, []
        for begin, end in ((0, 4), (4, 5), (5, 7)):
            part = inputs.part(begin, end)
            output = model(part.input_ids, part.attention_mask, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            parts.append(output.logits)
        assert distance(torch.cat(parts, 1), source(**given).logits, inputs.attention_mask) < 1e-5
    plain = GenerationConfig(max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    source.generation_config = GenerationConfig()
    assert torch.equal(
        model.generate(**given, generation_config=plain), source.generate(**given, generation_config=plain)
    )
