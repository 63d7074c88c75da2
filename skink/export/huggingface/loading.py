"""Loading of checkpoints: Skink folders, and any Hugging Face decoder to start from."""

import json
import os
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils.hub import cached_file

from skink.errors import ModelError, OptionError, suggest
from skink.export.huggingface.base import SkinkPreTrainedModel
from skink.export.huggingface.checkpoint import (
    GRAPH_FILE,
    check_weights,
    explain_load,
    read_config,
    refuse_partial_load,
)
from skink.export.huggingface.config import SkinkConfig
from skink.export.huggingface.forms import DECODER, named_form
from skink.export.huggingface.registration import register

# The model that ships with Skink.
STDLIB_LLAMA = "stdlib-llama"
_ASSETS = Path(__file__).parents[2] / "assets"
_DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


def load(
    path: str | os.PathLike[str], *, device: str | torch.device | None = None, dtype: str | torch.dtype = "auto"
) -> Any:
    """A model from a folder that Skink wrote (or from such a repository on the hub).

    Args:
        path: the folder. It holds a `SkinkForCausalLM`, or an encoder, `SkinkModel` or `SkinkForMaskedLM` and the like.
        device: where to put it; the CPU by default.
        dtype: `auto` is what is stored, but float32 on a CPU, where half precision is slow.

    Raises:
        ModelError: MODEL-001 no Skink folder, -002 damaged weights, -003 no safetensors.
        GraphError: GRAPH-001, a damaged graph.
    """
    target = torch.device(device or "cpu")
    name = str(path)
    values = _values(name)
    if values["model_type"] != SkinkConfig.model_type:
        raise ModelError(
            "MODEL-001",
            f"{name!r} is a {values['model_type']} checkpoint, not a Skink model.",
            why=f"it has no {GRAPH_FILE}, and config.json names another model_type.",
            fix=f"make one of it: skink compress {name} --out FOLDER.",
        )
    form = named_form(SkinkConfig(architectures=values.get("architectures"))) or DECODER
    loaded: SkinkPreTrainedModel = form.model_class.from_pretrained(name, dtype=_choose_dtype(dtype, values, target))
    nn.Module.to(loaded, target)
    return loaded


