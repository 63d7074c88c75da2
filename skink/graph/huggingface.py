"""What Hugging Face models need for capture: explicit inputs, no cache, attention and experts as semantic ops.

A model is captured with our attention where it lets that be set (`huggingface_attention.py`), and otherwise with
transformers' plain one, whose masks are tensors in the graph.
"""

import copy
import inspect
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from skink.errors import CaptureError
from skink.graph.capture import Subject
from skink.graph.huggingface_attention import IMPLEMENTATION, OwnMaskError
from skink.graph.huggingface_experts import IMPLEMENTATION as EXPERTS_IMPLEMENTATION
from skink.graph.program import Input, Program

# Exported in bfloat16 so that casts to the model's own dtype can be told from casts to float32; see Subject.cast.
_EXPORT_DTYPE = torch.bfloat16

# What models are told of each token; all int64[B, T].
_INPUTS = ("input_ids", "attention_mask", "position_ids", "token_type_ids")


class _Forward(nn.Module):
    """A model as a pure function of tokens, mask and positions.

    Args:
        model: any Hugging Face model.
        names: the inputs that its forward takes, in order.
        outputs: which of its outputs are wanted.
        plain: keep transformers' own attention, with its masks as tensors.
    """

    def __init__(
        self, model: PreTrainedModel, names: tuple[str, ...], outputs: tuple[str, ...], *, plain: bool
    ) -> None:
        super().__init__()
        self.model, self.names, self.outputs, self.plain = model, names, outputs, plain

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        given = (input_ids, attention_mask, position_ids, token_type_ids)
        arguments: dict[str, Any] = {name: value for name, value in zip(_INPUTS, given) if name in self.names}
        if self.model.config.model_type == "mpt":
            # It slices its biases out of those of the longest text, in a way that has no one shape for every length.
            object.__setattr__(self.model.config, "max_seq_len", input_ids.shape[1])
        if "use_cache" in inspect.signature(self.model.forward).parameters:
            arguments["use_cache"] = False
        result = self.model(**arguments)
        return tuple(getattr(result, name) for name in self.outputs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Forward":
        # The copy alone is told to use our attention, so that the caller's model keeps its own.
        clone = _Forward(copy.deepcopy(self.model, memo), self.names, self.outputs, plain=self.plain)
        model = clone.model
        _set_attention(model, plain=self.plain)
        _count_positions(self.model, model)
        if getattr(model, "_can_set_experts_implementation", lambda: False)():
            model.set_experts_implementation(EXPERTS_IMPLEMENTATION)
        model.config.use_cache = False
        return clone


def _set_attention(model: PreTrainedModel, *, plain: bool) -> None:
    """Our attention where a model lets it be set, and elsewhere transformers' plain one, whose masks are tensors."""
    owners = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    for owner in owners:
        if not plain and owner._can_set_attn_implementation():
            owner.set_attn_implementation(IMPLEMENTATION)
    for owner in owners:
        if owner.config._attn_implementation != IMPLEMENTATION:
            # There is no public way: `set_attn_implementation` refuses classes with attention of their own.
            owner.config._attn_implementation_internal = "eager"


class _Count:
    """Positions one after the other from `first`, as many as are asked for."""

    def __init__(self, first: int) -> None:
        self.first = first

    def __getitem__(self, index: tuple[slice, slice]) -> Tensor:
        rows, columns = index
        return torch.arange(self.first + (columns.start or 0), self.first + columns.stop)[None][rows]


def _count_positions(source: nn.Module, copied: nn.Module) -> None:
    """Count where encoders read positions off a buffer: its length would bound the number of tokens in the graph."""
    for original, module in zip(source.modules(), copied.modules(), strict=True):
        buffer = original._buffers.get("position_ids")
        if buffer is None or buffer.is_meta or buffer.dim() != 2 or buffer.shape[0] != 1:
            continue
        first = int(buffer[0, 0])
        if torch.equal(buffer[0], torch.arange(first, first + buffer.shape[1], device=buffer.device)):
            del module._buffers["position_ids"]
            module.__dict__["position_ids"] = _Count(first)


def capture_huggingface(model: nn.Module, run: Callable[[Subject], Program]) -> Program:
    """Capture a Hugging Face decoder or encoder with `run`.

    Attention and masks become semantic ops where the model goes through transformers' interfaces. A model that does
    something else with its masks is captured with them as tensors, to be raised by pattern.

    Raises:
        CaptureError: CAPTURE-002 not one graph for any number of tokens, CAPTURE-003 an unknown mask, CAPTURE-004 no
            such model.
    """
    try:
        return _run(run, _subject(model, plain=False))
    except CaptureError as error:
        first = error
    if first.code == "CAPTURE-002" and re.search(r"dtype|scalar type", first.why):
        # Some classes compute in float32 what others do in the dtype of the weights, and mix the two.
        try:
            return _run(run, _subject(model, plain=False, cast=None))
        except CaptureError:
            raise first from None
    if first.code in ("CAPTURE-002", "CAPTURE-005") or isinstance(first, OwnMaskError):
        try:
            return _run(run, _subject(model, plain=True))
        except CaptureError as error:
            first = error if isinstance(first, OwnMaskError) else first
    if first.code == "CAPTURE-005":
        raise CaptureError(
            "CAPTURE-002",
            f"{type(model).__name__} has not one graph for every number of tokens.",
            where=first.where,
            why=first.why or first.what,
            fix="it reads tokens in a loop, or in parts of a fixed size; other models can be captured.",
        ) from first
    raise first


def _run(run: Callable[[Subject], Program], subject: Subject) -> Program:
    """A program for as many tokens as the model can read: not one for those of its first chunk alone."""
    program = run(subject)
    longest = program.origin.get("longest", {}).get("T")
    config: PreTrainedConfig = subject.model.config  # type: ignore[assignment]
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and isinstance(positions, int) and longest < positions:
        raise CaptureError("CAPTURE-005", f"the graph is for {longest} tokens at most.", fix="capture it in chunks.")
    return program


def _subject(model: nn.Module, *, plain: bool, cast: torch.dtype | None = _EXPORT_DTYPE) -> Subject:
    if not isinstance(model, PreTrainedModel):
        raise CaptureError(
            "CAPTURE-004",
            f"{type(model).__name__} is not a Hugging Face model.",
            fix="load it with AutoModelForCausalLM, or give example_inputs= for a module of another kind.",
        )
    if model.config.is_encoder_decoder:
        raise CaptureError(
            "CAPTURE-004",
            f"{type(model).__name__} is an encoder-decoder model.",
            fix="only decoders and encoders are supported.",
        )
    taken = _parameters(model)
    if "input_ids" not in taken:
        raise CaptureError(
            "CAPTURE-004",
            f"{type(model).__name__} does not take token ids.",
            fix="give example_inputs= for a module of another kind.",
        )
    # What decoders and encoders say of tokens: a decoder is told positions, so that it can go on from any; an encoder
    # counts them itself, and may be told which of two texts a token is of.
    wanted = _INPUTS[:3] if model.can_generate() else (*_INPUTS[:2], _INPUTS[3])
    names = tuple(name for name in wanted if name in taken)
    headless = model.base_model is model and not model.can_generate()
    inputs = tuple(Input(name, torch.int64, ("B", "T")) for name in names)
    outputs = _outputs(model, headless=headless)
    module = _Forward(model, names, outputs, plain=plain)
    return Subject(module, inputs, prefix="model.", model=model, cast=cast, outputs=outputs)


def _outputs(model: PreTrainedModel, *, headless: bool) -> tuple[str, ...]:
    """Names of what a model returns, in the order of its own results."""
    if not headless:
        # Every class that finds answers in a text calls its last layer so.
        return ("start_logits", "end_logits") if hasattr(model, "qa_outputs") else ("logits",)
    pooled = isinstance(getattr(model, "pooler", None), nn.Module)
    return ("last_hidden_state", "pooler_output") if pooled else ("last_hidden_state",)


def _parameters(model: PreTrainedModel) -> set[str]:
    """Names of what a model's forward takes, also where it hands them on to the model inside it."""
    parameters = inspect.signature(model.forward).parameters
    taken = set(parameters)
    if model.base_model is not model and any(entry.kind is entry.VAR_KEYWORD for entry in parameters.values()):
        inner = inspect.signature(model.base_model.forward).parameters
        taken |= {"position_ids"} & set(inner)
    return taken
