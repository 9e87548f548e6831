"""Recurrent language models: embedding, stacked LSTM or GRU layers, linear head.

    e = Emb[x]    h = layer_L(… layer_1(e))    logits = h W_outᵀ + b_out

Letters: B sequences, T tokens of each, V vocabulary, E embedding width, H hidden units, L layers, S slots of a layer's
state (LSTM 2: h and c; GRU 1: h). The whole model's state is one tensor (B, L, S, H), whatever the context length.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import can_return_tuple

from .configuration_rnn import RNNConfig
from .gru import GRU
from .lstm import LSTM
from .recurrent import (
    RecurrentCausalLMOutput,
    RecurrentGenerationMixin,
    RecurrentModelOutput,
    causal_lm_loss,
    real_tokens,
)


CELLS: dict[str, type[LSTM] | type[GRU]] = {"lstm": LSTM, "gru": GRU}


class RNNPreTrainedModel(PreTrainedModel):
    """Initial weights, loading and saving."""

    config_class = RNNConfig
    base_model_prefix = "model"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Layers and head uniform in ±1/√H; embedding normal, of unit variance, or 1/H where it is the head too."""
        bound = self.config.hidden_size**-0.5
        if isinstance(module, LSTM | GRU):
            module.reset_parameters()
        elif isinstance(module, nn.Linear):
            nn.init.uniform_(module.weight, -bound, bound)
            nn.init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=bound if self.config.tie_word_embeddings else 1.0)


class RNNModel(RNNPreTrainedModel):
    """Token ids to the outputs of the last recurrent layer."""

    def __init__(self, config: RNNConfig):
        super().__init__(config)
        cell = CELLS[config.cell_type]
        widths = [config.embedding_size] + [config.hidden_size] * (config.num_layers - 1)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.embedding_size)
        self.layers = nn.ModuleList(cell(width, config.hidden_size, config.num_heads) for width in widths)
        self.post_init()

    def embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """The embeddings (B, T, E), looked up or given."""
        if inputs_embeds is None and input_ids is not None:
            return self.embed_tokens(input_ids)
        if inputs_embeds is not None and input_ids is None:
            return inputs_embeds
        raise ValueError("One of `input_ids` and `inputs_embeds` is needed, got both or neither; pass one.")

    def initial_state(self, embeddings: Tensor) -> Tensor:
        """Zeros (B, L, S, H), of the embeddings' dtype and device: the state before the first token."""
        slots = CELLS[self.config.cell_type].slots
        return embeddings.new_zeros(len(embeddings), self.config.num_layers, slots, self.config.hidden_size)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        state: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        *,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> RecurrentModelOutput:
        """Outputs of the last layer, and the state after the last real token.

        Args:
            input_ids: (B, T), tokens that `state` has not seen; or `inputs_embeds`.
            attention_mask: (B, T), 0 where a position is padding: it holds the state. Left, right or in between.
            state: (B, L, S, H), as returned by an earlier call, not modified; zeros by default.
            inputs_embeds: (B, T, E), in place of `input_ids`.
            use_cache: whether to return the state, `config.use_cache` by default.
            output_hidden_states: whether to return the embeddings and every layer's outputs.
            kwargs: what callers in transformers pass to any model (`position_ids`, ...); without effect.
        """
        hidden = self.embed(input_ids, inputs_embeds)  # (B, T, E)
        real = real_tokens(attention_mask, hidden)
        state = self.initial_state(hidden) if state is None else state
        hidden_states, states = [hidden], []
        for layer, before in zip(self.layers, state.unbind(1), strict=True):
            hidden, after = layer(hidden, before, real)  # (B, T, H), (B, S, H)
            hidden_states.append(hidden)
            states.append(after)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        return RecurrentModelOutput(
            last_hidden_state=hidden,
            state=torch.stack(states, dim=1) if use_cache else None,
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
        )


class RNNForCausalLM(RecurrentGenerationMixin, RNNPreTrainedModel):
    """Token ids to scores of the next token."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: RNNConfig):
        super().__init__(config)
        self.model = RNNModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        state: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> RecurrentCausalLMOutput:
        """Scores of the next token at every position, the loss if `labels` are given, and the state.

        Args:
            labels: (B, T), usually `input_ids` with −100 where no prediction counts; shifted here, not by the caller.
            logits_to_keep: compute only the last k positions' scores (0: all), or those at a tensor of positions.
            num_items_in_batch: number of labels the summed loss is divided by, this batch's own by default.
            kwargs: all other arguments as in `RNNModel.forward`.
        """
        asked = {"use_cache": use_cache, "output_hidden_states": output_hidden_states, "return_dict": True}
        outputs = self.model(input_ids, attention_mask, state, inputs_embeds, **asked)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])  # (B, T, V)
        loss = None if labels is None else causal_lm_loss(logits, labels, num_items_in_batch=num_items_in_batch)
        return RecurrentCausalLMOutput(
            loss=loss, logits=logits, state=outputs.state, hidden_states=outputs.hidden_states
        )


__all__ = ["RNNForCausalLM", "RNNModel", "RNNPreTrainedModel"]
