"""A program as a Hugging Face encoder: one call, all tokens at once, and nothing to remember between calls."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    MaskedLMOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils.generic import ModelOutput

from skink.errors import ModelError
from skink.export.huggingface.base import SkinkPreTrainedModel
from skink.export.huggingface.functions import Function, Variant, make

# Asked of any Hugging Face encoder, and not to be had of a graph.
_REFUSED = {
    "inputs_embeds": "the graph begins at token ids",
    "position_ids": "the graph counts positions itself",
    "output_attentions": "attention weights are never formed",
    "output_hidden_states": "the graph returns the last layer's results only",
    "past_key_values": "an encoder sees all tokens at once, and carries nothing from call to call",
}


class SkinkEncoder(SkinkPreTrainedModel):
    """What encoders with and without a head share; see `SkinkPreTrainedModel` for how one is made."""

    known_inputs: ClassVar[tuple[str, ...]] = ("input_ids", "attention_mask", "token_type_ids")
    output_class: ClassVar[type[ModelOutput]]

    def get_output_embeddings(self) -> nn.Module | None:
        """None: hidden states and scores of classes are not of the vocabulary."""
        return None

    def results(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        others: Mapping[str, Any],
    ) -> dict[str, Tensor]:
        """The graph's results by name.

        Args:
            input_ids: int64[B, T].
            attention_mask: int or bool[B, T], 0 marks padding; by default there is none.
            token_type_ids: int64[B, T], which of two texts each token is of; by default the first.
            others: what else the caller gave; what a graph cannot take is refused.

        Raises:
            ModelError: MODEL-005.
        """
        for name, reason in _REFUSED.items():
            if others.get(name) is not None and others[name] is not False:
                raise ModelError(
                    "MODEL-005", f"{name} is not supported: {reason}.", fix=f"leave {name} out, or ask the source."
                )
        if input_ids is None:
            raise ModelError("MODEL-005", "input_ids is missing.", fix="give input_ids.")
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise ModelError(
                "MODEL-005",
                f"attention_mask has the shape {list(attention_mask.shape)}, and input_ids {list(input_ids.shape)}.",
                fix="give a mask of two dims, 1 for tokens and 0 for padding.",
            )
        compiling = torch.compiler.is_compiling()
        padded = attention_mask is not None and (compiling or not bool(attention_mask.all()))
        taken = "token_type_ids" in self._functions.inputs
        # Tokenizers of some families give them to models that know no kinds of tokens: zeros say nothing.
        if token_type_ids is not None and not taken and not compiling and bool(token_type_ids.any()):
            raise ModelError(
                "MODEL-005",
                "token_type_ids tell two texts apart, and the graph has no such input.",
                fix="leave token_type_ids out.",
            )
        given = {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(torch.int64),
            "token_type_ids": torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids,
        }
        function = self._function(padded=padded)
        found = function(self, *(given[name] for name in self._functions.inputs))
        return dict(zip(self._functions.program.outputs, found))

    def _function(self, *, padded: bool) -> Function:
        functions, training = self._functions, torch.is_grad_enabled()
        recompute = self.recomputes
        variant = Variant(False, padded, False, training, False, self.dtype, self.device.type, recompute)
        if torch.compiler.is_compiling():
            make(functions, False, padded, False, training, False, self.dtype, variant.device, recompute)
            return functions.bound[variant]
        return functions.get(variant)

    def _output(self, values: Mapping[str, Any], return_dict: bool | None) -> Any:
        output = self.output_class(**values)
        return output if return_dict is None or return_dict else output.to_tuple()


class SkinkModel(SkinkEncoder):
    """An encoder without a head: hidden states of every token."""

    outputs: ClassVar[tuple[str, ...]] = ("last_hidden_state",)
    output_class: ClassVar[type[ModelOutput]] = BaseModelOutputWithPooling

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling | tuple[Tensor, ...]:
        """Hidden states of the last layer; inputs and errors as of `results`.

        Returns:
            `last_hidden_state` [B, T, E], and `pooler_output` [B, E] where the source has it; a tuple of these with
            return_dict=False.
        """
        values = self.results(input_ids, attention_mask, token_type_ids, kwargs)
        output: BaseModelOutputWithPooling | tuple[Tensor, ...] = self._output(values, return_dict)
        return output


class _WithLogits(SkinkEncoder):
    """An encoder whose head gives `logits`."""

    outputs: ClassVar[tuple[str, ...]] = ("logits",)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Scores; inputs and errors as of `results`.

        Args:
            input_ids: int64[B, T].
            attention_mask: int or bool[B, T], 0 marks padding.
            token_type_ids: int64[B, T].
            labels: as the source's head takes them; then `loss` is given too.
            return_dict: a ModelOutput (default) or a tuple.
            kwargs: refused where a graph cannot take them.

        Returns:
            `logits`: [B, T, V] for masked words, [B, T, classes] for tokens, [B, classes] for texts; and `loss`.
        """
        values: dict[str, Any] = self.results(input_ids, attention_mask, token_type_ids, kwargs)
        if labels is not None:
            values["loss"] = self._loss(values["logits"], labels)
        return self._output(values, return_dict)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        loss: Tensor = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return loss


class SkinkForMaskedLM(_WithLogits):
    """An encoder that fills in masked words."""

    output_class: ClassVar[type[ModelOutput]] = MaskedLMOutput

    def get_output_embeddings(self) -> nn.Module | None:
        """The linear layer that gives the logits; None where something else does."""
        return self.get_submodule(self._head) if self._head else None

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        loss: Tensor = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1])
        return loss


class SkinkForSequenceClassification(_WithLogits):
    """An encoder that tells kinds of texts apart."""

    output_class: ClassVar[type[ModelOutput]] = SequenceClassifierOutput


class SkinkForTokenClassification(_WithLogits):
    """An encoder that tells kinds of tokens apart."""

    output_class: ClassVar[type[ModelOutput]] = TokenClassifierOutput

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        loss: Tensor = self.loss_function(logits=logits, labels=labels, config=self.config)
        return loss


class SkinkForQuestionAnswering(SkinkEncoder):
    """An encoder that finds where in a text an answer begins and ends."""

    outputs: ClassVar[tuple[str, ...]] = ("start_logits", "end_logits")
    output_class: ClassVar[type[ModelOutput]] = QuestionAnsweringModelOutput

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> QuestionAnsweringModelOutput | tuple[Tensor, ...]:
        """Scores of each token as the answer's first and last; inputs and errors as of `results`.

        Args:
            input_ids: int64[B, T].
            attention_mask: int or bool[B, T], 0 marks padding.
            token_type_ids: int64[B, T].
            start_positions: int64[B], of the right answers; with `end_positions`, `loss` is given too.
            end_positions: int64[B].
            return_dict: a ModelOutput (default) or a tuple.
            kwargs: refused where a graph cannot take them.

        Returns:
            `start_logits` and `end_logits` [B, T], and `loss`.
        """
        values: dict[str, Any] = self.results(input_ids, attention_mask, token_type_ids, kwargs)
        if start_positions is not None and end_positions is not None:
            values["loss"] = self.loss_function(
                values["start_logits"], values["end_logits"], start_positions, end_positions
            )
        output: QuestionAnsweringModelOutput | tuple[Tensor, ...] = self._output(values, return_dict)
        return output
