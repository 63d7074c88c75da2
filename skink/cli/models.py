"""What `MODEL` stands for on the command line."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skink.errors import ModelError

if TYPE_CHECKING:
    from skink.evaluation import GenerationTarget
    from skink.graph.program import Program

_ONNX_FILE = "model.onnx"


@dataclass(frozen=True)
class Loaded:
    """A model and its tokenizer; `tokenizer` is None where the checkpoint has none."""

    model: Any
    tokenizer: Any


def load_model(name: str, *, dtype: str = "auto", device: str = "cpu", encoders: bool = False) -> Loaded:
    """A Hugging Face decoder, or with `encoders` an encoder, in eval mode, by hub id, folder or `stdlib-llama`.

    Raises:
        ModelError: MODEL-001 ... -003, -005 for an encoder that is not wanted.
    """
    from skink.export.huggingface import load_source

    if is_onnx(name):
        raise ModelError(
            "MODEL-001",
            f"{name!r} is an ONNX folder, and this needs a PyTorch model.",
            fix=f"give {str(Path(name).parent)!r}, if that is the folder it was exported from.",
        )
    model, tokenizer = load_source(name, dtype=dtype, device=device, encoders=encoders)
    return Loaded(model, tokenizer)


def is_onnx(name: str) -> bool:
    """Whether `name` is a folder of an exported ONNX model."""
    return (Path(name) / _ONNX_FILE).is_file()


def load_target(name: str, *, dtype: str = "auto", device: str = "cpu") -> "GenerationTarget[Any]":
    """Something that reads a prompt and then one token at a time: a Hugging Face model, or ONNX Runtime."""
    from skink.evaluation import HuggingFaceTarget

    if is_onnx(name):
        from skink.export.onnx import OrtRunner

        runner: GenerationTarget[Any] = OrtRunner(Path(name))
        return runner
    return HuggingFaceTarget(load_model(name, dtype=dtype, device=device).model)


def tokenizer_of(name: str, loaded: Loaded) -> Any:
    """The tokenizer.

    Raises:
        ModelError: MODEL-001 where there is none.
    """
    if loaded.tokenizer is None:
        raise ModelError(
            "MODEL-001",
            f"{name!r} has no tokenizer, and this command reads text.",
            fix="copy tokenizer.json and tokenizer_config.json into the folder from the model it belongs to.",
        )
    return loaded.tokenizer


def captured_program(name: str, *, meta: bool) -> "Program":
    """A model's program: of a Skink folder the one that it holds, of any other as captured, not yet canonical.

    Args:
        name: as in `load_model`.
        meta: read the configuration only; weights have shapes and no values.

    Raises:
        ModelError: MODEL-001 ... -003.
        CaptureError: CAPTURE-002 ... -004.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from skink.export.huggingface import SkinkConfig
    from skink.export.huggingface.base import SkinkPreTrainedModel
    from skink.export.huggingface.checkpoint import read_graph
    from skink.export.huggingface.loading import encoder_class
    from skink.graph.capture import capture

    config = _configuration(name)
    if meta:
        if isinstance(config, SkinkConfig):
            return read_graph(_place(name), {})
        with torch.device("meta"):
            encoder = encoder_class(config)
            made = encoder(config) if encoder else AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        model = made.eval()
    else:
        # As stored, so that sizes are those of the files.
        stored = str(getattr(config, "dtype", None) or "auto").removeprefix("torch.")
        model = load_model(name, dtype=stored, encoders=True).model
    if isinstance(model, SkinkPreTrainedModel):
        return model.program
    program = capture(model)
    program.origin |= {"model_type": model.config.model_type, "name": name}
    return program


def _configuration(name: str) -> Any:
    """The configuration of a decoder or encoder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from skink.export.huggingface import SkinkConfig, register
    from skink.export.huggingface.checkpoint import read_config
    from skink.export.huggingface.loading import encoder_class

    register()
    path = _place(name)
    if Path(path).is_dir():
        read_config(Path(path))
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(
            "MODEL-001",
            f"the configuration of {name!r} cannot be had.",
            why=str(error).strip().split("\n", 1)[0],
            fix="check the path, the name and the network, or use 'stdlib-llama', which ships with Skink.",
        ) from error
    decodes = isinstance(config, SkinkConfig) or type(config) in AutoModelForCausalLM._model_mapping
    if not decodes and encoder_class(config) is None:
        raise ModelError(
            "MODEL-001",
            f"{name!r} is a {config.model_type} model, which is not a causal language model.",
            fix="give a decoder: a model that AutoModelForCausalLM loads.",
        )
    return config


def _place(name: str) -> str:
    """The folder of the model that ships, where it is meant; any other name as it is."""
    from skink.export.huggingface.loading import STDLIB_LLAMA

    if name != STDLIB_LLAMA:
        return name
    from importlib.resources import files

    return str(files("skink") / "assets" / STDLIB_LLAMA)
