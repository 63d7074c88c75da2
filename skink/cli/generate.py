"""`skink generate`: text from a model, as it comes."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from skink.cli.arguments import AsJson, Device, Dtype, check_place
from skink.cli.console import session_of
from skink.errors import OptionError, check_range

if TYPE_CHECKING:
    from torch import Tensor

_SAMPLING = "Sampling"


@dataclass(frozen=True)
class Choice:
    """How the next token is chosen.

    Args:
        max_new_tokens: tokens to generate at most.
        sample: draw from the distribution; otherwise the likeliest token is taken.
        temperature: divides the logits, > 0.
        top_k: draw among so many of the likeliest; 0 for all.
        top_p: draw among the likeliest that make up this share of the probability, in (0, 1].
        seed: of the draws.
    """

    max_new_tokens: int = 128
    sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_range("temperature", self.temperature, low=0.0, high=100.0, open_low=True)
        check_range("top-p", self.top_p, low=0.0, high=1.0, open_low=True)


def generate(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A hub id, a folder, a folder made by Skink (ONNX too), or stdlib-llama."),
    ],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text to continue; - reads it from stdin.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.", metavar="N")] = 128,
    sample: Annotated[
        bool, typer.Option("--sample", help="Draw tokens; without it, the likeliest.", rich_help_panel=_SAMPLING)
    ] = False,
    temperature: Annotated[
        float, typer.Option(help="Above 1: more varied; below: safer.", metavar="X", rich_help_panel=_SAMPLING)
    ] = 1.0,
    top_k: Annotated[
        int, typer.Option(min=0, help="Draw among the N likeliest; 0: all.", metavar="N", rich_help_panel=_SAMPLING)
    ] = 0,
    top_p: Annotated[
        float,
        typer.Option(help="Draw among the likeliest that make up this share.", metavar="X", rich_help_panel=_SAMPLING),
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the draws.", metavar="N", rich_help_panel=_SAMPLING)] = 0,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Continue PROMPT with MODEL, in PyTorch, or in ONNX Runtime where MODEL is an ONNX folder."""
    session = session_of(context)
    choice = Choice(max_new_tokens, sample, temperature, top_k, top_p, seed)
    check_place(dtype, device)
    if prompt == "-":
        prompt = sys.stdin.read()
    from skink.cli.quiet import quiet_transformers

    with quiet_transformers():
        if session.as_json:
            continuation = continue_text(model, prompt, choice, dtype=dtype, device=device)
            session.emit({"model": model, "prompt": prompt, "continuation": continuation})
            return

        def begin() -> None:
            session.write(prompt)

        continue_text(model, prompt, choice, dtype=dtype, device=device, begin=begin, write=session.write)
        session.write("\n")


def continue_text(
    name: str,
    prompt: str,
    choice: Choice,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    begin: Callable[[], None] = lambda: None,
    write: Callable[[str], None] = lambda text: None,
) -> str:
    """What a model writes after a prompt.

    Args:
        name: as `MODEL`, or an ONNX folder.
        prompt: the text before.
        choice: how tokens are chosen.
        dtype: to work in.
        device: to work on.
        begin: called once the model is loaded and the prompt is read.
        write: called with each new piece of text, as soon as it is sure.

    Raises:
        ModelError: MODEL-001 ... -003.
        OptionError: OPTION-002 for an empty prompt where the model has no token to begin with.
    """
    from skink.cli.models import is_onnx

    if is_onnx(name):
        return _continue_onnx(name, prompt, choice, begin, write)
    return _continue_torch(name, prompt, choice, dtype, device, begin, write)


def _continue_torch(
    name: str,
    prompt: str,
    choice: Choice,
    dtype: str,
    device: str,
    begin: Callable[[], None],
    write: Callable[[str], None],
) -> str:
    import torch

    from skink.cli.models import load_model, tokenizer_of

    loaded = load_model(name, dtype=dtype, device=device)
    tokenizer = tokenizer_of(name, loaded)
    ids = _prompt_ids(tokenizer, prompt)
    pieces = _Pieces(tokenizer, write)
    options: dict[str, Any] = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    if choice.sample:
        torch.manual_seed(choice.seed)
        options = {
            "do_sample": True,
            "temperature": choice.temperature,
            "top_k": choice.top_k,
            "top_p": choice.top_p,
        }
    begin()
    loaded.model.generate(
        input_ids=ids.to(loaded.model.device),
        attention_mask=torch.ones_like(ids).to(loaded.model.device),
        max_new_tokens=choice.max_new_tokens,
        num_beams=1,
        pad_token_id=_padding(tokenizer, loaded.model),
        streamer=pieces,
        **options,
    )
    return pieces.text


def _continue_onnx(
    name: str, prompt: str, choice: Choice, begin: Callable[[], None], write: Callable[[str], None]
) -> str:
    from transformers import AutoTokenizer

    from skink.cli.models import Loaded, tokenizer_of
    from skink.export.onnx import OrtRunner

    folder = Path(name)
    has_tokenizer = (folder / "tokenizer_config.json").is_file() or (folder / "tokenizer.json").is_file()
    found = AutoTokenizer.from_pretrained(folder, trust_remote_code=False) if has_tokenizer else None
    runner = OrtRunner(folder)
    tokenizer = tokenizer_of(name, Loaded(runner, found))
    ids = _prompt_ids(tokenizer, prompt)
    pieces = _Pieces(tokenizer, write)
    begin()
    pieces.put(ids)
    runner.generate(
        ids,
        max_new_tokens=choice.max_new_tokens,
        do_sample=choice.sample,
        temperature=choice.temperature,
        top_k=choice.top_k,
        top_p=choice.top_p,
        seed=choice.seed,
        on_token=pieces.put,
    )
    pieces.end()
    return pieces.text


def _prompt_ids(tokenizer: Any, prompt: str) -> "Tensor":
    """int64[1, T], T >= 1."""
    import torch

    ids = tokenizer(prompt)["input_ids"]
    if not ids:
        if tokenizer.bos_token_id is None:
            raise OptionError("OPTION-002", "the prompt is empty.", fix="give at least one character.")
        ids = [tokenizer.bos_token_id]
    return torch.tensor([ids], dtype=torch.int64)


def _padding(tokenizer: Any, model: Any) -> int | None:
    """A token for padding, which one sequence never needs; without one transformers warns."""
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)
    ends = model.generation_config.eos_token_id
    end = ends[0] if isinstance(ends, list) and ends else ends
    return None if end is None else int(end)


class _Pieces:
    """A streamer for `generate`: new text as soon as later tokens cannot change it."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        self.text = ""
        self._tokenizer = tokenizer
        self._write = write
        self._prompt: list[int] | None = None
        self._before = ""
        self._new: list[int] = []

    def put(self, tokens: "Tensor") -> None:
        """The prompt first [1, T], then each new token [1]."""
        ids = tokens.flatten().tolist()
        if self._prompt is None:
            self._prompt = ids
            self._before = self._decode(ids)
            return
        self._new.extend(ids)
        text = self._decode([*self._prompt, *self._new])[len(self._before) :]
        # Half of a character that spans several tokens is decoded to U+FFFD until the rest is there.
        if not text.endswith("\ufffd"):
            self._extend(text)

    def end(self) -> None:
        """No more tokens."""
        self._extend(self._decode([*(self._prompt or []), *self._new])[len(self._before) :])

    def _extend(self, text: str) -> None:
        if len(text) > len(self.text):
            self._write(text[len(self.text) :])
            self.text = text

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
