"""From a program to a Hugging Face model and its folder."""

import os
from copy import deepcopy
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from skink.export.huggingface.base import SkinkPreTrainedModel
from skink.export.huggingface.card import CARD_FILE, card_text
from skink.export.huggingface.config import SkinkConfig
from skink.export.huggingface.forms import form_of
from skink.export.huggingface.sentences import copy_sentence_files
from skink.graph.program import Program


def to_huggingface(
    program: Program,
    config: PreTrainedConfig,
    generation_config: GenerationConfig | None = None,
    *,
    copy: bool = True,
) -> Any:
    """A Hugging Face model that runs `program`: `SkinkForCausalLM`, or for an encoder what it was captured from.

    Args:
        program: a full-sequence graph with its weights, not stepped and not lowered.
        config: the source model's, left alone.
        generation_config: the source model's, left alone.
        copy: give the model tensors of its own. Otherwise it shares them with the program, and through it with the
            model that was captured: training one would change the other.
    """
    form = form_of(program, config)
    converted = SkinkConfig.from_source(
        config,
        name=str(program.origin.get("name") or config.name_or_path),
        class_name=str(program.origin.get("class", "")),
        tied=bool(program.aliases),
        dtype=program.dtype,
    )
    converted.architectures = [form.name]
    model: SkinkPreTrainedModel = form.model_class(converted, program, copy=copy)
    if generation_config is not None and not form.encodes:
        copied = deepcopy(generation_config)
        # transformers saves a published configuration back as it is, and refuses one with contradictions otherwise.
        copied._original_object_hash = hash(copied)
        model.generation_config = copied
    model.eval()  # type: ignore[no-untyped-call]
    return model


def save(
    program: Program,
    config: PreTrainedConfig,
    generation_config: GenerationConfig | None,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | os.PathLike[str],
    *,
    source: str | os.PathLike[str] = "",
    name: str = "",
    max_shard_size: str = "5GB",
) -> None:
    """Write the folder that `skink.load` reads: configuration, graph, safetensors, tokenizer and model card.

    Args:
        program: as in `to_huggingface`.
        config: as in `to_huggingface`.
        generation_config: as in `to_huggingface`.
        tokenizer: written too, where given.
        folder: made where it does not exist.
        source: the folder or hub id that the model came from; files by which sentence-transformers reads it are copied.
        name: what the model card calls it; the folder's name by default.
        max_shard_size: weights beyond this go into several files.
    """
    model = to_huggingface(program, config, generation_config, copy=False)
    copied = copy_sentence_files(source, folder) if source else ()
    if name:
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        (path / CARD_FILE).write_text(card_text(name, model.config, sentences=bool(copied)), encoding="utf-8")
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
