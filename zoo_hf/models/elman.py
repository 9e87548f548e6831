"""The simple recurrent layer of Elman: the plain scan, torch's fused kernel, and the choice between them and others.

    h ← tanh(W_in x + R h + b)

Letters: B sequences, T tokens of each, N heads of D = H/N units.

References:
    Jeffrey Elman, "Finding Structure in Time", Cognitive Science 14(2), 1990.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends import chosen, preferred
from .heads import merge_heads, split_heads, split_state
from .padding import put_back, to_front
from .recurrent_layer import LayerWeights, RecurrentLayer
from .recurrent_product import packing_pays, recurrent_product


class Elman(RecurrentLayer):
    """One layer, see `RecurrentLayer`; its state is h."""

    gates = 1
    slots = 1
    learnable_slots = 1

    def forward(self, inputs: Tensor, state: Tensor, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Outputs and final state, see `elman_scan`."""
        return elman(inputs, state, LayerWeights(self.input_weight, self.recurrent_weight, self.bias), real)


def elman(inputs: Tensor, state: Tensor, weights: LayerWeights, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`elman_scan` by the fastest way there is."""
    own = {"torch": elman_fused, "plain": elman_scan}
    return chosen("elman", own, elman_forms(inputs, weights), inputs.device)(inputs, state, weights, real)


def elman_forms(inputs: Tensor, weights: LayerWeights) -> list[str]:
    """See `preferred`; torch's kernel takes one head, and pays if that is not large."""
    own = ["plain"]
    if weights.recurrent.shape[1] == 1:
        own = ["plain", "torch"] if packing_pays(inputs, weights.recurrent) else ["torch", "plain"]
    return preferred(own, inputs, weights.recurrent)


def elman_scan(
    inputs: Tensor, state: Tensor, weights: LayerWeights, real: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Outputs (B, T, H) and final state (B, 1, H) of one layer, one token after the other.

    Args:
        inputs: (B, T, input_size).
        state: (B, 1, H), h before the first token; not modified.
        weights: shapes as in `LayerWeights`.
        real: (B, T) booleans, where False holds the state; None if all tokens are real.
    """
    gates, heads = weights.recurrent.shape[:2]
    pre = split_heads(F.linear(inputs, weights.input, weights.bias), gates, heads)  # (T, N, B, D)
    product = recurrent_product(inputs, weights.recurrent)
    (h,) = split_state(state, heads)  # (N, B, D)
    outputs = []
    for t in range(inputs.shape[1]):
        new_h = product(pre[t], h).tanh()
        h = new_h if real is None else torch.where(real[:, t, None], new_h, h)
        outputs.append(h)
    return merge_heads(outputs), merge_heads([h])


@torch.compiler.disable  # left whole: inductor would unroll it over time
def elman_fused(
    inputs: Tensor, state: Tensor, weights: LayerWeights, real: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`elman_scan` for one head by torch's kernel (cuDNN on a GPU)."""
    if real is not None:
        there, _ = to_front(real)
        inputs = inputs.take_along_dim(there[..., None], dim=1)
    no_bias = torch.zeros_like(weights.bias)  # torch has two
    flat = [weights.input, weights.recurrent.flatten(0, 2), weights.bias, no_bias]
    train = torch.is_grad_enabled()  # keeps what a backward pass needs
    outputs, _ = torch.rnn_tanh(inputs, state.transpose(0, 1).contiguous(), flat, True, 1, 0.0, train, False, True)
    if real is not None:
        outputs = put_back(outputs, state[:, 0], real)
    return outputs, outputs[:, -1:]
