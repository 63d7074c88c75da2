"""What a Skink model remembers between steps, as a transformers `Cache`.

The state tensors are those of the step graph, one list for all layers: `append` tensors hold every token, `ring`
tensors the last few. The batch is axis 0 of all of them. Each lies in a buffer with room to grow, so that a step writes
its own tokens and copies no others.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import Cache

from skink.errors import ModelError
from skink.graph.program import StateInput

# Buffers grow by half, to a multiple of this many tokens.
_BLOCK = 64


class StateBuffer:
    """One state tensor, and room behind it.

    Args:
        layout: the state input that it is for.
        dtype: of the tensor.
        device: of the tensor.
    """

    def __init__(self, layout: StateInput, *, dtype: torch.dtype, device: torch.device) -> None:
        self.layout = layout
        # Symbolic dims are the batch first, then lengths.
        dims = enumerate(layout.shape)
        shape = [1 if axis == 0 else 0 if isinstance(dim, str) else dim for axis, dim in dims]
        self._storage = torch.zeros(shape, dtype=dtype, device=device)
        # Tokens written, of which a ring's step sees the last `limit`.
        self._end = self._storage.shape[layout.axis]
        # Tokens that have to stay for `crop`, beyond what the next step sees.
        self.spare = 0

    @property
    def batch(self) -> int:
        """Sequences."""
        return self._storage.shape[0]

    @property
    def tensor(self) -> Tensor:
        """What the next step sees of the past: a view, [B, ..., tokens, ...]."""
        visible = self._visible(self._end)
        return self._storage.narrow(self.layout.axis, self._end - visible, visible)

    def replace(self, tensor: Tensor) -> None:
        """Hold `tensor` instead, itself and no copy."""
        self._storage, self._end = tensor, tensor.shape[self.layout.axis]

    def extend(self, new: Tensor) -> Tensor:
        """Write new tokens behind the past. Returns a view of both."""
        axis, tokens = self.layout.axis, new.shape[self.layout.axis]
        visible = self._visible(self._end)
        # Not to be written: what was made in inference mode outside of it, and what gradients are to flow through.
        locked = self._storage.requires_grad or (self._storage.is_inference() and not torch.is_inference_mode_enabled())
        if self._end + tokens > self._storage.shape[axis] or locked:
            self._move(tokens)
        self._storage.narrow(axis, self._end, tokens).copy_(new)
        self._end += tokens
        return self._storage.narrow(axis, self._end - visible - tokens, visible + tokens)

    def remove(self, tokens: int, seen: int) -> None:
        """Forget the last tokens.

        Args:
            tokens: how many.
            seen: how many there were, over all steps.

        Raises:
            ModelError: MODEL-005 where a ring has forgotten what would become its beginning.
        """
        end, left = self._end - tokens, seen - tokens
        if min(left, self.layout.limit if self.layout.growth == "ring" else left) > max(end, 0):
            raise ModelError(
                "MODEL-005",
                f"{tokens} tokens cannot be taken back from {self.layout.name}.",
                why=f"it keeps {self.layout.limit} tokens of {seen}, and what was before them is gone.",
                fix="take back no more than the last step added, or call activate_past_recording() before the first.",
            )
        self._end = end

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change the batch."""
        axis = self.layout.axis
        room = min(_rounded(self._end + 1), self._storage.shape[axis])
        self._storage = change(self._storage.narrow(axis, 0, room))

    def _visible(self, tokens: int) -> int:
        return min(tokens, self.layout.limit) if self.layout.growth == "ring" else tokens

    def _move(self, more: int) -> None:
        """Into a larger buffer, or to the front of one as large, with what is still needed."""
        axis = self.layout.axis
        kept = min(self._end, self._visible(self._end) + self.spare)
        shape = list(self._storage.shape)
        shape[axis] = _rounded((kept + more) * 3 // 2)
        storage = self._storage.new_empty(shape)
        storage.narrow(axis, 0, kept).copy_(self._storage.narrow(axis, self._end - kept, kept))
        self._storage, self._end = storage, kept


class SkinkCache(Cache):
    """State for one batch of sequences, whose number the first step decides.

    Args:
        layout: the step graph's state inputs.
        dtype: of the state tensors.
        device: of the state tensors.
    """

    def __init__(self, layout: Sequence[StateInput], *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(layers=[])
        self.buffers = [StateBuffer(state, dtype=dtype, device=device) for state in layout]
        # Tokens read so far, padding included.
        self.seen = 0
        # Whether some sequence has padding. Found out when the prompt is read; later steps need not look.
        self.padded = False
        self._recording = False
        self._since_crop = 0

    @property
    def tensors(self) -> list[Tensor]:
        """What the next step sees of the past, in the order of the step graph's state inputs."""
        return [buffer.tensor for buffer in self.buffers]

    def fit(self, batch: int, tokens: int) -> None:
        """Get ready for a step of `tokens` tokens in `batch` sequences."""
        if self.seen == 0 and self.batch_size != batch:
            for buffer in self.buffers:
                buffer.replace(buffer.tensor.new_zeros((batch, *buffer.tensor.shape[1:])))
        if self._recording:
            self._since_crop += tokens
            for buffer in self.buffers:
                buffer.spare = self._since_crop

    def replace(self, tensors: Sequence[Tensor]) -> None:
        """Take what the step graph returned as its new state."""
        for buffer, tensor in zip(self.buffers, tensors, strict=True):
            buffer.replace(tensor)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read so far, padding included."""
        return self.seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: there is no most."""
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """(length, offset) of the padding mask for `query_length` more tokens: it always covers all of them."""
        return self.seen + query_length, 0

    def reset(self) -> None:
        """Forget everything; batch, dtype and device stay."""
        for buffer in self.buffers:
            buffer.replace(buffer.tensor.narrow(buffer.layout.axis, 0, 0))
        self.seen, self.padded, self._since_crop = 0, False, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence i becomes what sequence `beam_idx[i]` was: int64[B]."""
        self._map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences `indices`: int64[B'], or bool[B]."""
        self._map(lambda tensor: tensor[indices.to(tensor.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence `repeats` times, next to each other."""
        self._map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def activate_past_recording(self) -> None:
        """From now on rings keep what `crop` needs to take back all tokens since the last `crop`.

        Otherwise they keep enough to take back those of the last step.
        """
        self._recording = True

    def crop(self, tokens_to_remove: int) -> None:
        """Take tokens back: the last `-tokens_to_remove` of them; a positive number is the length to keep.

        Raises:
            ModelError: MODEL-005 where a ring has forgotten what would become its beginning.
        """
        # Assisted generation may give a tensor.
        count = int(tokens_to_remove)
        remove = min(-count, self.seen) if count <= 0 else max(self.seen - count, 0)
        for buffer in self.buffers if remove else ():
            buffer.remove(remove, self.seen)
        self.seen -= remove
        self._since_crop = 0

    @property
    def batch_size(self) -> int:
        """Sequences."""
        return self.buffers[0].batch if self.buffers else 1

    @property
    def is_compileable(self) -> bool:
        """False: its tensors grow."""
        return False

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` never fails."""
        return all(buffer.layout.growth == "append" for buffer in self.buffers)

    @property
    def is_initialized(self) -> bool:
        """True: its tensors are there from the beginning."""
        return True

    @property
    def is_sliding(self) -> list[bool]:
        """By layer, whether it keeps the last tokens only."""
        layers = {buffer.layout.layer: buffer.layout.growth == "ring" for buffer in self.buffers}
        return list(layers.values())

    def __len__(self) -> int:
        return len(self.is_sliding)

    def __repr__(self) -> str:
        return f"SkinkCache({len(self)} layers, {self.batch_size} sequences, {self.seen} tokens)"

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        for buffer in self.buffers:
            buffer.map(change)


def _rounded(tokens: int) -> int:
    return -(-tokens // _BLOCK) * _BLOCK
