"""The layers of RWKV-7: a recurrent part and a channel mix, with the initial weights of the authors' code.

Letters: B sequences, T tokens of each, H hidden units, N heads of D = H/N units.

References:
    Bo Peng et al., "RWKV-7 'Goose' with Expressive Dynamic State Evolution", 2025, arXiv:2503.14456.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from .configuration_rwkv7 import RWKV7Config
from .rwkv7 import Steps, previous_tokens, rwkv7


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
