"""The Mamba-2 language model: embedding, residual Mamba-2 layers, norm, linear head.

    h = Emb[x]    h ← h + layer_l(RMSNorm_l(h)), l = 1 … L    logits = RMSNorm_f(h) W_outᵀ

Names and shapes of the parameters are those of transformers' `Mamba2ForCausalLM`, and so are the logits.

Letters: B sequences, T tokens of each, L layers, W width. The whole model's state is one tensor
(B, L, `layer_state_size`), float32, whatever the context length; `split_state` takes it apart.

References:
    Tri Dao, Albert Gu, "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State
    Space Duality", 2024, arXiv:2405.21060.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .configuration_mamba2 import ZooMamba2Config
from .mamba2 import LayerState, ZooMamba2Mixer, ZooMamba2RMSNorm, join_states, layer_state_size, split_state, wide
from .padding import to_front
from .recurrent import RecurrentForCausalLM, RecurrentModel


# isort: split
# not used here: transformers 5.6 loads only the code that this file itself names; goes when 5.19 is required
from .backends import kernel  # noqa: F401
from .loss import summed_loss  # noqa: F401


# the one parameter that the package `mamba_ssm` calls otherwise
MAMBA_SSM_NAMES = {"embedding.weight": "embeddings.weight"}


class ZooMamba2PreTrainedModel(PreTrainedModel):
    """Initial weights, loading and saving."""

    config: ZooMamba2Config
    config_class = ZooMamba2Config
    base_model_prefix = "backbone"
    _input_embed_layer = "embeddings"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Embedding, head and projections normal, norms 1, biases 0; and see `ZooMamba2Mixer.reset_parameters`."""
        super()._init_weights(module)
        if isinstance(module, ZooMamba2Mixer):
            module.reset_parameters()

    @classmethod
    def from_pretrained(cls, *args: Any, key_mapping: dict[str, str] | None = None, **kwargs: Any) -> Any:
        """As of every model; reads also what transformers' `Mamba2ForCausalLM` and the package `mamba_ssm` saved."""
        return super().from_pretrained(*args, key_mapping=MAMBA_SSM_NAMES | (key_mapping or {}), **kwargs)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As of every model, but by default with transformers' names, whatever they were where it came from."""
        super().save_pretrained(*args, **({"save_original_format": False} | kwargs))


class ZooMamba2Block(nn.Module):
    """h + layer(RMSNorm(h))."""

    def __init__(self, config: ZooMamba2Config):
        super().__init__()
        self.residual_in_fp32 = config.residual_in_fp32
        self.norm = ZooMamba2RMSNorm(config.hidden_size, epsilon=config.layer_norm_epsilon)
        self.mixer = ZooMamba2Mixer(config)

    def forward(self, hidden: Tensor, state: LayerState, lengths: Tensor | None) -> tuple[Tensor, LayerState]:
        """Outputs (B, T, W) and the state after the last real token; see `ZooMamba2Mixer`."""
        outputs, after = self.mixer(self.norm(hidden), state, lengths)
        return (wide(hidden) if self.residual_in_fp32 else hidden) + outputs, after


class ZooMamba2Model(RecurrentModel, ZooMamba2PreTrainedModel):
    """Token ids to the normed outputs of the last layer."""

    def __init__(self, config: ZooMamba2Config):
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(ZooMamba2Block(config) for _ in range(config.num_hidden_layers))
        self.norm_f = ZooMamba2RMSNorm(config.hidden_size, epsilon=config.layer_norm_epsilon)
        self.post_init()

    def initial_state(self, embeddings: Tensor) -> Tensor:
        """Zeros (B, L, `layer_state_size`), float32 if the embeddings are of lower precision."""
        zeros = embeddings.new_zeros(len(embeddings), self.config.num_hidden_layers, layer_state_size(self.config))
        return wide(zeros)

    def run(self, embeddings: Tensor, state: Tensor, real: Tensor | None) -> tuple[list[Tensor], Tensor]:
        """The embeddings, the outputs of every layer, the last ones normed, (B, T, W) each, and the state."""
        hidden, lengths, back = embeddings, None, None
        if real is not None:  # all padding to the right, where Δ = 0 holds the state
            there, back = to_front(real)
            hidden, lengths = hidden.take_along_dim(there.unsqueeze(-1), 1), real.sum(1)
        hidden_states, states = [embeddings], []
        for layer, before in zip(self.layers, state.unbind(1), strict=True):
            hidden, after = layer(hidden, split_state(before, self.config), lengths)
            outputs = self.norm_f(hidden) if layer is self.layers[-1] else hidden
            hidden_states.append(outputs if back is None else outputs.take_along_dim(back.unsqueeze(-1), 1))
            states.append(after)
        return hidden_states, join_states(states)


class ZooMamba2ForCausalLM(RecurrentForCausalLM, ZooMamba2PreTrainedModel):
    """Token ids to scores of the next token."""

    _tied_weights_keys = {"lm_head.weight": "backbone.embeddings.weight"}

    def __init__(self, config: ZooMamba2Config):
        super().__init__(config)
        self.backbone = ZooMamba2Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


__all__ = ["ZooMamba2ForCausalLM", "ZooMamba2Model", "ZooMamba2PreTrainedModel"]
