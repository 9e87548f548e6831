"""Recurrent language models: embedding, stacked recurrent layers, linear head.

    e = Emb[x]    h = layer_L(… layer_1(e))    logits = h W_outᵀ + b_out

Letters: B sequences, T tokens of each, V vocabulary, E embedding width, H hidden units, L layers, S slots of a layer's
state (LSTM 2: h and c; GRU and Elman 1: h; sLSTM 4: h, c, n and m). The whole model's state is one tensor
(B, L, S, H), whatever the context length; with `pooling`, whose state has P numbers, it is flat, (B, L·S·H + P).
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .configuration_rnn import RNNConfig
from .elman import Elman
from .gru import GRU
from .initialization_rnn import INITIALIZATIONS
from .lstm import LSTM
from .pooling import AttentionPooling
from .recurrent import RecurrentForCausalLM, RecurrentModel
from .recurrent_layer import RecurrentLayer
from .residual import EPSILON, Residual
from .slstm import SLSTM


# isort: split
# not used here: transformers 5.6 loads only the code that this file itself names; goes when 5.19 is required
from .backends import kernel  # noqa: F401
from .heads import merge_heads  # noqa: F401
from .loss import summed_loss  # noqa: F401
from .padding import real_tokens  # noqa: F401
from .recurrent_product import recurrent_product  # noqa: F401


CELLS: dict[str, type[RecurrentLayer]] = {"lstm": LSTM, "gru": GRU, "slstm": SLSTM, "elman": Elman}


class RNNPreTrainedModel(PreTrainedModel):
    """Initial weights, loading and saving."""

    config: RNNConfig
    config_class = RNNConfig
    base_model_prefix = "model"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """By the configuration's `initialization`; norms one, scores of a pooling and a learned initial state zero."""
        INITIALIZATIONS[self.config.initialization](module, self.config)
        if isinstance(module, nn.RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, AttentionPooling):
            module.reset_parameters()
        elif isinstance(module, RNNModel) and module.learned_state is not None:
            nn.init.zeros_(module.learned_state)


class RNNModel(RecurrentModel, RNNPreTrainedModel):
    """Token ids to what the head reads: the outputs of the last recurrent layer, or the pooled ones of all."""

    def __init__(self, config: RNNConfig):
        super().__init__(config)
        self.cell = CELLS[config.cell_type]
        self.embed_tokens = nn.Embedding(config.vocab_size, config.embedding_size)
        self.layers = nn.ModuleList(self._layer(index) for index in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=EPSILON) if config.residual else None
        self.pooling = None
        if config.pooling == "attention":
            self.pooling = AttentionPooling(config.output_size, config.pooling_decay)
        self.learned_state = None
        if config.learn_initial_state:
            shape = config.num_layers, self.cell.learnable_slots, config.hidden_size
            self.learned_state = nn.Parameter(torch.zeros(shape))
        self.post_init()

    def _layer(self, index: int) -> nn.Module:
        config = self.config
        width = config.embedding_size if index == 0 else config.hidden_size
        layer = self.cell(width, config.hidden_size, config.num_heads)
        return Residual(layer, config.hidden_size, config.intermediate_size) if config.residual else layer

    def initial_state(self, embeddings: Tensor) -> Tensor:
        """The layers' state before the first token, then the pooling's, of the embeddings' dtype or a wider one."""
        state = self._initial_layers(embeddings)
        if self.pooling is None:
            return state
        return torch.cat([state.flatten(1), self.pooling.initial_state(embeddings)], dim=1)

    def _initial_layers(self, embeddings: Tensor) -> Tensor:
        """(B, L, S, H), learned, or zeros."""
        batch, config = len(embeddings), self.config
        if self.learned_state is None:
            shape = batch, config.num_layers, self.cell.slots, config.hidden_size
            return embeddings.new_zeros(shape, dtype=self._state_dtype(embeddings))
        learned = self.learned_state.to(self._state_dtype(embeddings))  # (L, learnable slots, H)
        others = [torch.full_like(learned[:, :1], value) for value in self.cell.other_slots]
        return torch.cat([learned, *others], dim=1).expand(batch, -1, -1, -1)

    def _state_dtype(self, embeddings: Tensor) -> torch.dtype:
        return torch.promote_types(embeddings.dtype, torch.float32) if self.cell.exact_state else embeddings.dtype

    def run(self, embeddings: Tensor, state: Tensor, real: Tensor | None) -> tuple[list[Tensor], Tensor]:
        """Outputs of the embedding, of every layer and of the pooling, (B, T, ·) each, and the state after them."""
        if self.pooling is None:
            return self._run_layers(embeddings, state, real)
        size = self.pooling.state_size
        layers, pooled = state[:, :-size].unflatten(1, (len(self.layers), self.cell.slots, -1)), state[:, -size:]
        hidden_states, layers = self._run_layers(embeddings, layers.to(self._state_dtype(embeddings)), real)
        average, pooled = self.pooling(torch.cat(hidden_states, dim=-1), pooled, real)
        return [*hidden_states, average], torch.cat([layers.flatten(1), pooled], dim=1)

    def _run_layers(self, embeddings: Tensor, state: Tensor, real: Tensor | None) -> tuple[list[Tensor], Tensor]:
        hidden_states, states = [embeddings], []
        for layer, before in zip(self.layers, state.unbind(1), strict=True):
            hidden, after = layer(hidden_states[-1], before, real)  # (B, T, H), (B, S, H)
            hidden_states.append(hidden)
            states.append(after)
        if self.norm is not None:
            hidden_states[-1] = self.norm(hidden_states[-1])
        return hidden_states, torch.stack(states, dim=1)


class RNNForCausalLM(RecurrentForCausalLM, RNNPreTrainedModel):
    """Token ids to scores of the next token."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: RNNConfig):
        super().__init__(config)
        self.model = RNNModel(config)
        self.lm_head = nn.Linear(config.output_size, config.vocab_size)
        self.post_init()


__all__ = ["RNNForCausalLM", "RNNModel", "RNNPreTrainedModel"]
