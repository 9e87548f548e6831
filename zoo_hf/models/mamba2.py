"""The Mamba-2 layer: the plain scan, its form in blocks of matrix products (SSD), and the choice between them.

    z, u, δ = split(W_in h)    x, B, C = split(act(conv(u)))    Δ = softplus(δ + b_Δ)    A = −exp(A_log)
    S ← exp(Δ A) S + B (Δ x)ᵀ      y = Sᵀ C + D x      out = W_out RMSNorm(y ∘ silu(z))

Every head has its own scalars Δ, A, D and its own state S (N, P); the heads of a group share the vectors B and C.

Letters: B sequences, T tokens of each, W width of the model, G groups of R heads of P values, N state size,
K convolution kernel, U = G·R·P + 2·G·N channels of the convolution, M blocks of Q tokens.

References:
    Tri Dao, Albert Gu, "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State
    Space Duality", 2024, arXiv:2405.21060.
"""

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN

from .backends import kernel
from .configuration_mamba2 import ZooMamba2Config


CPU_BLOCK = 32  # tokens; 16 to 64 are as fast to a fifth, 128 takes nearly twice as long


class SSDInputs(NamedTuple):
    """What the recurrence reads.

    Args:
        x: (B, T, G, R, P).
        step: Δ ≥ 0, (B, T, G, R), float32; 0 holds the state.
        b: (B, T, G, N), what is written with x.
        c: (B, T, G, N), what is read.
    """

    x: Tensor
    step: Tensor
    b: Tensor
    c: Tensor


class LayerState(NamedTuple):
    """What a layer carries from token to token.

    Args:
        recent: (…, K−1, U), the convolution's inputs x, B, C at the last K−1 tokens, the latest last.
        s: S, (…, G, N, R, P), float32.
    """

    recent: Tensor
    s: Tensor


def ssd(inputs: SSDInputs, rates: Tensor, state: Tensor, *, block: int) -> tuple[Tensor, Tensor]:
    """`ssd_scan` by the fastest way there is: a kernel, blocks of at most `block` tokens, or a step for one token."""
    fused = kernel("mamba2", inputs, rates, state)
    if fused is not None:
        return fused(*inputs, rates, state)
    if inputs.x.shape[1] == 1:
        return ssd_scan(inputs, rates, state)
    return ssd_blocks(inputs, rates, state, min(block, CPU_BLOCK) if state.device.type == "cpu" else block)


