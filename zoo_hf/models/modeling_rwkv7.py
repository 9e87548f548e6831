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
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers import initialization as init

from .configuration_rwkv7 import RWKV7Config
from .convert_rwkv7 import from_fla, from_original, read_weights, sizes
from .recurrent import RecurrentForCausalLM, RecurrentModel
from .rwkv7 import Steps, previous_tokens, rwkv7


# isort: split
# not used here: transformers 5.6 loads only the code that this file itself names; goes when 5.19 is required
from .loss import summed_loss  # noqa: F401
from .padding import real_tokens  # noqa: F401


class LoRA(nn.Module):
    """W₂ f(W₁ x) + b, W₁ and W₂ of low rank."""

    def __init__(self, size: int, rank: int, activation: nn.Module, *, bias: bool = True):
        super().__init__()
        self.lora = nn.Sequential(nn.Linear(size, rank, bias=False), activation, nn.Linear(rank, size, bias=bias))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.lora(inputs)

    def reset_parameters(self, bias: Tensor | None = None) -> None:
        """W₁ zero, W₂ orthogonal with gain 0.1, and the given b."""
        outward = self.get_parameter("lora.2.weight")
        size, rank = outward.shape
        init.zeros_(self.get_parameter("lora.0.weight"))
        orthogonal_(outward, gain=0.1 * max(1.0, (rank / size) ** 0.5))
        if bias is not None:
            init.copy_(self.get_parameter("lora.2.bias"), bias)


