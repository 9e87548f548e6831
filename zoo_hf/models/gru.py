"""The GRU: the plain scan, torch's fused kernel, and the choice between them and others.

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

from .backends import chosen, preferred
from .heads import merge_heads, split_heads, split_state
from .padding import put_back, to_front
from .recurrent_layer import RecurrentLayer
from .recurrent_product import packing_pays, recurrent_product


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


class GRU(RecurrentLayer):
    """One layer, see `RecurrentLayer`; its state is h."""

    gates = 3
    slots = 1
    learnable_slots = 1

    candidate_bias: nn.Parameter

    @classmethod
    def shapes(cls, input_size: int, hidden_size: int, num_heads: int) -> dict[str, tuple[int, ...]]:
        """The parameters and their shapes, see `GRUWeights`."""
        return {**super().shapes(input_size, hidden_size, num_heads), "candidate_bias": (hidden_size,)}

    def forward(self, inputs: Tensor, state: Tensor, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Outputs and final state, see `gru_scan`."""
        weights = GRUWeights(self.input_weight, self.recurrent_weight, self.bias, self.candidate_bias)
        return gru(inputs, state, weights, real)


def gru(inputs: Tensor, state: Tensor, weights: GRUWeights, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`gru_scan` by the fastest way there is."""
    own = {"torch": gru_fused, "plain": gru_scan}
    return chosen("gru", own, gru_forms(inputs, weights), inputs.device)(inputs, state, weights, real)


def gru_forms(inputs: Tensor, weights: GRUWeights) -> list[str]:
    """See `preferred`; torch's kernel takes one head, and pays if that is not large."""
    own = ["plain"]
    if weights.recurrent.shape[1] == 1:
        own = ["plain", "torch"] if packing_pays(inputs, weights.recurrent) else ["torch", "plain"]
    return preferred(own, inputs, weights.recurrent)


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
    product = recurrent_product(inputs, weights.recurrent)
    recurrent_bias = F.pad(weights.candidate_bias.view(heads, 1, size), (2 * size, 0)).expand_as(pre[0])  # (N, B, 3D)
    (h,) = split_state(state, heads)  # (N, B, D)
    outputs = []
    for t in range(inputs.shape[1]):
        input_gates, input_n = pre[t].split([2 * size, size], dim=-1)  # (N, B, 2D), (N, B, D)
        recurrent_gates, recurrent_n = product(recurrent_bias, h).split([2 * size, size], dim=-1)
        r, z = (input_gates + recurrent_gates).sigmoid().chunk(2, dim=-1)  # (N, B, D) each
        n = torch.addcmul(input_n, r, recurrent_n).tanh()
        new_h = torch.addcmul(n, z, h - n)  # (1 − z)∘n + z∘h
        h = new_h if real is None else torch.where(real[:, t, None], new_h, h)
        outputs.append(h)
    return merge_heads(outputs), merge_heads([h])


@torch.compiler.disable  # left whole: inductor would unroll it over time, 50 s of compiling for 16 tokens
def gru_fused(inputs: Tensor, state: Tensor, weights: GRUWeights, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`gru_scan` for one head by torch's kernel (cuDNN on a GPU)."""
    if real is not None:
        there, _ = to_front(real)
        inputs = inputs.take_along_dim(there[..., None], dim=1)
    recurrent_bias = F.pad(weights.candidate_bias, (2 * weights.candidate_bias.numel(), 0))
    flat = [weights.input, weights.recurrent.flatten(0, 2), weights.bias, recurrent_bias]
    train = torch.is_grad_enabled()  # keeps what a backward pass needs
    outputs, _ = torch.gru(inputs, state.transpose(0, 1).contiguous(), flat, True, 1, 0.0, train, False, True)
    if real is not None:
        outputs = put_back(outputs, state[:, 0], real)
    return outputs, outputs[:, -1:]
