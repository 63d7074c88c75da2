"""Tiny configurations of any model: a default configuration with every size made small, by the names of its fields.

What the fields mean is known by their names, which models share; `EXCEPTIONS` holds what names do not tell.
"""

import re
from typing import Any

from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PretrainedConfig,
    PreTrainedModel,
)

VOCABULARY = 97
WIDTH = 64
HEADS = 4
HEAD_WIDTH = 16
POSITIONS = 64
WINDOW = 5

# Names of fields (whole) → their size; the first that fits counts. A field keeps 0 and None where that is its default.
_SIZES: tuple[tuple[str, int], ...] = (
    (r"num_kv_shared_layers", 2),
    (r"type_vocab_size|task_type_vocab_size", 2),
    (r"(\w+_)?vocab_size(_\w+)?", VOCABULARY),
    (r"hidden_size_per_layer_input|ple_embed_dim|d_rel|adapter_rank|router_hidden_size|prompt_mid_dim", 16),
    (r"hidden_size|d_model|n_embd|emb_dim|embedding_dim|embedding_size|word_embed_proj_dim|hidden_size_global", WIDTH),
    (r"backbone_hidden_size|attention_hidden_size|lru_width|\w+_embedding_size|\w+_embed_dim|input_size", WIDTH),
    (r"out_hidden_size|projector_\w+_dim|vision_output_dim|adapter_\w+_(dim|size)|out_channels|output_channels", WIDTH),
    (r"adapter_(in|out)_dim|adapter_input_size|ext_pw_out_channel|depthwise_separable_out_channel", WIDTH),
    (r"nemo_conv_channels|downsample_hidden_size|conv_output_size", WIDTH),
    (r"mamba_num_heads|mamba_n_heads|n_mamba_heads", 8),
    (r"num_key_value_heads|kv_n_heads|num_kv_heads|swa_num_key_value_heads", 2),
    (r"(\w+_)?(num_attention_heads|attention_heads|n_head|n_heads|num_heads)", HEADS),
    (r"linear_num_(key|value)_heads|index_n_heads", HEADS),
    (r"qk_rope_head_dim", 8),
    (r"qk_head_dim", HEAD_WIDTH + 8),
    (r"rotary_dim", 8),
    (r"(\w+_)?head_dim|d_head|dim_head|kv_channels|attention_head_size|mamba_d_head|mamba_headdim|d_kv", HEAD_WIDTH),
    (r"(num_hidden_layers|n_layer|n_layers|num_layers|num_blocks|depth|(num_)?(en|de)coder_layers)", 2),
    (r"(\w+_)?(intermediate_size|ffn_dim|ffn_hidden_size|d_ff|dim_ff|dff|d_inner|feed_forward_size|mlp_dim)", 96),
    (r"intermediate_size_mlp", 96),
    (r"(\w*max_position_embeddings|n_positions|n_ctx|max_seq_len|model_max_length|max_\w+_positions)", POSITIONS),
    (r"context_length|num_position_embeddings", POSITIONS),
    (r"(sliding_window(_size)?|attention_window_size|window_size|local_attention)", WINDOW),
    (r"(attention_chunk_size|local_attention_window_len|floor_scale|log_scaling_n_floor)", 8),
    (r"(num_experts|n_routed_experts|num_local_experts|moe_num_experts|zero_expert_num)", 4),
    (r"(num_experts_per_tok(en)?|moe_topk|moe_top_k|moe_k)", 2),
    (r"(n_shared_experts|num_shared_experts|moe_num_shared_experts)", 1),
    (r"(n_group|num_expert_group)", 2),
    (r"topk_group", 1),
    (r"(q_lora_rank|kv_lora_rank|o_lora_rank|laurel_rank|hc_lowrank|mamba_dt_rank|time_step_rank|gated_norm_rank)", 16),
    (r"(mamba_d_state|state_size|ssm_state_size)", 8),
    (r"(mamba_chunk_size|chunk_size|block_size)", 8),
    (r"(n_groups|mamba_n_groups|mamba_ngroups|o_groups)", 2),
    (r"index_topk", 8),
    (r"first_k_dense_replace|num_dense_layers", 1),
    (r"image_size|crop_size", 32),
    (r"patch_size", 8),
)
# What some configurations leave open though their classes need it.
_UNSAID = {"head_dim": HEAD_WIDTH, "num_key_value_heads": 2}
_SPECIAL_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
# Other marks (images, audio, ...) are ids that inputs do not hold.
_MARK = re.compile(r"\w+_(token_id|token_index|index)")
FIRST_MARK = VOCABULARY - 16

