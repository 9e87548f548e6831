"""Attention over the past with a state of constant size: the plain scan, and blocks that are weighed at once.

    a_t = w·x_t    ℓ_t = log(exp(ℓ_{t−1} − d) + exp(a_t))    y_t = exp(ℓ_{t−1} − d − ℓ_t) y_{t−1} + exp(a_t − ℓ_t) x_t

so that y_t = Σ_s p_s x_s / Σ_s p_s over s ≤ t with p_s = exp(a_s − d (t − s)): a softmax-weighted average of the past.
The state (y, ℓ) takes the place of the two sums, which would overflow. Without decay (d = 0) a token's age does not
matter; at d = 10, practically only the last token counts.

Letters: B sequences, T tokens of each, W width of the inputs, d decay.

References:
    Bjarke Felbo, Alan Mislove, Anders Søgaard, Iyad Rahwan, Sune Lehmann, "Using millions of emoji occurrences to
    learn any-domain representations for detecting sentiment, emotion and sarcasm", 2017, arXiv:1708.00524.
    Maxim Milakov, Natalia Gimelshein, "Online normalizer calculation for softmax", 2018, arXiv:1805.02867.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


BLOCK = 64  # tokens weighed against each other at a time: 64 B numbers and 64 W multiply-adds a token


class AttentionPooling(nn.Module):
    """The running average of all inputs so far.

    Args:
        width: W, of the inputs and the outputs.
        decay: d, what a token's score loses with every later token, in nats.
    """

    def __init__(self, width: int, decay: float = 0.0):
        super().__init__()
        self.decay = decay
        self.state_size = width + 1  # y, then ℓ
        self.score_weight = nn.Parameter(torch.empty(width))  # w
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Zeros: at first every token has the same score."""
        nn.init.zeros_(self.score_weight)

    def initial_state(self, inputs: Tensor) -> Tensor:
        """(B, W + 1) before any token: y = 0, and an ℓ that weighs nothing beside a token and stays finite.

        In float32 at least: in bfloat16 ℓ would stop growing after 64 tokens.
        """
        state = inputs.new_zeros(len(inputs), self.state_size, dtype=exact(inputs))
        state[:, -1] = torch.finfo(state.dtype).min / 2
        return state

    def forward(self, inputs: Tensor, state: Tensor, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Averages and final state, see `pooling_scan`."""
        outputs = []
        for start in range(0, inputs.shape[1], BLOCK):
            part = slice(start, start + BLOCK)
            block_real = None if real is None else real[:, part]
            average, state = pooling_block(inputs[:, part], state, self.score_weight, self.decay, real=block_real)
            outputs.append(average)
        return torch.cat(outputs, dim=1), state


def pooling_scan(
    inputs: Tensor, state: Tensor, score_weight: Tensor, decay: float, *, real: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Averages (B, T, W) and final state (B, W + 1), one token after the other.

    Args:
        inputs: x, (B, T, W).
        state: (B, W + 1), y and then ℓ before the first token; not modified.
        score_weight: w, (W).
        decay: d, in nats a token.
        real: (B, T) booleans, where False holds the state; None if all tokens are real.
    """
    dtype = exact(inputs)
    average, total = state[:, :-1].to(dtype), state[:, -1:].to(dtype)  # (B, W), (B, 1)
    outputs = []
    for t in range(inputs.shape[1]):
        score = (inputs[:, t] @ score_weight[:, None]).to(dtype)  # (B, 1)
        new_total = torch.logaddexp(total - decay, score)
        new_average = (total - decay - new_total).exp() * average + (score - new_total).exp() * inputs[:, t]
        keep = torch.ones_like(score, dtype=torch.bool) if real is None else real[:, t, None]  # (B, 1)
        average, total = torch.where(keep, new_average, average), torch.where(keep, new_total, total)
        outputs.append(average)
    return torch.stack(outputs, dim=1).to(inputs.dtype), torch.cat([average, total], dim=1)


def exact(inputs: Tensor) -> torch.dtype:
    """What scores and sums are kept in: in bfloat16 a score near 60 moves in steps of 0.25."""
    return torch.promote_types(inputs.dtype, torch.float32)


def pooling_block(
    inputs: Tensor, state: Tensor, score_weight: Tensor, decay: float, *, real: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`pooling_scan` by one causal softmax over the tokens of a block, the state as a token in front of them."""
    length, dtype = inputs.shape[1], exact(inputs)
    scores = (inputs @ score_weight[:, None]).squeeze(-1).to(dtype)  # (B, T)
    if real is None:
        age = torch.arange(1, length + 1, device=inputs.device).expand_as(scores)
    else:
        scores, age = scores.masked_fill(~real, -torch.inf), real.cumsum(1)  # padding does not age the past
    scores = torch.cat([state[:, -1:].to(dtype), scores], dim=1)  # (B, 1 + T)
    later = age[:, :, None] - F.pad(age, (1, 0))[:, None]  # (B, T, 1 + T), real tokens from the second to the first
    future = torch.ones(length, length + 1, dtype=torch.bool, device=inputs.device).triu(2)
    scores = (scores[:, None] - decay * later.to(dtype)).masked_fill(future, -torch.inf)  # (B, T, 1 + T)
    values = torch.cat([state[:, None, :-1].to(dtype), inputs.to(dtype)], dim=1)  # (B, 1 + T, W)
    averages = scores.softmax(dim=-1) @ values  # (B, T, W)
    total = scores[:, -1].logsumexp(dim=-1, keepdim=True)  # (B, 1)
    return averages.to(inputs.dtype), torch.cat([averages[:, -1].to(dtype), total], dim=1)
