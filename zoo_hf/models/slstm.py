"""The sLSTM of xLSTM: an LSTM whose input gate is an exponential, with a normaliser and a stabiliser.

    i = pre_i    log f = log σ(pre_f)    z = tanh(pre_z)    o = σ(pre_o)    pre = W_in x + R h + b
    c ← f∘c + exp(i)∘z    n ← f∘n + exp(i)    h ← o∘c/n

exp(i) may overflow, so c and n are kept divided by exp(m), which cancels in c/n:

    m ← max(log f + m, i)    c ← exp(log f + m₋ − m)∘c + exp(i − m)∘z    n ← exp(log f + m₋ − m)∘n + exp(i − m)

The larger of the two exponentials is 1, so n ≥ 1 from the first token on. Before it c = n = 0, and m has no meaning:
n = 0 says so, and m may hold any number.

Letters: B sequences, T tokens of each, N heads of D = H/N units, G = 4 gates in the order i, f, z, o.

References:
    Maximilian Beck et al., "xLSTM: Extended Long Short-Term Memory", 2024, arXiv:2405.04517 (equations 8 to 17, with
    the sigmoid forget gate).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends import chosen, preferred
from .heads import merge_heads, split_heads, split_state
from .recurrent_layer import LayerWeights, RecurrentLayer
from .recurrent_product import recurrent_product


class SLSTM(RecurrentLayer):
    """One layer, see `RecurrentLayer`; its state is h, c, n and m, in float32 at least."""

    gates = 4
    slots = 4
    learnable_slots = 2
    exact_state = True  # bfloat16 would stop counting at n = 256
    other_slots = (1.0, 0.0)  # n = 1, m = 0: a learned c counts as one token whose input gate was exp(0)

    def forward(self, inputs: Tensor, state: Tensor, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Outputs and final state, see `slstm_scan`."""
        return slstm(inputs, state, LayerWeights(self.input_weight, self.recurrent_weight, self.bias), real)


def slstm(inputs: Tensor, state: Tensor, weights: LayerWeights, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`slstm_scan` by the fastest way there is."""
    own = {"plain": slstm_scan}
    return chosen("slstm", own, slstm_forms(inputs, weights), inputs.device)(inputs, state, weights, real)


def slstm_forms(inputs: Tensor, weights: LayerWeights) -> list[str]:
    """See `preferred`."""
    return preferred(["plain"], inputs, weights.recurrent)


def slstm_scan(
    inputs: Tensor, state: Tensor, weights: LayerWeights, real: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Outputs (B, T, H) and final state (B, 4, H) of one layer, one token after the other.

    Args:
        inputs: (B, T, input_size).
        state: (B, 4, H), h, c, n and m before the first token, zeros at the start; not modified.
        weights: shapes as in `LayerWeights`.
        real: (B, T) booleans, where False holds the state; None if all tokens are real.
    """
    gates, heads = weights.recurrent.shape[:2]
    pre = split_heads(F.linear(inputs, weights.input, weights.bias), gates, heads)  # (T, N, B, 4D)
    product = recurrent_product(inputs, weights.recurrent)
    state = state.to(torch.promote_types(pre.dtype, torch.float32))
    h, c, n, m = split_state(state, heads)  # (N, B, D) each
    m = m.masked_fill(n == 0, -torch.inf)  # so that the first token's m is its own i
    outputs = []
    for t in range(inputs.shape[1]):
        gate = product(pre[t], h.to(pre.dtype)).to(h.dtype)  # (N, B, 4D)
        i, f, z, o = gate.chunk(4, dim=-1)  # (N, B, D) each
        kept = F.logsigmoid(f) + m
        new_m = torch.maximum(kept, i)
        keep, write = (kept - new_m).exp(), (i - new_m).exp()
        new_c = torch.addcmul(keep * c, write, z.tanh())
        new_n = torch.addcmul(write, keep, n)
        new_h = o.sigmoid() * (new_c / new_n)
        if real is None:
            h, c, n, m = new_h, new_c, new_n, new_m
        else:
            now = real[:, t, None]  # (B, 1)
            h, c = torch.where(now, new_h, h), torch.where(now, new_c, c)
            n, m = torch.where(now, new_n, n), torch.where(now, new_m, m)
        outputs.append(h)
    m = m.masked_fill(n == 0, 0)  # rows that saw no token yet: a state is finite
    return merge_heads(outputs).to(pre.dtype), merge_heads([h, c, n, m])