_KINDS = ("full_attention", "sliding_attention")
# Sizes of layers with a window, which dots3_note keeps apart.
_WINDOWED = {
    "swa_num_attention_heads": HEADS,
    "swa_num_key_value_heads": HEADS,
    "swa_q_lora_rank": 16,
    "swa_kv_lora_rank": 16,
    "swa_head_dim": 24,
    "swa_qk_nope_head_dim": 16,
    "swa_v_head_dim": 16,
}
_INDEXER = {
    "indexer_n_heads": HEADS,
    "indexer_kv_heads": 1,
    "indexer_head_dim": HEAD_WIDTH,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}

# model type → fields that names do not tell, and why; "a.b" is field b of the nested configuration a.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "blt": {"encoder_hash_byte_group_vocab": VOCABULARY},
    "cohere_compass_text": {
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in _KINDS}
    },
    "dbrx": {
        "attn_config.rope_theta": 10000.0,
        "attn_config.clip_qkv": 8.0,
    },  # its class needs them, and they have no default
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "n_shared_experts": 1},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots3_note": {f"text_config.{name}": value for name, value in _WINDOWED.items()},
    "dots3_note_text": _WINDOWED,
    "gemma4_assistant": {"text_config.hidden_size_per_layer_input": 0, "text_config.vocab_size_per_layer_input": 0},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},  # width * expansion / head width
    "musicgen": {"decoder.num_codebooks": 1},
    "musicgen_melody": {"decoder.num_codebooks": 1},
    "qwen4_exp": {f"text_config.{name}": value for name, value in _INDEXER.items()},
    "qwen4_exp_text": _INDEXER,
    "reformer": {"is_decoder": True, "axial_pos_shape": [8, 8], "axial_pos_embds_dim": [16, 48]},
}

# model type → which layers of the default stay, where the first of each kind are not enough.
LAYERS: dict[str, list[int]] = {
    "gemma3n": [0, 4, 5, 9],  # the last two share keys and values with the first two
    "gemma3n_text": [0, 4, 5, 9],
    "zamba": [0, 2, 4, 2],  # one block that is shared by two layers
    "zamba2": [0, 6, 1, 6],
}


def tiny_config(model_type: str) -> PretrainedConfig:
    """The smallest configuration of a model type that still has every kind of layer."""
    cls = CONFIG_MAPPING[model_type]
    given = EXCEPTIONS.get(model_type, {})
    try:
        default = cls()
    except Exception:  # some defaults refuse themselves
        default = cls(**_nested(given))
    return cls(**_shrunk(default, given, LAYERS.get(model_type)))


def _nested(given: dict[str, Any]) -> dict[str, Any]:
    """`{"a.b": 1}` as `{"a": {"b": 1}}`."""
    result: dict[str, Any] = {}
    for path, value in given.items():
        owner, _, name = path.rpartition(".")
        (result.setdefault(owner, {}) if owner else result)[name] = value
    return result


