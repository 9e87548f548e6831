"""The LSTM: the plain scan, torch's fused kernel, and the choice between them and others.

    i, f, o = σ(pre_i), σ(pre_f), σ(pre_o)    g = tanh(pre_g)    pre = W_in x + R h + b
    c ← f∘c + i∘g                              h ← o∘tanh(c)

Letters: B sequences, T tokens of each, N heads of D = H/N units, G = 4 gates in torch's order i, f, g, o.

References:
    Sepp Hochreiter, Jürgen Schmidhuber, "Long Short-Term Memory", Neural Computation 9(8), 1997.
    Felix Gers, Jürgen Schmidhuber, Fred Cummins, "Learning to Forget: Continual Prediction with LSTM", Neural
    Computation 12(10), 2000.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends import chosen, preferred
from .heads import merge_heads, recurrent_blocks, split_heads, split_state
from .padding import put_back, to_front
from .recurrent_layer import LayerWeights, RecurrentLayer


# measured on a CPU
TOKENS_FOR_KERNELS = 256  # in a batch: fewer do not pay for a call a head, for 2 to 64 heads
TOKENS_TO_PACK = 3  # of a text: for fewer, oneDNN's laying out of R anew takes longer than reading it
SATURATED = 1e4  # σ(±SATURATED) is 1 and 0 in every floating dtype


class LSTM(RecurrentLayer):
    """One layer, see `RecurrentLayer`; its state is h and c."""

    gates = 4
    slots = 2
    learnable_slots = 2

    def forward(self, inputs: Tensor, state: Tensor, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Outputs and final state, see `lstm_scan`."""
        return lstm(inputs, state, LayerWeights(self.input_weight, self.recurrent_weight, self.bias), real)


def lstm(inputs: Tensor, state: Tensor, weights: LayerWeights, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`lstm_scan` by the fastest way there is."""
    own = {"torch": lstm_fused, "plain": lstm_scan}
    return chosen("lstm", own, lstm_forms(inputs, weights), inputs.device)(inputs, state, weights, real)


def lstm_forms(inputs: Tensor, weights: LayerWeights) -> list[str]:
    """See `preferred`; torch's kernel takes one head, on a CPU one after the other."""
    one_head, on_cpu, tokens = weights.recurrent.shape[1] == 1, inputs.device.type == "cpu", inputs.shape[:2]
    many = tokens.numel() >= TOKENS_FOR_KERNELS if not one_head else tokens[1] >= TOKENS_TO_PACK
    pays = many if on_cpu else one_head
    return preferred(["torch", "plain"] if pays else ["plain", "torch"], inputs, weights.recurrent)


def lstm_scan(
    inputs: Tensor, state: Tensor, weights: LayerWeights, real: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Outputs (B, T, H) and final state (B, 2, H) of one layer, one token after the other.

    Args:
        inputs: (B, T, input_size).
        state: (B, 2, H), h and c before the first token; not modified.
        weights: shapes as in `LayerWeights`.
        real: (B, T) booleans, where False holds the state; None if all tokens are real.
    """
    gates, heads = weights.recurrent.shape[:2]
    pre = split_heads(F.linear(inputs, weights.input, weights.bias), gates, heads)  # (T, N, B, 4D)
    blocks = recurrent_blocks(weights.recurrent)  # (N, D, 4D)
    h, c = split_state(state, heads)  # (N, B, D) each
    outputs = []
    for t in range(inputs.shape[1]):
        gates_now = torch.baddbmm(pre[t], h, blocks)  # (N, B, 4D)
        # σ of g as well, which is not used: one call over neighbouring numbers is faster than three over others
        (i, f, _, o), g = gates_now.sigmoid().chunk(4, dim=-1), gates_now.chunk(4, dim=-1)[2]  # (N, B, D) each
        new_c = torch.addcmul(f * c, i, g.tanh())
        new_h = o * new_c.tanh()
        if real is None:
            h, c = new_h, new_c
        else:
            keep = real[:, t, None]  # (B, 1)
            h, c = torch.where(keep, new_h, h), torch.where(keep, new_c, c)
        outputs.append(h)
    return merge_heads(outputs), merge_heads([h, c])


@torch.compiler.disable  # left whole: inductor would unroll it over time, 40 s of compiling for 16 tokens
def lstm_fused(
    inputs: Tensor, state: Tensor, weights: LayerWeights, real: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`lstm_scan` by torch's kernel (oneDNN on a CPU, cuDNN on a GPU), each head as an LSTM of its own."""
    before = state[:, 0]  # h
    if real is not None:
        inputs, weights = with_held_cells(inputs, weights, real)
    heads = weights.recurrent.shape[1]
    if heads == 1:
        outputs, state = torchs_lstm(inputs, state, weights)
    else:
        states = state.unflatten(-1, (heads, -1)).unbind(2)  # (B, 2, D) each
        runs = [torchs_lstm(inputs, own, weights_of_head(weights, n)) for n, own in enumerate(states)]
        outputs, state = (torch.cat(parts, dim=-1) for parts in zip(*runs, strict=True))
    if real is not None:
        outputs = put_back(outputs, before, real)
        state = torch.stack([outputs[:, -1], state[:, 1]], dim=1)
    return outputs, state


def torchs_lstm(inputs: Tensor, state: Tensor, weights: LayerWeights) -> tuple[Tensor, Tensor]:
    """Outputs (B, T, H) and final state (B, 2, H) of one head."""
    flat = [weights.input, weights.recurrent.flatten(0, 2), weights.bias, torch.zeros_like(weights.bias)]
    h, c = state.transpose(0, 1).contiguous().unsqueeze(1).unbind(0)  # (1, B, H) each
    train = torch.is_grad_enabled()  # keeps what a backward pass needs
    outputs, h, c = torch.lstm(inputs, (h, c), flat, True, 1, 0.0, train, False, True)
    return outputs, torch.cat([h, c]).transpose(0, 1)


def weights_of_head(weights: LayerWeights, head: int) -> LayerWeights:
    """The weights of one head, as those of a layer with D units."""
    gates, heads = weights.recurrent.shape[:2]
    return LayerWeights(
        weights.input.unflatten(0, (gates, heads, -1))[:, head].flatten(0, 1),  # (4D, input_size)
        weights.recurrent[:, head : head + 1],  # (4, 1, D, D)
        weights.bias.view(gates, heads, -1)[:, head].flatten(),  # (4D)
    )


def with_held_cells(inputs: Tensor, weights: LayerWeights, real: Tensor) -> tuple[Tensor, LayerWeights]:
    """Inputs with all padding on the right and one more feature, that of padding, and W_in with its column.

    The column opens the forget gate and shuts the input gate: a kernel that knows of no mask holds c on padding.
    """
    there, _ = to_front(real)
    padding = (~real).take_along_dim(there, dim=1)[..., None]  # (B, T, 1)
    inputs = torch.cat([inputs.take_along_dim(there[..., None], dim=1), padding.to(inputs.dtype)], dim=-1)
    column = weights.bias.new_zeros(4, len(weights.bias) // 4)
    column[0], column[1] = -SATURATED, SATURATED
    return inputs, weights._replace(input=torch.cat([weights.input, column.view(-1, 1)], dim=1))
