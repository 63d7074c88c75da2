"""`OrtRunner`: generation on ONNX Runtime. Tokens go in and come out; the state stays where the runtime put it."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from skink.errors import ModelError, OptionError, check_range
from skink.export.onnx.session import MODEL_FILE, OrtGraph, State

_LOGITS = "logits"

# Prompts are read in chunks of so many tokens on the CPU. ONNX Runtime's attention computes every score and then masks
# the future; in chunks there is less of it, and scores stay in the cache. Shipped model, float32, 1 thread, tokens/s:
#
#   chunk           32    64    128    256    512   whole
#   prompt of 512   3889  4002  5809   5088   3561  3077
#   prompt of 2000  2533  3416  3589   3591   2793  1296
_CPU_CHUNK = 128


@dataclass(frozen=True)
class OrtState:
    """What a sequence batch carries from step to step.

    Args:
        tensors: in ONNX Runtime's memory.
        mask: int64[B, total], 0 for padding, over all tokens so far.
        position: int64[B, 1], of each row's last token.
    """

    tensors: State
    mask: Tensor
    position: Tensor


class OrtRunner:
    """A decoder exported by `export_onnx`.

    Args:
        folder: the exported folder.
        threads: of ONNX Runtime's own pool; by default one for each core.
        providers: execution providers in order of preference, `["CPUExecutionProvider"]` by default. On a GPU the state
            stays in its memory.
        chunk: tokens of a prompt that are read at once; 0 for all. By default 128 on the CPU, and all elsewhere.

    Raises:
        ModelError: MODEL-001 for a folder without `model.onnx`, or whose graph is no decoder's.
        ExportError: EXPORT-003 where ONNX Runtime cannot load the graph.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        threads: int | None = None,
        providers: Sequence[str] | None = None,
        chunk: int | None = None,
    ) -> None:
        if chunk is not None:
            check_range("chunk", chunk, low=0, high=2**31)
        self.folder = Path(folder)
        if not (self.folder / MODEL_FILE).is_file():
            raise ModelError(
                "MODEL-001", f"{folder} holds no {MODEL_FILE}.", fix="give a folder that `skink export --onnx` wrote."
            )
        self.graph = OrtGraph(folder, threads=threads, providers=providers)
        if "input_ids" not in self.graph.inputs or _LOGITS not in self.graph.outputs:
            raise ModelError(
                "MODEL-001",
                f"{folder} holds a graph that takes {', '.join(self.graph.inputs)}, not tokens.",
                fix="run it with onnxruntime.InferenceSession.",
            )
        self.vocabulary = int(self.graph.outputs[_LOGITS].shape[-1])
        self.chunk = chunk if chunk is not None else _CPU_CHUNK if self.graph.device == "cpu" else 0
        self.generation_config: dict[str, Any] = self._read("generation_config.json")

    def forward(
        self,
        ids: Tensor,
        state: OrtState | None = None,
        attention_mask: Tensor | None = None,
        *,
        logits_to_keep: int = 0,
    ) -> tuple[Tensor, OrtState]:
        """Read tokens after `state`.

        Args:
            ids: int64[B, T].
            state: of the tokens before, or None for none.
            attention_mask: [B, T], 0 for padding, over these tokens; by default there is none.
            logits_to_keep: of how many last tokens logits are wanted; 0 for all.

        Returns:
            Logits [B, T or logits_to_keep, V] on the CPU, and the state after these tokens. The state given is left as
            it was.
        """
        rows = ids.shape[0]
        ids = ids.to("cpu", torch.int64)
        new = torch.ones_like(ids) if attention_mask is None else attention_mask.to("cpu", torch.int64)
        if new.shape != ids.shape:
            raise OptionError(
                "OPTION-002",
                f"attention_mask of shape {list(new.shape)} does not cover input_ids of shape {list(ids.shape)}.",
                fix="give one mask entry for each new token.",
            )
        if state is None:
            state = OrtState(
                self.graph.empty_state(rows), new.new_empty(rows, 0), torch.full((rows, 1), -1, dtype=torch.int64)
            )
        mask = torch.cat([state.mask, new], dim=1)
        # A row of padding so far has no last token: its position stays below zero, and counts as zero.
        positions = state.position + new.cumsum(1)
        feeds = {
            "input_ids": ids.numpy(),
            "attention_mask": mask.numpy(),
            "position_ids": positions.clamp(min=0).numpy(),
        }
        outputs, tensors = self.graph.run(feeds, state.tensors, logits_to_keep=logits_to_keep)
        return torch.from_numpy(outputs[_LOGITS]), OrtState(tensors, mask, positions[:, -1:])

    def prefill(self, ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, OrtState]:
        """Read a prompt [B, T]; logits [B, 1, V] of its last token, and a fresh state (see skink.evaluation)."""
        if ids.shape[1] == 0:
            raise OptionError("OPTION-002", "a prompt of 0 tokens cannot be continued.", fix="give at least one token.")
        if attention_mask is None:
            attention_mask = torch.ones_like(ids)
        size = self.chunk or ids.shape[1]
        logits, state = self.forward(ids[:, :size], None, attention_mask[:, :size], logits_to_keep=1)
        for start in range(size, ids.shape[1], size):
            part = slice(start, start + size)
            logits, state = self.forward(ids[:, part], state, attention_mask[:, part], logits_to_keep=1)
        return logits, state

    def step(self, token: Tensor, state: OrtState) -> tuple[Tensor, OrtState]:
        """Read one more token [B, 1]; logits [B, 1, V] and the new state."""
        return self.forward(token, state)

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int = 64,
        eos: int | Sequence[int] | None = None,
        pad: int | None = None,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        on_token: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """The prompts with what follows them, int64[B, T + N], N <= `max_new_tokens`.

        Args:
            input_ids: int64[B, T], shorter prompts padded on the left.
            attention_mask: [B, T], 0 for padding; by default there is none.
            max_new_tokens: at least 1.
            eos: tokens that end a row; by default those of `generation_config.json`. `()` for none.
            pad: fills rows that have ended; by default that of `generation_config.json`, or else the first `eos`.
            do_sample: draw from the distribution instead of taking the likeliest token.
            temperature: > 0; divides the logits when sampling.
            top_k: sample among this many likeliest tokens; 0 for all.
            top_p: sample among the likeliest tokens that together have this probability, in (0, 1].
            seed: of the draw; by default another at each call.
            on_token: called with the new tokens int64[B] after each step, as for streaming.
        """
        check_range("max_new_tokens", max_new_tokens, low=1, high=2**31)
        check_range("temperature", temperature, low=0.0, high=1e6, open_low=True)
        check_range("top_k", top_k, low=0, high=2**31)
        check_range("top_p", top_p, low=0.0, high=1.0, open_low=True)
        ends = self._ends(eos)
        filler = pad if pad is not None else self.generation_config.get("pad_token_id")
        filler = int(filler if filler is not None else ends[0] if len(ends) else 0)
        generator = torch.Generator()
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
        produced = [input_ids.to("cpu", torch.int64)]
        finished = torch.zeros(input_ids.shape[0], dtype=torch.bool)
        logits, state = self.prefill(produced[0], attention_mask)
        for count in range(max_new_tokens):
            last = logits[:, -1].float()
            chosen = _sample(last / temperature, top_k, top_p, generator) if do_sample else last.argmax(-1)
            token = torch.where(finished, filler, chosen)
            finished |= torch.isin(token, ends)
            produced.append(token[:, None])
            if on_token is not None:
                on_token(token)
            if bool(finished.all()) or count + 1 == max_new_tokens:
                break
            logits, state = self.step(token[:, None], state)
        return torch.cat(produced, dim=1)

    def _ends(self, eos: int | Sequence[int] | None) -> Tensor:
        if eos is None:
            eos = self.generation_config.get("eos_token_id")
        if eos is None:
            eos = ()
        return torch.tensor([eos] if isinstance(eos, int) else list(eos), dtype=torch.int64)

    def _read(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        if not path.is_file():
            return {}
        values = json.loads(path.read_text(encoding="utf-8"))
        return values if isinstance(values, dict) else {}


def _sample(logits: Tensor, top_k: int, top_p: float, generator: torch.Generator) -> Tensor:
    """One token int64[B] for each row of float[B, V]."""
    if top_k:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -np.inf)
    probabilities = logits.softmax(-1)
    if top_p < 1.0:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        # The likeliest token always stays: what comes before it has no probability.
        ordered[ordered.cumsum(-1) - ordered >= top_p] = 0.0
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]
