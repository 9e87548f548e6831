"""Language model with a simplified DNC: embedding, an LSTM with an addressable memory, norm, linear head.

    h, r = DNC(Emb[x])    logits = W_out LN([h, r]) + b_out

Letters: B sequences, T tokens of each, V vocabulary, E embedding width, H units of the LSTM, N slots of W numbers in
the memory. The model's state is one tensor (B, 2H + W + N·W), whatever the context length: h, c, what was read last,
and the memory slot by slot. It is float32 where weights are of lower precision: the memory is a sum over all tokens.
"""

import math

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .configuration_dnc import DNCConfig
from .dnc import DNC, DNCState
from .recurrent import RecurrentForCausalLM, RecurrentModel


# isort: split
# not used here: transformers 5.6 loads only the code that this file itself names; goes when 5.19 is required
from .backends import kernel  # noqa: F401
from .loss import summed_loss  # noqa: F401
from .padding import real_tokens  # noqa: F401


def split_state(state: Tensor, hidden_size: int, memory_width: int) -> DNCState:
    """Views of the parts of a state (B, 2H + W + N·W)."""
    slots = state.shape[1] - 2 * hidden_size - memory_width
    h, c, read, memory = state.split([hidden_size, hidden_size, memory_width, slots], dim=1)
    return DNCState(h, c, read, memory.unflatten(1, (-1, memory_width)))


def join_state(parts: DNCState) -> Tensor:
    """One tensor (B, 2H + W + N·W), what `split_state` takes apart."""
    return torch.cat([part.flatten(1) for part in parts], dim=1)


def slot_addresses(slots: int, width: int, like: Tensor) -> Tensor:
    """√2 cos(2π k/65537), k = 40503 j i² mod 65537, for slots j = 1 … N and i = 1 … W: (N, W), like random numbers."""
    j = torch.arange(1, slots + 1, device=like.device)
    i = torch.arange(1, width + 1, device=like.device)
    k = torch.outer(j, i.square()) * 40503 % 65537  # whole numbers: exact, and so the same on every device
    return math.sqrt(2) * torch.cos(2 * math.pi / 65537 * k.to(like.dtype))


class DNCPreTrainedModel(PreTrainedModel):
    """Initial weights, loading and saving."""

    config_class = DNCConfig
    base_model_prefix = "model"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Matrices Xavier-uniform, the embedding's too; norms' weights one; biases zero."""
        if isinstance(module, DNC):
            module.reset_parameters()
        elif isinstance(module, nn.Linear | nn.Embedding):
            nn.init.xavier_uniform_(module.weight)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
        if isinstance(module, nn.Linear | nn.LayerNorm):
            nn.init.zeros_(module.bias)


class DNCModel(RecurrentModel, DNCPreTrainedModel):
    """Token ids to the normalised outputs of the LSTM and of the memory, side by side."""

    def __init__(self, config: DNCConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.embedding_size)
        self.cell = DNC(config.embedding_size, config.hidden_size, config.memory_width)
        self.norm = nn.LayerNorm(config.hidden_size + config.memory_width)
        self.post_init()

    def initial_state(self, embeddings: Tensor) -> Tensor:
        """The state before the first token, (B, 2H + W + N·W): zeros, and the memory as `initial_memory` says."""
        config, rows = self.config, len(embeddings)
        dtype = torch.promote_types(embeddings.dtype, torch.float32)
        zeros = embeddings.new_zeros(rows, 2 * config.hidden_size + config.memory_width, dtype=dtype)
        memory = config.initial_memory * slot_addresses(config.memory_slots, config.memory_width, zeros)  # (N, W)
        return torch.cat([zeros, memory.flatten().expand(rows, -1)], dim=1)

    def run(self, embeddings: Tensor, state: Tensor, real: Tensor | None) -> tuple[list[Tensor], Tensor]:
        """The embeddings (B, T, E) and LN([h, r]), (B, T, H+W), and the state after them."""
        parts = split_state(state, self.config.hidden_size, self.config.memory_width)
        outputs, parts = self.cell(embeddings, parts, real)
        return [embeddings, self.norm(outputs.to(self.norm.weight.dtype))], join_state(parts)


class DNCForCausalLM(RecurrentForCausalLM, DNCPreTrainedModel):
    """Token ids to scores of the next token."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: DNCConfig):
        super().__init__(config)
        self.model = DNCModel(config)
        self.lm_head = nn.Linear(config.hidden_size + config.memory_width, config.vocab_size)
        self.post_init()


__all__ = ["DNCForCausalLM", "DNCModel", "DNCPreTrainedModel"]
