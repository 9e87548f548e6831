"""What the recurrent language models share: a state that goes in and comes out, chunks, the loss, and generation.

Letters: B sequences, T tokens of each, V vocabulary, E embedding width, W width of the model's outputs.

A child of `RecurrentModel` says how its state starts and how a chunk is run; a child of `RecurrentForCausalLM` has
that model under its `base_model_prefix`, and a `lm_head`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel
from transformers.utils.generic import ModelOutput, can_return_tuple

from .loss import causal_lm_loss, head_loss, next_tokens, number_of_targets
from .padding import real_tokens, repeat_last


@dataclass
class RecurrentModelOutput(ModelOutput):
    """What a recurrent model returns.

    Args:
        last_hidden_state: (B, T, W), outputs of the last layer.
        state: (B, …), what the layers carry after the last real token, of constant size, if `use_cache`.
        hidden_states: the embeddings and each layer's outputs, if `output_hidden_states`.
    """

    last_hidden_state: Tensor | None = None
    state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class RecurrentCausalLMOutput(ModelOutput):
    """What a recurrent language model returns.

    Args:
        loss: float64 scalar (float32 on mps), see `summed_loss`, if `labels` are given.
        logits: (B, T, V), scores of the next token; none with `labels` for more than `chunk_length` tokens, or where
            they are skipped.
        state: (B, …), what the layers carry after the last real token, of constant size, if `use_cache`.
        hidden_states: the embeddings and each layer's outputs, if `output_hidden_states`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class RecurrentModel(PreTrainedModel):
    """A model without head, run in chunks of `config.chunk_length` tokens, each from the state of the one before."""

    def initial_state(self, embeddings: Tensor) -> Tensor:
        """The state before the first token, (B, …), on the device of the embeddings (B, T, E)."""
        raise NotImplementedError

    def run(self, embeddings: Tensor, state: Tensor, real: Tensor | None) -> tuple[list[Tensor], Tensor]:
        """Hidden states of one chunk, (B, T, ·) each and the model's output last, and the state after it.

        Args:
            embeddings: (B, T, E).
            state: (B, …), as `initial_state` makes it; not modified.
            real: (B, T) booleans, False where a position is padding: it holds the state, and its outputs are not
                looked at; None if all are real.
        """
        raise NotImplementedError

    def chunks(
        self, tokens: Tensor, attention_mask: Tensor | None, state: Tensor | None, starts: Tensor | None
    ) -> Iterator[tuple[slice, list[Tensor], Tensor]]:
        """(positions, hidden states, state after them), chunk after chunk; `tokens` are ids or embeddings.

        A masked position's output is that of the real token before it in this call, from which a right-padded text is
        continued.
        """
        if attention_mask is not None and attention_mask.shape != tokens.shape[:2]:
            shapes = f"{tuple(attention_mask.shape)} for tokens {tuple(tokens.shape[:2])}"
            raise ValueError(f"`attention_mask` must have the shape of the tokens, got {shapes}; leave out the past.")
        length, last = self.config.chunk_length, None
        for start in range(0, tokens.shape[1], length):
            part = slice(start, start + length)
            embeddings = tokens[:, part]
            if embeddings.dim() == 2:
                embeddings = self.get_input_embeddings()(embeddings)
            state = self._start(state, starts, embeddings) if start == 0 or state is None else state
            real = None if attention_mask is None else real_tokens(attention_mask[:, part])
            hidden_states, state = self.run(embeddings, state, real)
            if real is not None:
                hidden_states[-1] = repeat_last(hidden_states[-1], last, real)
            last = hidden_states[-1][:, -1:]  # (B, 1, W)
            yield part, hidden_states, state

    def _start(self, state: Tensor | None, starts: Tensor | None, embeddings: Tensor) -> Tensor:
        if state is None:
            return self.initial_state(embeddings)
        initial = self.initial_state(embeddings)
        state = state.to(initial.dtype)  # that of another model, or of autocast, may be rounded
        if starts is None:
            return state
        first = starts.bool().view(-1, *[1] * (state.dim() - 1))  # (B, 1, …)
        return torch.where(first, initial, state)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        state: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        *,
        starts: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        outputs_to_keep: int = 0,
        **kwargs: Any,
    ) -> RecurrentModelOutput:
        """Outputs of the last layer, and the state after the last real token.

        Args:
            input_ids: (B, T), tokens that `state` has not seen; or `inputs_embeds`.
            attention_mask: (B, T), 0 where a position is padding: it holds the state. Left, right or in between.
            state: (B, …), as returned by an earlier call, not modified; that before any token by default.
            inputs_embeds: (B, T, E), in place of `input_ids`.
            starts: (B,), true for rows whose text begins here: they start anew, whatever `state` holds.
            use_cache: whether to return the state, `config.use_cache` by default.
            output_hidden_states: whether to return the embeddings and every layer's outputs.
            outputs_to_keep: return only the last k positions' outputs (0: all).
            kwargs: what callers in transformers pass to any model (`position_ids`, ...); without effect.
        """
        tokens = given(input_ids, inputs_embeds)
        first = max(0, tokens.shape[1] - outputs_to_keep) if outputs_to_keep else 0
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        parts = []  # of each chunk, the hidden states that are kept
        after = state
        for part, hidden_states, after in self.chunks(tokens, attention_mask, state, starts):  # noqa: B007
            layers = hidden_states if output_hidden_states else hidden_states[-1:]
            parts.append([layer[:, max(0, first - part.start) :] for layer in layers])
        kept = tuple(torch.cat(layer, dim=1) for layer in zip(*parts, strict=True))
        use_cache = self.config.use_cache if use_cache is None else use_cache
        return RecurrentModelOutput(
            last_hidden_state=kept[-1],
            state=after if use_cache else None,
            hidden_states=kept if output_hidden_states else None,
        )