class RWKV7Attention(nn.Module):
    """The recurrent part of a layer.

    x_r, x_w, x_k, x_v, x_a, x_g = x + (x' − x)∘μ    x' the input one token before, μ one for each
    r, k, v = W_r x_r, W_k x_k, W_v x_v              v ← v + (v_first − v)∘σ(lora_v(x_v)) after the first layer
    log w = −e^(−1/2) σ(lora_w(x_w))                 a = σ(lora_a(x_a))    g = lora_g(x_g)
    κ = k∘k_k, to length 1 in every head             k ← k + k∘(a − 1)∘k_a
    o = recurrence, see `rwkv7_scan`                 out = W_o (g ∘ (GroupNorm(o) + ⟨r, r_k∘k⟩ v))
    """

    def __init__(self, config: RWKV7Config, index: int):
        super().__init__()
        size, ranks = config.hidden_size, config.ranks
        self.config = config
        self.index = index
        self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g = (
            nn.Parameter(torch.empty(1, 1, size)) for _ in range(6)
        )
        self.k_k = nn.Parameter(torch.empty(size))
        self.k_a = nn.Parameter(torch.empty(size))
        self.r_k = nn.Parameter(torch.empty(config.num_heads, config.head_dim))
        self.r_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(size, size, bias=False) for _ in range(4))
        self.w_lora = LoRA(size, ranks["w"], nn.Tanh())
        self.a_lora = LoRA(size, ranks["a"], nn.Identity())
        self.v_lora = LoRA(size, ranks["v"], nn.Identity()) if index else None
        self.g_lora = LoRA(size, ranks["g"], nn.Sigmoid(), bias=False)
        self.g_norm = nn.GroupNorm(config.num_heads, size, eps=config.head_dim * config.norm_eps)

    def reset_parameters(self) -> None:
        """The initial weights of the authors' code."""
        config, last = self.config, max(1, self.config.num_hidden_layers - 1)
        height, left = self.index / last, 1 - self.index / config.num_hidden_layers  # from 0 up to 1, from 1 down
        share, unit = unit_shares(config.hidden_size)
        zigzag = torch.linspace(-1, 1, config.head_dim, dtype=torch.float32).repeat(config.num_heads)
        zigzag = zigzag * zigzag.abs()
        mixes = (self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g)
        for mix, power in zip(mixes, (0.2, 0.9, 0.7, 0.7, 0.9, 0.2), strict=True):
            init.copy_(mix, 1 - share ** (power * left))
        init.copy_(self.k_k, 0.71 - 0.1 * (unit - 0.5))
        init.constant_(self.k_a, 1.02)
        init.constant_(self.r_k, -0.04)
        orthogonal_(self.r_proj.weight)
        orthogonal_(self.k_proj.weight, gain=0.1)
        orthogonal_(self.v_proj.weight)
        init.zeros_(self.o_proj.weight)
        self.w_lora.reset_parameters(6 * unit ** (1 + height**0.3) - 5.5 + 2.5 * zigzag)
        self.a_lora.reset_parameters(0.3 * zigzag + 0.4 * (unit - 0.5) - 0.19)
        if self.v_lora is not None:
            self.v_lora.reset_parameters(0.73 - 0.4 * (unit - 0.5))
        self.g_lora.reset_parameters()
        init.constant_(self.g_norm.weight, ((self.index + 1) / config.num_hidden_layers) ** 0.7)
        init.zeros_(self.g_norm.bias)

    def forward(
        self, inputs: Tensor, before: Tensor, matrices: Tensor, *, first: Tensor | None, real: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Outputs (B, T, H), the last input (B, H), S after it (B, N, D, D), and the first layer's values (B, T, H).

        Args:
            inputs: (B, T, H).
            before: (B, H), the input before these.
            matrices: S, (B, N, D, D), float32.
            first: v_first, (B, T, H); None in the first layer.
            real: (B, T) booleans, False where a position is padding; None if all are real.
        """
        steps, gate, last = self.project(inputs, before, first=first, real=real)
        now = (steps.r * steps.k * self.r_k).sum(-1, keepdim=True) * steps.v  # (B, T, N, D)
        outputs, matrices = rwkv7(steps if real is None else steps.held(real), matrices)  # (B, T, N, D)
        # the group norm of every token by itself is a layer norm in every head, which torch has a faster kernel for
        normed = F.layer_norm(outputs, outputs.shape[-1:], eps=self.g_norm.eps).flatten(2).to(gate.dtype)
        outputs = torch.addcmul(self.g_norm.bias + now.flatten(2), normed, self.g_norm.weight)
        return self.o_proj(outputs * gate), last, matrices, steps.v.flatten(2) if first is None else first

    def project(
        self, inputs: Tensor, before: Tensor, *, first: Tensor | None, real: Tensor | None
    ) -> tuple[Steps, Tensor, Tensor]:
        """What the recurrence reads, the gate g (B, T, H), and the last input (B, H), see `forward`."""
        shifted, last = previous_tokens(inputs, before, real)
        delta = shifted - inputs

        def mixed(share: Tensor) -> Tensor:
            return torch.addcmul(inputs, delta, share)

        x_v = mixed(self.x_v)
        v = self.v_proj(x_v)
        if self.v_lora is not None and first is not None:
            v = torch.lerp(v, first, self.v_lora(x_v).sigmoid())
        r, k = self.r_proj(mixed(self.x_r)), self.k_proj(mixed(self.x_k))
        rate = self.a_lora(mixed(self.x_a)).sigmoid()
        log_decay = -math.exp(-0.5) * self.w_lora(mixed(self.x_w)).sigmoid()
        kappa = k * self.k_k
        k = torch.addcmul(k, k * (rate - 1), self.k_a)
        heads = (self.config.num_heads, self.config.head_dim)
        steps = Steps(*(entries.unflatten(-1, heads) for entries in (r, log_decay, k, v, kappa, rate)))
        length = (steps.kappa.square().sum(-1, keepdim=True) + self.config.key_eps).rsqrt()  # (B, T, N, 1)
        return steps._replace(kappa=steps.kappa * length), self.g_lora(mixed(self.x_g)), last


class RWKV7FeedForward(nn.Module):
    """The channel mix: W_v relu(W_k (x + (x' − x)∘μ))², x' the input one token before."""

    def __init__(self, config: RWKV7Config, index: int):
        super().__init__()
        self.left = 1 - index / config.num_hidden_layers
        self.x_k = nn.Parameter(torch.empty(config.hidden_size))
        self.key = nn.Linear(config.hidden_size, config.channel_mix_size, bias=False)
        self.value = nn.Linear(config.channel_mix_size, config.hidden_size, bias=False)

    def reset_parameters(self) -> None:
        """The initial weights of the authors' code."""
        share, _ = unit_shares(self.x_k.numel())
        init.copy_(self.x_k, 1 - share ** (self.left**4))
        orthogonal_(self.key.weight)
        init.zeros_(self.value.weight)

    def forward(self, inputs: Tensor, before: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
        """Outputs (B, T, H) and the last input (B, H), see `RWKV7Attention.forward`."""
        shifted, last = previous_tokens(inputs, before, real)
        mixed = torch.addcmul(inputs, shifted - inputs, self.x_k)
        return self.value(F.relu(self.key(mixed)).square()), last


class RWKV7Block(nn.Module):
    """One layer."""

    def __init__(self, config: RWKV7Config, index: int):
        super().__init__()
        self.heads = (config.num_heads, config.head_dim)
        self.pre_norm = layer_norm(config) if index == 0 and config.norm_first else nn.Identity()
        self.attn_norm = layer_norm(config)
        self.attn = RWKV7Attention(config, index)
        self.ffn_norm = layer_norm(config)
        self.ffn = RWKV7FeedForward(config, index)

    def forward(
        self, hidden: Tensor, state: Tensor, *, first: Tensor | None, real: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs (B, T, H), state (B, 2 + D, H), and the first layer's values, see `RWKV7Attention.forward`."""
        hidden = self.pre_norm(hidden)
        matrices = state[:, 2:].unflatten(-1, self.heads).transpose(1, 2)  # (B, N, D, D)
        normed = self.attn_norm(hidden)
        outputs, last, matrices, first = self.attn(
            normed, state[:, 0].to(normed.dtype), matrices, first=first, real=real
        )
        hidden = hidden + outputs
        normed = self.ffn_norm(hidden)
        outputs, last_mixed = self.ffn(normed, state[:, 1].to(normed.dtype), real)
        inputs = torch.stack([last, last_mixed], dim=1)  # (B, 2, H)
        state = torch.cat([inputs.to(state.dtype), matrices.transpose(1, 2).flatten(2)], dim=1)
        return hidden + outputs, state, first


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


def layer_norm(config: RWKV7Config) -> nn.LayerNorm:
    """Norm over the H units of every token."""
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.norm_bias)


def unit_shares(size: int) -> tuple[Tensor, Tensor]:
    """n/H and n/(H − 1) of the units n < H, in float32 whatever the weights' precision."""
    units = torch.arange(size, dtype=torch.float32)
    return units / size, units / max(1, size - 1)


def orthogonal_(weight: Tensor, gain: float = 1.0) -> None:
    """Fill the weight with orthogonal rows or columns of length `gain`, made in float32: QR wants no less."""
    init.copy_(weight, nn.init.orthogonal_(torch.empty_like(weight, dtype=torch.float32), gain))


__all__ = ["RWKV7ForCausalLM", "RWKV7Model", "RWKV7PreTrainedModel"]
