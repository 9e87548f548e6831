"""RWKV-7 language models: embedding, layers of a recurrent part and a channel mix, layer norm, linear head.

    x ← x + Attention(LN(x))    x ← x + ChannelMix(LN(x))    logits = LN(x) W_headᵀ

Names of classes' parts and of parameters are those of the package `flash-linear-attention` (fla).

Letters: B sequences, T tokens of each, V vocabulary, H hidden units, N heads of D = H/N units, L layers. The whole
model's state is one float32 tensor (B, L, 2 + D, H), whatever the context length. Of a layer, slot 0 is the last input
of the attention, slot 1 that of the channel mix, and the other D are the heads' matrices S: row i of all heads.

References:
    Bo Peng et al., "RWKV-7 'Goose' with Expressive Dynamic State Evolution", 2025, arXiv:2503.14456.
"""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers import initialization as init

from .configuration_rwkv7 import RWKV7Config
from .convert_rwkv7 import from_fla, from_original, read_weights, sizes
from .recurrent import RecurrentForCausalLM, RecurrentModel
from .rwkv7_layers import RWKV7Attention, RWKV7Block, RWKV7FeedForward, layer_norm, orthogonal_


# isort: split
# not used here: transformers 5.6 loads only the code that this file itself names; goes when 5.19 is required
from .backends import kernel  # noqa: F401
from .loss import summed_loss  # noqa: F401
from .padding import real_tokens  # noqa: F401
from .rwkv7 import rwkv7  # noqa: F401


class RWKV7PreTrainedModel(PreTrainedModel):
    """Initial weights, loading and saving."""

    config_class = RWKV7Config
    base_model_prefix = "model"
    _input_embed_layer = "embeddings"
    _no_split_modules = ["RWKV7Block"]

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As of every model in transformers; fla's older format is refused, whose mixes it cannot read."""
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, report = loaded
        if any(name.endswith(".attn.x_x") for name in report["unexpected_keys"]):
            raise ValueError("The token-shift mixes are packed in `attn.x_x`; use `RWKV7ForCausalLM.from_fla`.")
        return (model, report) if output_loading_info else model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Those of the authors' code, but for the embedding's range. No layer adds anything at first."""
        if isinstance(module, RWKV7Attention | RWKV7FeedForward):
            module.reset_parameters()
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.uniform_(module.weight, -self.config.embedding_range, self.config.embedding_range)
        elif isinstance(module, nn.Linear) and module is self.get_output_embeddings():
            vocabulary, size = module.weight.shape
            orthogonal_(module.weight, gain=0.5 * max(1.0, (vocabulary / size) ** 0.5))


class RWKV7Model(RecurrentModel, RWKV7PreTrainedModel):
    """Token ids to the normed outputs of the last layer."""

    def __init__(self, config: RWKV7Config):
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(RWKV7Block(config, index) for index in range(config.num_hidden_layers))
        self.norm = layer_norm(config)
        self.post_init()

    def initial_state(self, embeddings: Tensor) -> Tensor:
        """Zeros (B, L, 2 + D, H): the state before the first token."""
        config = self.config
        shape = (len(embeddings), config.num_hidden_layers, 2 + config.head_dim, config.hidden_size)
        return embeddings.new_zeros(shape, dtype=torch.promote_types(embeddings.dtype, torch.float32))

    def run(self, embeddings: Tensor, state: Tensor, real: Tensor | None) -> tuple[list[Tensor], Tensor]:
        """Hidden states (B, T, H): the embeddings, the layers' outputs, the last of them normed; and the state."""
        hidden_states, states, first = [embeddings], [], None
        for layer, before in zip(self.layers, state.unbind(1), strict=True):
            hidden, after, first = layer(hidden_states[-1], before, first=first, real=real)
            hidden_states.append(hidden)
            states.append(after)
        return [*hidden_states[:-1], self.norm(hidden_states[-1])], torch.stack(states, dim=1)


class RWKV7ForCausalLM(RecurrentForCausalLM, RWKV7PreTrainedModel):
    """Token ids to scores of the next token.

    `from_pretrained` also loads a model that fla saved, `from_fla` its older formats, `from_original` the authors'.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embeddings.weight"}

    def __init__(self, config: RWKV7Config):
        super().__init__(config)
        self.model = RWKV7Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_fla(cls, source: str | Path | Mapping[str, Tensor], **options: Any) -> "RWKV7ForCausalLM":
        """A model that fla saved, in its present format or in the older one, whose token-shift mixes are one tensor.

        Args:
            source: folder, or name on the Hub; or weights, whose shapes tell the sizes, with fla's other defaults.
            options: as for `from_pretrained`.
        """
        if isinstance(source, Mapping):
            weights = from_fla(source)
            return cls._from_weights(weights, RWKV7Config(**sizes(weights), key_eps=1e-6), options)
        model = cls._from_weights(from_fla(read_weights(source)), RWKV7Config.from_pretrained(source), options)
        with contextlib.suppress(OSError):  # many models come without
            model.generation_config = GenerationConfig.from_pretrained(source)
        return model

    @classmethod
    def from_original(cls, source: str | Path | Mapping[str, Tensor], **options: Any) -> "RWKV7ForCausalLM":
        """A model of the authors'.

        Args:
            source: path of a .pth file, or the weights that such a file holds; their shapes tell the sizes.
            options: as for `from_pretrained`.
        """
        weights = from_original(source if isinstance(source, Mapping) else read_weights(source))
        return cls._from_weights(weights, RWKV7Config(**sizes(weights)), options)

    @classmethod
    def _from_weights(
        cls, weights: dict[str, Tensor], config: RWKV7Config, options: dict[str, Any]
    ) -> "RWKV7ForCausalLM":
        model, report = cls.from_pretrained(
            None, config=config, state_dict=weights, output_loading_info=True, **options
        )
        wrong = {problem: names for problem, names in report.items() if names}
        if wrong:
            raise ValueError(f"The weights are not those of an RWKV-7 model: {wrong}; take a file that has them all.")
        return model


__all__ = ["RWKV7ForCausalLM", "RWKV7Model", "RWKV7PreTrainedModel"]
