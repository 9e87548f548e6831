"""What the recurrent language models share: layout of heads, masks, outputs, the loss, and generation from a state.

Letters: B sequences, T tokens of each, V vocabulary, H hidden units, N heads of D = H/N units, G gates, L layers,
S vectors of H numbers that a layer carries from token to token (its slots).
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import GenerationMixin
from transformers.utils.generic import ModelOutput


@dataclass
class RecurrentModelOutput(ModelOutput):
    """What a recurrent model returns.

    Args:
        last_hidden_state: (B, T, H), outputs of the last layer; a masked position repeats the output before it.
        state: (B, L, S, H), what the layers carry after the last real token, if `use_cache`.
        hidden_states: the embeddings and each layer's outputs, if `output_hidden_states`.
    """

    last_hidden_state: Tensor | None = None
    state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class RecurrentCausalLMOutput(ModelOutput):
    """What a recurrent language model returns.

    Args:
        loss: float64 scalar (float32 on mps), see `causal_lm_loss`, if `labels` are given.
        logits: (B, T, V), scores of the next token.
        state: (B, L, S, H), what the layers carry after the last real token, if `use_cache`.
        hidden_states: the embeddings and each layer's outputs, if `output_hidden_states`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


def causal_lm_loss(
    logits: Tensor, labels: Tensor, *, num_items_in_batch: Tensor | int | None = None, ignore_index: int = -100
) -> Tensor:
    """Mean negative log-probability of the next token, as a float64 scalar (float32 on mps, which has no float64).

        L = 1/n Σ_{b,t} −log softmax(logits[b, t])[labels[b, t+1]]

    Token losses are computed in float32 (float64 for float64 logits) and summed in float64, and the result stays
    float64: a zero-order step differences losses, and a float32 loss near 4 moves in steps of 5e-7.

    Args:
        logits: (B, T, V), of any floating dtype.
        labels: (B, T), the tokens themselves: the shift by one is made here. `ignore_index` leaves a label out.
        num_items_in_batch: n, the labels of the whole optimizer step; without it n counts this batch's own labels.
        ignore_index: label of positions without a target.
    """
    # the labels are shifted and not the logits, whose slice would be a copy B·V times as large
    targets = F.pad(labels, (0, 1), value=ignore_index)[:, 1:].to(logits.device)  # (B, T)
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)  # (B·T, V)
    losses = F.cross_entropy(scores, targets.flatten(), ignore_index=ignore_index, reduction="none")  # (B·T)
    total = losses.sum(dtype=torch.float32 if losses.device.type == "mps" else torch.float64)
    if num_items_in_batch is None:
        return total / (targets != ignore_index).sum()
    return total / num_items_in_batch


def real_tokens(attention_mask: Tensor | None, embeddings: Tensor) -> Tensor | None:
    """Where tokens are real, (B, T) booleans, or None if all are: the one device synchronisation of a forward pass."""
    if attention_mask is None:
        return None
    if attention_mask.shape != embeddings.shape[:2]:
        shapes = f"{tuple(attention_mask.shape)} for tokens {tuple(embeddings.shape[:2])}"
        raise ValueError(f"`attention_mask` must have the shape of the tokens, got {shapes}; leave out the past.")
    real = attention_mask.bool()
    return None if real.all() else real


def split_heads(inputs: Tensor, gates: int, heads: int) -> Tensor:
    """(B, T, G·H) to (T, N, B, G·D): one contiguous block of pre-activations a time step."""
    return inputs.unflatten(-1, (gates, heads, -1)).permute(1, 3, 0, 2, 4).flatten(-2)


def merge_heads(outputs: list[Tensor]) -> Tensor:
    """T tensors (N, B, D) to (B, T, H)."""
    return torch.stack(outputs).permute(2, 0, 1, 3).flatten(-2)


def recurrent_blocks(recurrent_weight: Tensor) -> Tensor:
    """(G, N, D, D) [gate, head, out, in] to (N, D, G·D): all gates of a step in one batched product h @ blocks."""
    return recurrent_weight.permute(1, 3, 0, 2).flatten(-2)


class RecurrentGenerationMixin(GenerationMixin):
    """`generate()` for models whose forward pass takes and returns a `state` with the batch as first dimension."""

    _is_stateful = True

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
