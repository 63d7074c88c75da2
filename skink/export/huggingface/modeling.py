"""A program as a Hugging Face model: it trains, takes adapters and generates as any decoder does."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from skink.errors import ModelError
from skink.export.huggingface.base import SkinkPreTrainedModel
from skink.export.huggingface.cache import SkinkCache
from skink.export.huggingface.functions import Function, Variant, make

# Asked of any Hugging Face decoder, and not to be had of a graph.
_REFUSED = {
    "inputs_embeds": "the graph begins at token ids",
    "output_attentions": "attention weights are never formed",
    "output_hidden_states": "the graph returns logits only",
}


class SkinkForCausalLM(SkinkPreTrainedModel, GenerationMixin):
    """A causal language model that runs a program's graph; see `SkinkPreTrainedModel` for how it is made."""

    outputs: ClassVar[tuple[str, ...]] = ("logits",)
    _is_stateful: ClassVar[bool] = False  # type: ignore[misc]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: SkinkCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits of the next token after each of the input's.

        Args:
            input_ids: int64[B, T]; with a cache, the new tokens only.
            attention_mask: int or bool[B, M], 0 marks padding; with a cache it covers the tokens in it, too.
            position_ids: int64[B or 1, T]; by default counted over what is not padding.
            past_key_values: from an earlier call or `new_cache`; it is changed in place.
            labels: int64[B, T], -100 where nothing is to be learned; then `loss` is given too.
            use_cache: hand back a cache. By default the configuration's `use_cache`, and not with labels, in training,
                or under torch.compile.
            logits_to_keep: the last so many tokens' logits, 0 for all; or the indices of tokens.
            return_dict: a ModelOutput (default) or a tuple.
            kwargs: passed to the loss (`num_items_in_batch`); what other decoders take and a graph cannot is refused.

        Returns:
            `logits` [B, T or kept, V] in the model's dtype, `past_key_values`, and `loss` with labels.

        Raises:
            ModelError: MODEL-005, something that a graph cannot give, or a mask that does not fit.
        """
        _refuse(kwargs)
        if input_ids is None:
            raise ModelError("MODEL-005", "input_ids is missing.", fix="give input_ids.")
        batch, tokens = input_ids.shape
        cache = self._cache(past_key_values, use_cache, quiet=labels is not None)
        if cache is not None:
            cache.fit(batch, tokens)
        past = 0 if cache is None else cache.seen
        padded = _is_padded(attention_mask, cache, past + tokens)
        mask = None
        if padded and attention_mask is not None:
            mask = attention_mask.to(torch.int64).expand(batch, -1)
        elif cache is not None and self._functions.counts:
            mask = input_ids.new_ones((batch, past + tokens))
        if position_ids is None:
            position_ids = _positions(mask, input_ids, past)
        elif position_ids.shape[0] != batch:
            position_ids = position_ids.expand(batch, -1)
        # Two branches, and not an expression: torch.compile must see a constant.
        if isinstance(logits_to_keep, int) and logits_to_keep == 1 and tokens > 1:  # noqa: SIM108
            last_only = True
        else:
            last_only = False
        function, in_place = self._function(step=cache is not None, padded=padded, last_only=last_only)
        given = {"input_ids": input_ids, "attention_mask": mask, "position_ids": position_ids}
        inputs = [given[name] for name in self._functions.inputs]
        if cache is None:
            logits = function(self, *inputs)[0]
        elif in_place:
            logits = function(self, *inputs, *cache.buffers)[0]
            cache.seen += tokens
        else:
            logits, *state = function(self, *inputs, *cache.tensors)
            cache.replace(state)
            cache.seen += tokens
        if isinstance(logits_to_keep, Tensor):
            logits = logits[:, logits_to_keep]
        elif logits_to_keep and not last_only:
            logits = logits[:, -logits_to_keep:]
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)
        return output if return_dict is None or return_dict else output.to_tuple()

    def new_cache(self) -> SkinkCache:
        """An empty cache, for as many sequences as the first call brings."""
        dtype = self.dtype
        return SkinkCache(self._functions.state(dtype), dtype=dtype, device=self.device)

    def resize_token_embeddings(  # type: ignore[override]
        self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any
    ) -> nn.Module:
        """As in transformers.

        Raises:
            ModelError: MODEL-005 where the logits are not what one linear layer gives.
        """
        if new_num_tokens is not None and self.get_output_embeddings() is None:
            raise ModelError(
                "MODEL-005",
                "the vocabulary cannot be resized: no one linear layer gives the logits.",
                fix="resize the source model's, then compress it.",
            )
        resized: nn.Module = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        return resized

    def _cache(self, given: object, use_cache: bool | None, *, quiet: bool) -> SkinkCache | None:
        """The cache to step with; None for a call without one."""
        if given is not None and not isinstance(given, SkinkCache):
            raise ModelError(
                "MODEL-005",
                f"past_key_values is a {type(given).__name__}, which cannot hold this model's state.",
                fix="leave it out, or make it with model.new_cache().",
            )
        if use_cache is None:
            use_cache = self.config.use_cache and not (quiet or self.training or torch.compiler.is_compiling())
        return given if given is not None or not use_cache else self.new_cache()

    def _function(self, *, step: bool, padded: bool, last_only: bool) -> tuple[Function, bool]:
        """The function for a call, and whether it writes the state into the cache's buffers."""
        functions, dtype, compiling = self._functions, self.dtype, torch.compiler.is_compiling()
        training = torch.is_grad_enabled()
        # What is written into a buffer has no gradient, and torch.compile wants pure functions.
        in_place = step and not training and not compiling and functions.grows(dtype)
        recompute = self.recomputes and not step
        variant = Variant(step, padded, last_only, training, in_place, dtype, self.device.type, recompute)
        if compiling:
            make(functions, step, padded, last_only, training, in_place, dtype, variant.device, recompute)
            return functions.bound[variant], False
        return functions.get(variant), in_place

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Puts a `SkinkCache` where transformers would put one of its own."""
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic"):
            raise ModelError(
                "MODEL-005",
                f"cache_implementation={kind!r} cannot hold this model's state.",
                why="a Skink model keeps the state that its own graph asks for, layer by layer.",
                fix="leave cache_implementation out.",
            )
        given = model_kwargs.get("past_key_values")
        if given is not None:
            # What transformers calls a cache that outlives the call.
            given._is_user_defined = True
        elif generation_config.use_cache is not False:
            cache = self.new_cache()
            if getattr(generation_config, "is_assistant", False):
                cache.activate_past_recording()
            model_kwargs["past_key_values"] = cache


def _refuse(kwargs: Mapping[str, Any]) -> None:
    for name, reason in _REFUSED.items():
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise ModelError(
                "MODEL-005", f"{name} is not supported: {reason}.", fix=f"leave {name} out, or ask the source model."
            )


def _is_padded(mask: Tensor | None, cache: SkinkCache | None, length: int) -> bool:
    """Whether padding must be looked at. Asking a GPU stalls it, so single steps rely on what the prompt said."""
    if mask is None:
        if cache is not None and cache.padded:
            raise ModelError(
                "MODEL-005",
                "the tokens in the cache were read with padding, and this step comes without attention_mask.",
                fix=f"give the mask of all {length} tokens at every step.",
            )
        return False
    if mask.dim() != 2 or mask.shape[1] != length:
        raise ModelError(
            "MODEL-005",
            f"attention_mask has the shape {list(mask.shape)}, where [batch, {length}] was expected.",
            why="it covers every token, those in the cache and the new ones." if cache is not None else "",
            fix="give a mask of two dims, 1 for tokens and 0 for padding.",
        )
    if torch.compiler.is_compiling():
        return True
    if cache is None:
        return not bool(mask.all())
    if not cache.padded and (length - cache.seen > 1 or mask.device.type == "cpu"):
        cache.padded = not bool(mask.all())
    return cache.padded


def _positions(mask: Tensor | None, input_ids: Tensor, past: int) -> Tensor:
    """Positions int64[B, T] of the new tokens, counted over what is not padding."""
    batch, tokens = input_ids.shape
    if mask is None:
        return torch.arange(past, past + tokens, device=input_ids.device).expand(batch, -1)
    counted = mask.cumsum(-1) - 1
    return counted.masked_fill(mask == 0, 0)[:, -tokens:]