class RecurrentForCausalLM(PreTrainedModel, GenerationMixin):
    """A recurrent model with a head: scores of the next token, their loss, and generation from a state."""

    _is_stateful = True

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        state: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        starts: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        skip_logits: bool = False,
        **kwargs: Any,
    ) -> RecurrentCausalLMOutput:
        """Scores of the next token at every position, the loss if `labels` are given, and the state.

        With `labels`, more than `config.chunk_length` tokens are scored chunk by chunk, and neither logits nor hidden
        states are returned: memory does not grow with the length, except for what autograd keeps.

        Args:
            labels: (B, T), usually `input_ids` with −100 where no prediction counts; shifted here, not by the caller.
            logits_to_keep: compute only the last k positions' scores (0: all), or those at a tensor of positions.
            num_items_in_batch: number of labels the summed loss is divided by, this batch's own by default.
            skip_logits: with `labels`, return no logits for any number of tokens, nor hold them where a kernel can.
            kwargs: all other arguments as in the model's forward pass.
        """
        tokens, model = given(input_ids, inputs_embeds), cast(RecurrentModel, self.base_model)
        if labels is not None and tokens.shape[1] > self.config.chunk_length:
            chunks = model.chunks(tokens, attention_mask, state, starts)
            mean, after = self._loss_by_chunks(chunks, labels, num_items_in_batch)
            use_cache = self.config.use_cache if use_cache is None else use_cache
            return RecurrentCausalLMOutput(loss=mean, state=after if use_cache else None)
        last = logits_to_keep if labels is None and isinstance(logits_to_keep, int) else 0
        outputs = model(
            input_ids,
            attention_mask,
            state,
            inputs_embeds,
            starts=starts,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            outputs_to_keep=last,
            return_dict=True,
        )
        hidden = outputs.last_hidden_state  # (B, T, W)
        if isinstance(logits_to_keep, Tensor):
            hidden = hidden[:, logits_to_keep]
        loss, logits = self._loss_and_logits(hidden, labels, num_items_in_batch, skip_logits)
        return RecurrentCausalLMOutput(
            loss=loss, logits=logits, state=outputs.state, hidden_states=outputs.hidden_states
        )

    def _loss_and_logits(
        self, hidden: Tensor, labels: Tensor | None, num_items_in_batch: Tensor | int | None, skip_logits: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        if labels is not None and skip_logits:
            targets = next_tokens(labels)
            return head_loss(self.lm_head, hidden, targets) / number_of_targets(targets, num_items_in_batch), None
        logits = self.lm_head(hidden)  # (B, T, V)
        loss = None if labels is None else causal_lm_loss(logits, labels, num_items_in_batch=num_items_in_batch)
        return loss, logits

    def _loss_by_chunks(
        self, chunks: Iterator[Any], labels: Tensor, num_items_in_batch: Tensor | int | None
    ) -> tuple[Tensor, Tensor | None]:
        total: Any = 0.0
        state = None
        for part, hidden_states, state in chunks:  # noqa: B007  # the last one is returned
            # a slice more, for the last position's target; all targets at once would be as long as the text
            targets = next_tokens(labels[:, part.start : part.stop + 1])[:, : hidden_states[-1].shape[1]]
            total = total + head_loss(self.lm_head, hidden_states[-1], targets)
        return total / number_of_targets(labels[:, 1:], num_items_in_batch), state

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def prepare_inputs_for_generation(  # type: ignore[override]  # as every model, with its own cache's name
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        state: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Arguments of the next forward pass: everything at first, then the one token that the state has not seen."""
        if not is_first_iteration and use_cache is not False:
            kwargs.pop("starts", None)  # rows that start anew do so once
        inputs = {"state": state, "use_cache": use_cache, **kwargs}
        if is_first_iteration and inputs_embeds is not None:
            return {"inputs_embeds": inputs_embeds, "attention_mask": attention_mask, **inputs}
        if is_first_iteration or state is None or use_cache is False:
            if attention_mask is not None:
                attention_mask = attention_mask[:, -input_ids.shape[1] :]  # a given state has its own past behind it
            return {"input_ids": input_ids, "attention_mask": attention_mask, **inputs}
        return {"input_ids": input_ids[:, -1:], **inputs}  # generated tokens are never padding

    def _beam_search(self, *args: Any, **kwargs: Any) -> Any:
        # before 5.13 beam search reorders no cache but `past_key_values`; goes when we require 5.13
        if Version(transformers.__version__) < Version("5.13"):
            kwargs["use_cache"] = False
        return super()._beam_search(*args, **kwargs)  # type: ignore[misc]  # its self is a protocol of all models

    @staticmethod
    def _reorder_cache(state: Tensor, beam_idx: Tensor) -> Tensor:
        return state.index_select(0, beam_idx.to(state.device))


def given(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    """Token ids (B, T) or embeddings (B, T, E), whichever is there."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("One of `input_ids` and `inputs_embeds` is needed, got both or neither; pass one.")
    tokens = cast(Tensor, input_ids if inputs_embeds is None else inputs_embeds)
    if not tokens.shape[1]:
        raise ValueError(f"At least one token is needed, got {tuple(tokens.shape)}; begin with a start token.")
    return tokens