def _shrunk(default: PretrainedConfig, given: dict[str, Any], layers: list[int] | None) -> dict[str, Any]:
    """Arguments for a small configuration of the default's class."""
    fields = {name: value for name, value in vars(default).items() if not name.startswith("_")}
    given = _nested(given)
    kept = layers if layers and _layers(fields) > 0 else _kept_layers(fields)
    marks = iter(range(FIRST_MARK, VOCABULARY))
    small: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, PretrainedConfig):
            small[name] = _shrunk(value, given.pop(name, {}), layers)
        elif name in _SPECIAL_TOKENS:
            small[name] = _SPECIAL_TOKENS[name]
        elif _MARK.fullmatch(name) and isinstance(value, int) and value >= FIRST_MARK:
            small[name] = next(marks, FIRST_MARK)
        elif isinstance(value, list) and value == list(range(_layers(fields))):
            small[name] = list(range(len(kept)))
        elif isinstance(value, list) and len(value) == _layers(fields) and value:
            small[name] = [_size(name, value[layer]) for layer in kept]
        elif name == "rope_parameters" and value:
            small[name] = _rope(value)
        elif value is None and name in _UNSAID:
            small[name] = _UNSAID[name]
        elif (size := _size(name, value)) != value:
            small[name] = size
    if name := _layers_field(fields):
        small[name] = len(kept)
    if isinstance(fields.get("num_key_value_heads"), int):
        same = fields["num_key_value_heads"] == fields.get("num_attention_heads")
        small["num_key_value_heads"] = HEADS if same else 2
    if fields.get("head_dim") is not None and fields["head_dim"] == fields.get("qk_rope_head_dim"):
        small["head_dim"] = small["qk_rope_head_dim"]
    return small | given


def _size(name: str, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        return value
    size = next((size for pattern, size in _SIZES if re.fullmatch(pattern, name)), value)
    return min(size, value)


def _layers_field(fields: dict[str, Any]) -> str | None:
    names = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers")
    return next((name for name in names if isinstance(fields.get(name), int)), None)


def _layers(fields: dict[str, Any]) -> int:
    name = _layers_field(fields)
    return fields[name] if name else -1


def _kept_layers(fields: dict[str, Any]) -> list[int]:
    """Which layers stay: the first of each kind, and two at least."""
    count = _layers(fields)
    lists = [value for value in fields.values() if isinstance(value, list) and len(value) == count]
    lists = [value for value in lists if all(isinstance(entry, str | int | float) for entry in value)]
    lists = [value for value in lists if value != list(range(count))]  # which layers, not what they are
    kinds: dict[Any, int] = {}
    for layer in range(count):
        kinds.setdefault(tuple(entry[layer] for entry in lists), layer)
    kept = sorted(kinds.values())[:6]
    if len(kept) < 2:
        kept = [0, 1]
    return kept


def _rope(parameters: dict[str, Any]) -> dict[str, Any]:
    """Rotary parameters (also by kind of layer) for few positions."""
    small = {}
    for name, value in parameters.items():
        if isinstance(value, dict):
            small[name] = _rope(value)
        elif name == "original_max_position_embeddings":
            small[name] = POSITIONS // 2
        elif name == "mrope_section":
            small[name] = [HEAD_WIDTH // 2 - 2 * (HEAD_WIDTH // 8), HEAD_WIDTH // 8, HEAD_WIDTH // 8]
        else:
            small[name] = value
    return small


def decoder_config(model_type: str) -> tuple[PretrainedConfig, type[PreTrainedModel]]:
    """A tiny configuration of a family's decoder (of the text alone, where its class takes no more), and the class."""
    config = tiny_config(model_type)
    cls = AutoModelForCausalLM._model_mapping[type(config)]
    if not isinstance(config, cls.config_class):
        config = next((value for value in vars(config).values() if isinstance(value, cls.config_class)), config)
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
        config.is_encoder_decoder = False
    return config, cls


def encoder_config(model_type: str) -> tuple[PretrainedConfig, type[PreTrainedModel]]:
    """A tiny configuration of a family's encoder with its head for masked words, and the class."""
    config = tiny_config(model_type)
    return config, AutoModelForMaskedLM._model_mapping[type(config)]