def load_source(
    name_or_path: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    encoders: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """A decoder to work on, in eval mode, and its tokenizer, or None where the checkpoint has none.

    Args:
        name_or_path: a hub id, a checkpoint's folder, a Skink folder, or `stdlib-llama`, the model that ships.
        dtype: as in `load`.
        device: as in `load`.
        encoders: load encoders too, as the class that they were saved from.

    Raises:
        ModelError: MODEL-001 no such checkpoint, -002 weights missing or damaged, -003 it needs pickles or code, -005
            an encoder where a decoder is wanted.
    """
    name = _resolve(name_or_path)
    target = torch.device(device or "cpu")
    values = _values(name)
    if values["model_type"] == SkinkConfig.model_type:
        if not encoders:
            refuse_encoder(name, SkinkConfig(architectures=values.get("architectures")))
        model: PreTrainedModel = load(name, device=target, dtype=dtype)
    else:
        model = _load_huggingface(name, values, _choose_dtype(dtype, values, target), encoders=encoders)
        nn.Module.to(model, target)
    return model.eval(), _load_tokenizer(name)


def stored_dtype(name_or_path: str | os.PathLike[str]) -> torch.dtype:
    """The dtype that a checkpoint's weights are stored in, as its configuration says; float32 where it says nothing.

    Raises:
        ModelError: as `load_source`.
    """
    values = _values(_resolve(name_or_path))
    stored = str(values.get("dtype") or values.get("torch_dtype") or "float32")
    dtype = getattr(torch, stored.removeprefix("torch."), torch.float32)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def _resolve(name_or_path: str | os.PathLike[str]) -> str:
    return str(_ASSETS / STDLIB_LLAMA) if str(name_or_path) == STDLIB_LLAMA else str(name_or_path)


def _values(name: str) -> dict[str, Any]:
    """The values of config.json, after checking a folder's weights."""
    register()
    folder = Path(name)
    if folder.is_dir():
        values = read_config(folder)
        _refuse_code(name, values)
        check_weights(folder)
        return values
    if folder.exists():
        raise ModelError("MODEL-001", f"{name!r} is a file, not a folder.", fix="give the folder that it is in.")
    try:
        path = cached_file(name, "config.json")
        values = json.loads(Path(str(path)).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            "MODEL-001",
            f"{name!r} is no folder here, and no model that could be had from the Hugging Face hub.",
            why=str(error).splitlines()[0],
            fix=f"check the path, the name and the network, or use {STDLIB_LLAMA!r}, which ships with Skink.",
        ) from error
    _refuse_code(name, values)
    return dict(values)


def _refuse_code(name: str, values: dict[str, Any]) -> None:
    """Only models that transformers (or Skink) itself knows can be loaded without running a stranger's code."""
    kind = values.get("model_type")
    if kind in CONFIG_MAPPING:
        return
    if values.get("auto_map"):
        raise ModelError(
            "MODEL-003",
            f"{name!r} needs code of its own to load, and Skink runs no remote code.",
            why=f"transformers does not know the model type {kind!r}; config.json names code by auto_map.",
            fix="use a model that transformers supports, or load it yourself and pass the model to skink.compress.",
        )
    raise ModelError(
        "MODEL-001",
        f"{name!r} is of the model type {kind!r}, which this transformers does not know.",
        fix="update transformers.",
    )


def encoder_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The class that an encoder's checkpoint was saved from; None for a decoder's, and where it says nothing of it."""
    form = named_form(config) if isinstance(config, SkinkConfig) else None
    if form is not None and form.encodes:
        ours: type[PreTrainedModel] = form.model_class
        return ours
    if config.is_encoder_decoder or not config.architectures:
        return None
    named = getattr(transformers, config.architectures[0], None)
    encodes = isinstance(named, type) and issubclass(named, PreTrainedModel) and not named.can_generate()
    return named if encodes else None


def is_encoder(config: PreTrainedConfig) -> bool:
    """Whether a checkpoint was saved from an encoder. A decoder saved without its head is none."""
    if encoder_class(config) is None or getattr(config, "is_decoder", False):
        return False
    return isinstance(config, SkinkConfig) or type(config) in AutoModelForMaskedLM._model_mapping


def holds_encoder(name_or_path: str | os.PathLike[str]) -> bool:
    """Whether a folder or repository holds an encoder; see `is_encoder`.

    Raises:
        ModelError: as `load_source`.
    """
    name = _resolve(name_or_path)
    values = _values(name)
    if values["model_type"] == SkinkConfig.model_type:
        return is_encoder(SkinkConfig(architectures=values.get("architectures")))
    return is_encoder(AutoConfig.from_pretrained(name, trust_remote_code=False))


def refuse_encoder(name: str, config: PreTrainedConfig) -> None:
    """Refuse what was saved from an encoder, where a decoder is wanted.

    Raises:
        ModelError: MODEL-005.
    """
    encoder = encoder_class(config)
    if encoder is None or not is_encoder(config):
        return
    raise ModelError(
        "MODEL-005",
        f"{name!r} is an encoder ({encoder.__name__}), and this needs a decoder.",
        why="an encoder writes no text: it can be inspected, compressed and exported.",
        fix=f"look at it with skink inspect {name}, make it smaller with skink compress, or give a decoder.",
    )


def _load_huggingface(
    name: str, values: dict[str, Any], dtype: torch.dtype | str, *, encoders: bool
) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    if not encoders:
        refuse_encoder(name, config)
    encoder = encoder_class(config) if encoders else None
    if encoder is None and type(config) not in AutoModelForCausalLM._model_mapping:
        raise ModelError(
            "MODEL-001",
            f"{name!r} is a {values['model_type']} model, which is not a causal language model.",
            fix="give a decoder: a model that AutoModelForCausalLM loads.",
        )
    from_pretrained: Any = (encoder or AutoModelForCausalLM).from_pretrained
    code = {} if encoder else {"trust_remote_code": False}
    try:
        model, info = from_pretrained(
            name, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True, **code
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise explain_load(name, error) from error
    refuse_partial_load(name, info)
    loaded: PreTrainedModel = model
    return loaded


def _load_tokenizer(name: str) -> PreTrainedTokenizerBase | None:
    folder = Path(name)
    if folder.is_dir() and not any((folder / file).is_file() for file in _TOKENIZER_FILES):
        return None
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            "MODEL-001",
            f"the tokenizer of {name!r} cannot be loaded.",
            why=str(error).splitlines()[0],
            fix="copy the tokenizer's files from the model it belongs to.",
        ) from error
    return tokenizer


def _choose_dtype(dtype: str | torch.dtype, values: dict[str, Any], device: torch.device) -> torch.dtype | str:
    if isinstance(dtype, torch.dtype):
        return dtype
    name = dtype.removeprefix("torch.")
    if name not in _DTYPES:
        raise OptionError("OPTION-002", f"dtype={dtype!r} is not a dtype to load in.", fix=suggest(name, _DTYPES))
    if name != "auto":
        chosen: torch.dtype = getattr(torch, name)
        return chosen
    stored = values.get("dtype") or values.get("torch_dtype")
    return torch.float32 if device.type == "cpu" and stored in ("float16", "bfloat16") else "auto"