def ssd_scan(inputs: SSDInputs, rates: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Sᵀ C (B, T, G, R, P) after every token, float32, and S after the last, one token after the other.

    Args:
        inputs: shapes as in `SSDInputs`.
        rates: A < 0, (G, R), float32.
        state: S before the first token, (B, G, N, R, P), float32; not modified.
    """
    decay = (inputs.step * rates).exp()[:, :, :, None, :, None]  # (B, T, G, 1, R, 1)
    values = (inputs.step.unsqueeze(-1) * inputs.x).unsqueeze(3)  # (B, T, G, 1, R, P)
    keys = inputs.b[..., None, None]  # (B, T, G, N, 1, 1)
    queries = inputs.c.to(state.dtype).unsqueeze(-2)  # (B, T, G, 1, N)
    outputs = []
    for t in range(inputs.x.shape[1]):
        state = decay[:, t] * state + keys[:, t] * values[:, t]
        outputs.append((queries[:, t] @ state.flatten(-2)).squeeze(-2))  # (B, G, R·P)
    return torch.stack(outputs, dim=1).view(inputs.x.shape), state


def ssd_blocks(inputs: SSDInputs, rates: Tensor, state: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """`ssd_scan` in M blocks of at most `block` tokens: nothing but matrix products within a block.

        Y = (L ∘ C Bᵀ) ΔX + E C S      S ← e_Q S + Bᵀ (L_Q ΔX)
        L[t, s] = exp Σ_{s<r≤t} Δ_r A for s ≤ t, else 0      E = diag(e), e_t = exp Σ_{r≤t} Δ_r A

    Products are in the inputs' precision; decays, and the state from block to block, in float32.
    """
    dtype, length = inputs.b.dtype, inputs.x.shape[1]
    count = math.ceil(length / block)
    x, step, b, c = (in_blocks(part, count) for part in inputs)
    values = step.unsqueeze(-1) * x  # (B, M, Q, G, R, P)
    exponents = step * rates  # (B, M, Q, G, R)
    since_start = exponents.cumsum(2).exp().unsqueeze(-1)  # e, (B, M, Q, G, R, 1)
    between = decay_between(exponents.permute(0, 1, 3, 4, 2))  # (B, M, G, R, Q, Q)
    until_end = between[..., -1, :].permute(0, 1, 4, 2, 3).unsqueeze(-1)  # (B, M, Q, G, R, 1)
    queries, keys = c.transpose(2, 3), b.permute(0, 1, 3, 4, 2)  # (B, M, G, Q, N), (B, M, G, N, Q)
    scores = (queries @ keys).tril().unsqueeze(3) * between  # (B, M, G, R, Q, Q)
    within = scores.to(dtype) @ values.to(dtype).permute(0, 1, 3, 4, 2, 5)  # (B, M, G, R, Q, P)
    decayed = (values * until_end).to(dtype).flatten(-2).transpose(2, 3)  # (B, M, G, Q, R·P)
    carried = []
    for m in range(count):  # block after block only what passes through the state
        carried.append(queries[:, m] @ state.to(dtype).flatten(-2))  # (B, G, Q, R·P)
        written = (keys[:, m] @ decayed[:, m]).view(state.shape)
        state = torch.addcmul(written, state, since_start[:, m, -1].unsqueeze(2))
    before = torch.stack(carried, dim=1).unflatten(-1, x.shape[-2:]).transpose(2, 3)  # (B, M, Q, G, R, P)
    outputs = torch.addcmul(within.permute(0, 1, 4, 2, 3, 5), before, since_start)
    return outputs.flatten(1, 2)[:, :length], state


def in_blocks(part: Tensor, count: int) -> Tensor:
    """(B, T, …) to (B, `count`, Q, …), filled up with zeros, of which Δ = 0 holds the state."""
    size = math.ceil(part.shape[1] / count)
    missing = count * size - part.shape[1]
    if missing > 0:
        part = F.pad(part, (0, 0) * (part.dim() - 2) + (0, missing))
    return part.unflatten(1, (count, size))


def decay_between(exponents: Tensor) -> Tensor:
    """exp Σ_{s<r≤t} exponents[r] at [t, s] (…, Q, Q) for s ≤ t, else 1: summed, as differences of sums lose digits."""
    size = exponents.shape[-1]
    later = torch.ones(size, size, dtype=exponents.dtype, device=exponents.device).tril(-1)  # [r, s]: r > s
    return (exponents.unsqueeze(-1) * later).cumsum(-2).exp()


def short_convolution(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`shifted_sum` by the fastest way there is: torch's convolution, except in torch.func.vmap or for one token.

    Its oneDNN form takes half the time of the sum on a CPU, if told that channels come last.
    """
    kernel = weight.shape[-1]
    if inputs.shape[1] == kernel or torch._C._are_functorch_transforms_active():
        return shifted_sum(inputs, weight, bias)
    image = inputs.transpose(1, 2).unsqueeze(2)  # (B, U, 1, K−1+T), channels last
    return F.conv2d(image, weight.unsqueeze(2), bias, groups=weight.shape[0]).squeeze(2).transpose(1, 2)


def shifted_sum(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Σ_k weight[:, 0, k] ∘ inputs[:, t+k] + bias, (B, T, U): every channel by itself, as nn.Conv1d with U groups.

    Args:
        inputs: (B, K−1+T, U), the T tokens after the K−1 before them.
        weight: (U, 1, K).
        bias: (U), or None.
    """
    kernel = weight.shape[-1]
    length = inputs.shape[1] - kernel + 1
    terms = (weight[:, 0, k] * inputs[:, k : k + length] for k in range(kernel))
    total = functools.reduce(torch.add, terms)
    return total if bias is None else total + bias


def channels(config: ZooMamba2Config) -> int:
    """U, channels of the convolution: x, B, C."""
    return config.num_heads * config.head_dim + 2 * config.n_groups * config.state_size


def layer_state_size(config: ZooMamba2Config) -> int:
    """Numbers in the state of a layer and sequence."""
    return (config.conv_kernel - 1) * channels(config) + config.num_heads * config.head_dim * config.state_size


def split_state(state: Tensor, config: ZooMamba2Config) -> LayerState:
    """The parts of a state (…, `layer_state_size`), as views: first `recent`, then `s`."""
    heads = config.num_heads // config.n_groups
    matrix = (config.n_groups, config.state_size, heads, config.head_dim)
    recent, s = state.split([state.shape[-1] - math.prod(matrix), math.prod(matrix)], dim=-1)
    return LayerState(recent.unflatten(-1, (config.conv_kernel - 1, channels(config))), s.unflatten(-1, matrix))


def join_states(states: list[LayerState]) -> Tensor:
    """The states of L layers as one tensor (B, L, `layer_state_size`), in the wider of their precisions."""
    parts = [part.flatten(1) for state in states for part in state]  # one copy: the state is most of a step's memory
    return torch.cat(parts, dim=1).unflatten(1, (len(states), -1))


class ZooMamba2RMSNorm(nn.Module):
    """x / √(mean x² + ε) · weight, the mean over each of `groups` equal parts of the last dimension; in float32."""

    def __init__(self, width: int, groups: int = 1, *, epsilon: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.groups = groups
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        parts = wide(x).unflatten(-1, (self.groups, -1))
        return (F.rms_norm(parts, parts.shape[-1:], eps=self.epsilon).flatten(-2) * self.weight).to(self.weight.dtype)


class ZooMamba2Mixer(nn.Module):
    """One layer, without norm and residual. Parameters are called as in transformers' `Mamba2Mixer`."""

    def __init__(self, config: ZooMamba2Config):
        super().__init__()
        self.config = config
        values = config.num_heads * config.head_dim
        width = channels(config)
        self.split = (values, width, config.num_heads)  # z, u, δ
        # holds the weights only, see `short_convolution`
        self.conv1d = nn.Conv1d(width, width, config.conv_kernel, groups=width, bias=config.use_conv_bias)
        self.in_proj = nn.Linear(config.hidden_size, sum(self.split), bias=config.use_bias)
        self.activation = ACT2FN[config.hidden_act]
        self.dt_bias = nn.Parameter(torch.empty(config.num_heads))
        self.A_log = nn.Parameter(torch.empty(config.num_heads))
        self.D = nn.Parameter(torch.empty(config.num_heads))
        self.norm = ZooMamba2RMSNorm(values, config.n_groups, epsilon=config.layer_norm_epsilon)
        self.out_proj = nn.Linear(values, config.hidden_size, bias=config.use_bias)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A = −1, −2, …, D = 1, softplus(b_Δ) log-uniform; convolution and W_out uniform; as transformers draws them.

        W_in is the model's to draw, as every linear layer.
        """
        config = self.config
        init.copy_(self.A_log, torch.arange(1.0, config.num_heads + 1).log())
        init.ones_(self.D)
        low, high = math.log(config.time_step_min), math.log(config.time_step_max)
        uniform = torch.rand(config.num_heads, device=self.dt_bias.device, dtype=torch.float32)
        step = (uniform * (high - low) + low).exp().clamp(min=config.time_step_floor)
        init.copy_(self.dt_bias, step + (-(-step).expm1()).log())  # softplus(dt_bias) = step
        init.kaiming_uniform_(self.conv1d.weight, a=math.sqrt(5))
        if self.conv1d.bias is not None:
            init.zeros_(self.conv1d.bias)
        depth = config.num_hidden_layers if config.rescale_prenorm_residual else 1
        init.kaiming_uniform_(self.out_proj.weight, a=math.sqrt(6 * depth - 1))  # within ±1/√(inputs · depth)

    def forward(self, hidden: Tensor, state: LayerState, lengths: Tensor | None = None) -> tuple[Tensor, LayerState]:
        """Outputs (B, T, W), and the state after the last real token.

        Args:
            hidden: (B, T, W).
            state: shapes as in `LayerState`; not modified.
            lengths: (B), real tokens of each row, which are its first; None if all are real.
        """
        recent, s = state
        gate, inputs, step = self.in_proj(hidden).split(self.split, dim=-1)  # (B, T, G·R·P), (B, T, U), (B, T, G·R)
        inputs = torch.cat([recent.to(inputs.dtype), inputs], dim=1)  # (B, K−1+T, U)
        convolved = self.activation(short_convolution(inputs, self.conv1d.weight, self.conv1d.bias))  # (B, T, U)
        groups, size, heads, _ = s.shape[1:]
        x, b, c = convolved.split([self.split[0], groups * size, groups * size], dim=-1)
        tokens = SSDInputs(
            x=x.unflatten(-1, (groups, heads, -1)),
            step=self.steps(step, lengths).unflatten(-1, (groups, heads)),
            b=b.unflatten(-1, (groups, size)),
            c=c.unflatten(-1, (groups, size)),
        )
        rates = -wide(self.A_log).exp().view(groups, heads)
        y, s = ssd(tokens, rates, s, block=self.config.chunk_size)  # (B, T, G, R, P), (B, G, N, R, P)
        y = torch.addcmul(y, tokens.x, wide(self.D).view(groups, heads, 1)).flatten(2)
        outputs = self.out_proj(self.norm(y * F.silu(wide(gate))))
        return outputs, LayerState(last_real(inputs, lengths, recent.shape[1]), s)

    def steps(self, raw: Tensor, lengths: Tensor | None) -> Tensor:
        """Δ (B, T, G·R) in float32, 0 behind the real tokens of a row."""
        steps = F.softplus(wide(raw) + self.dt_bias)
        low, high = self.config.time_step_limit
        if low > 0 or high < math.inf:
            steps = steps.clamp(low, high)
        if lengths is None:
            return steps
        padding = torch.arange(raw.shape[1], device=raw.device) >= lengths.unsqueeze(1)  # (B, T)
        return steps.masked_fill(padding.unsqueeze(-1), 0.0)


def last_real(inputs: Tensor, lengths: Tensor | None, count: int) -> Tensor:
    """The last `count` of the first `count + lengths` rows of `inputs` (B, count + T, U); None is T for every row."""
    if lengths is None:
        return inputs[:, inputs.shape[1] - count :]
    places = lengths.unsqueeze(1) + torch.arange(count, device=lengths.device)  # (B, count)
    return inputs.take_along_dim(places.unsqueeze(-1), 1)


def wide(x: Tensor) -> Tensor:
    """x in float32, or in float64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
