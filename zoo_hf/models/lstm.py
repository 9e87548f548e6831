"""The LSTM: the plain scan, torch's fused kernel, and the choice between them.

    i, f, o = σ(pre_i), σ(pre_f), σ(pre_o)    g = tanh(pre_g)    pre = W_in x + R h + b
    c ← f∘c + i∘g                              h ← o∘tanh(c)

Letters: B sequences, T tokens of each, N heads of D = H/N units, G = 4 gates in torch's order i, f, g, o.

References:
    Sepp Hochreiter, Jürgen Schmidhuber, "Long Short-Term Memory", Neural Computation 9(8), 1997.
    Felix Gers, Jürgen Schmidhuber, Fred Cummins, "Learning to Forget: Continual Prediction with LSTM", Neural
    Computation 12(10), 2000.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .recurrent import merge_heads, recurrent_blocks, split_heads


class LSTMWeights(NamedTuple):
    """The parameters of one layer.

    Args:
        input: W_in, (4H, input_size).
        recurrent: R, (4, N, D, D) [gate, head, out, in]; for N = 1 viewed as (4H, H) it is torch's `weight_hh_l0`.
        bias: b, (4H): the sum of torch's two.
    """

    input: Tensor
    recurrent: Tensor
    bias: Tensor


class LSTM(nn.Module):
    """One layer.

    Args:
        input_size: width of the inputs.
        hidden_size: H, width of the outputs and of both slots of the state.
        num_heads: N, blocks of the recurrent matrix; divides H.
    """

    gates = 4
    slots = 2  # h, c

    def __init__(self, input_size: int, hidden_size: int, num_heads: int = 1):
        super().__init__()
        head_size = hidden_size // num_heads
        self.input_weight = nn.Parameter(torch.empty(self.gates * hidden_size, input_size))
        self.recurrent_weight = nn.Parameter(torch.empty(self.gates, num_heads, head_size, head_size))
        self.bias = nn.Parameter(torch.empty(self.gates * hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform in ±1/√H, as torch."""
        bound = (self.bias.numel() // self.gates) ** -0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, inputs: Tensor, state: Tensor, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Outputs and final state, see `lstm_scan`."""
        return lstm(inputs, state, LSTMWeights(self.input_weight, self.recurrent_weight, self.bias), real)


def lstm(inputs: Tensor, state: Tensor, weights: LSTMWeights, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`lstm_scan` by the fastest way there is: torch's kernel for one head and no padding, otherwise the scan."""
    transformed = torch._C._are_functorch_transforms_active()  # torch.lstm has no batching rule for torch.func.vmap
    if real is None and weights.recurrent.shape[1] == 1 and not transformed:
        return lstm_fused(inputs, state, weights)
    return lstm_scan(inputs, state, weights, real)


def lstm_scan(
    inputs: Tensor, state: Tensor, weights: LSTMWeights, real: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Outputs (B, T, H) and final state (B, 2, H) of one layer, one token after the other.

    Args:
        inputs: (B, T, input_size).
        state: (B, 2, H), h and c before the first token; not modified.
        weights: shapes as in `LSTMWeights`.
        real: (B, T) booleans, where False holds the state; None if all tokens are real.
    """
    gates, heads, size, _ = weights.recurrent.shape
    pre = split_heads(F.linear(inputs, weights.input, weights.bias), gates, heads)  # (T, N, B, 4D)
    blocks = recurrent_blocks(weights.recurrent)  # (N, D, 4D)
    h, c = state.unflatten(-1, (heads, size)).permute(1, 2, 0, 3).unbind(0)  # (N, B, D) each
    outputs = []
    for t in range(inputs.shape[1]):
        i, f, g, o = torch.baddbmm(pre[t], h, blocks).chunk(4, dim=-1)  # (N, B, D) each
        new_c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        new_h = o.sigmoid() * new_c.tanh()
        if real is None:
            h, c = new_h, new_c
        else:
            keep = real[:, t, None]  # (B, 1)
            h, c = torch.where(keep, new_h, h), torch.where(keep, new_c, c)
        outputs.append(h)
    return merge_heads(outputs), merge_heads([h, c])


@torch.compiler.disable  # left whole: inductor would unroll it over time, 40 s of compiling for 16 tokens
def lstm_fused(inputs: Tensor, state: Tensor, weights: LSTMWeights) -> tuple[Tensor, Tensor]:
    """`lstm_scan` for one head and no padding, by torch's kernel (oneDNN on a CPU, cuDNN on a GPU)."""
    flat = [weights.input, weights.recurrent.flatten(0, 2), weights.bias, torch.zeros_like(weights.bias)]
    h, c = state.unsqueeze(0).unbind(2)  # (1, B, H) each
    train = torch.is_grad_enabled()  # keeps what a backward pass needs
    outputs, h, c = torch.lstm(inputs, (h, c), flat, True, 1, 0.0, train, False, True)
    return outputs, torch.cat([h, c]).transpose(0, 1)
