"""The configuration of a Skink model: what Hugging Face tools read from any model's, and where the model came from.

The graph is not here: it is in graph.json, next to config.json.
"""

from typing import Any, ClassVar

import torch
from transformers import PreTrainedConfig

# Copied from the source's configuration under the same names, where it has them.
_COPIED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "type_vocab_size",
    "problem_type",
)


class SkinkConfig(PreTrainedConfig):
    """Sizes and token ids as in other models; all optional, and none decides what the model computes.

    Args:
        source: what the model was made from: `model_type`, `class` and `name`.
        tie_word_embeddings: whether some weights are others by a second name.
    """

    model_type: ClassVar[str] = "skink"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    vocab_size: int | None = None
    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    type_vocab_size: int | None = None
    tie_word_embeddings: bool = False
    use_cache: bool = True
    source: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]
        # Auto classes look the model up by the type of its configuration: by then it must be known to them.
        from skink.export.huggingface.registration import register_model

        register_model()

    @classmethod
    def from_source(
        cls, source: PreTrainedConfig, *, name: str, class_name: str, tied: bool, dtype: torch.dtype
    ) -> "SkinkConfig":
        """The configuration of a model made from one with the configuration `source`.

        Args:
            source: left as it is. A Skink configuration keeps the source that it names itself.
            name: the hub id or folder that the model came from.
            class_name: of the model.
            tied: whether some weights are others by a second name.
            dtype: of the trained weights.
        """
        text = source.get_text_config(decoder=True)
        copied: dict[str, Any] = {name: value for name in _COPIED if (value := getattr(text, name, None)) is not None}
        if isinstance(source, SkinkConfig):
            origin = source.source
        else:
            origin = {"model_type": source.model_type, "class": class_name, "name": name}
        heads = copied.get("num_attention_heads")
        if heads:
            copied.setdefault("num_key_value_heads", heads)
            if "hidden_size" in copied:
                copied.setdefault("head_dim", copied["hidden_size"] // heads)
        if "ForSequence" in class_name or "ForToken" in class_name:
            copied |= {"id2label": dict(text.id2label or {}), "label2id": dict(text.label2id or {})}
        return cls(**copied, tie_word_embeddings=tied, source=origin, dtype=dtype)
