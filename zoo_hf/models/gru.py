"""The GRU: the plain scan, torch's fused kernel, and the choice between them.

    r, z = σ(a_r + R_r h), σ(a_z + R_z h)    n = tanh(a_n + r∘(R_n h + b_candidate))    a = W_in x + b
    h ← (1 − z)∘n + z∘h

Letters: B sequences, T tokens of each, N heads of D = H/N units, G = 3 gates in torch's order r, z, n.

References:
    Kyunghyun Cho et al., "Learning Phrase Representations using RNN Encoder-Decoder for Statistical Machine
    Translation", 2014, arXiv:1406.1078 (version 1 resets R_n h + b, as here and in cuDNN).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .recurrent import merge_heads, recurrent_blocks, split_heads


class GRUWeights(NamedTuple):
    """The parameters of one layer.

    Args:
        input: W_in, (3H, input_size).
        recurrent: R, (3, N, D, D) [gate, head, out, in]; for N = 1 viewed as (3H, H) it is torch's `weight_hh_l0`.
        bias: b, (3H): torch's `bias_ih_l0` plus the r and z parts of `bias_hh_l0`.
        candidate_bias: b_candidate, (H): the n part of `bias_hh_l0`, inside the product with r.
    """

    input: Tensor
    recurrent: Tensor
    bias: Tensor
    candidate_bias: Tensor


class GRU(nn.Module):
    """One layer.

    Args:
        input_size: width of the inputs.
        hidden_size: H, width of the outputs and of the state's one slot.
        num_heads: N, blocks of the recurrent matrix; divides H.
    """

    gates = 3
    slots = 1  # h

    def __init__(self, input_size: int, hidden_size: int, num_heads: int = 1):
        super().__init__()
        head_size = hidden_size // num_heads
        self.input_weight = nn.Parameter(torch.empty(self.gates * hidden_size, input_size))
        self.recurrent_weight = nn.Parameter(torch.empty(self.gates, num_heads, head_size, head_size))
        self.bias = nn.Parameter(torch.empty(self.gates * hidden_size))
        self.candidate_bias = nn.Parameter(torch.empty(hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform in ±1/√H, as torch."""
        bound = self.candidate_bias.numel() ** -0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, inputs: Tensor, state: Tensor, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Outputs and final state, see `gru_scan`."""
        weights = GRUWeights(self.input_weight, self.recurrent_weight, self.bias, self.candidate_bias)
        return gru(inputs, state, weights, real)


def gru(inputs: Tensor, state: Tensor, weights: GRUWeights, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`gru_scan` by the fastest way there is: torch's kernel for one head and no padding, otherwise the scan."""
    transformed = torch._C._are_functorch_transforms_active()  # torch.gru has no batching rule for torch.func.vmap
    if real is None and weights.recurrent.shape[1] == 1 and not transformed:
        return gru_fused(inputs, state, weights)
    return gru_scan(inputs, state, weights, real)


def gru_scan(inputs: Tensor, state: Tensor, weights: GRUWeights, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Outputs (B, T, H) and final state (B, 1, H) of one layer, one token after the other.

    Args:
        inputs: (B, T, input_size).
        state: (B, 1, H), h before the first token; not modified.
        weights: shapes as in `GRUWeights`.
        real: (B, T) booleans, where False holds the state; None if all tokens are real.
    """
    gates, heads, size, _ = weights.recurrent.shape
    pre = split_heads(F.linear(inputs, weights.input, weights.bias), gates, heads)  # (T, N, B, 3D)
    blocks = recurrent_blocks(weights.recurrent)  # (N, D, 3D)
    candidate_bias = weights.candidate_bias.view(heads, 1, size)
    h = state.unflatten(-1, (heads, size)).permute(1, 2, 0, 3).squeeze(0)  # (N, B, D)
    outputs = []
    for t in range(inputs.shape[1]):
        input_r, input_z, input_n = pre[t].chunk(3, dim=-1)  # (N, B, D) each
        recurrent_r, recurrent_z, recurrent_n = torch.bmm(h, blocks).chunk(3, dim=-1)  # (N, B, D) each
        r, z = (input_r + recurrent_r).sigmoid(), (input_z + recurrent_z).sigmoid()
        n = (input_n + r * (recurrent_n + candidate_bias)).tanh()
        new_h = (1 - z) * n + z * h
        h = new_h if real is None else torch.where(real[:, t, None], new_h, h)
        outputs.append(h)
    return merge_heads(outputs), merge_heads([h])


@torch.compiler.disable  # left whole: inductor would unroll it over time, 50 s of compiling for 16 tokens
def gru_fused(inputs: Tensor, state: Tensor, weights: GRUWeights) -> tuple[Tensor, Tensor]:
    """`gru_scan` for one head and no padding, by torch's kernel (cuDNN on a GPU)."""
    size = weights.candidate_bias.numel()
    recurrent_bias = torch.cat([weights.bias.new_zeros(2 * size), weights.candidate_bias])
    flat = [weights.input, weights.recurrent.flatten(0, 2), weights.bias, recurrent_bias]
    train = torch.is_grad_enabled()  # keeps what a backward pass needs
    outputs, h = torch.gru(inputs, state.transpose(0, 1), flat, True, 1, 0.0, train, False, True)
    return outputs, h.transpose(0, 1)
