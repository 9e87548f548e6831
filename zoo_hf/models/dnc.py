"""The simplified DNC, an LSTM with a memory that it addresses by content: the scan.

    x̂ = LN([e, r])                                              the token's embedding and what was last read
    h, c ← LSTM(x̂, (h, c))                                      pre-activations W_in x̂ + R h + b
    k_r, k_w, a, f, s = W_i LN(h) + b_i                          read key, write key, add, erase, strength
    w = σ(s) softmax(LN_w(k_w) · LN(M))                          how much each slot is written
    M ← M∘(1 − w σ(f)ᵀ) + w tanh(a)ᵀ
    r = softmax(LN_r(k_r) · LN(M)) M                             read after the write

LN has a weight and a bias, each of its own, except LN(M): a weight there would only multiply the keys', and a bias
would add the same number to every slot's score.

Letters: B sequences, T tokens of each, E embedding width, H units of the LSTM, N slots of W numbers in the memory M.

References:
    Alex Graves et al., "Hybrid computing using a neural network with dynamic external memory", Nature 538, 2016, from
    which content addressing, erase and add are taken.
    Francois Chaubard, Mykel Kochenderfer, "Scaling Recurrent Neural Networks to a Billion Parameters with Zero-Order
    Optimization", 2025, arXiv:2505.17852, for the simplification.
"""

from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


EPSILON = 1e-5  # added to the variance in every LN, as torch's default


class DNCState(NamedTuple):
    """What a sequence carries from token to token, of the dtype of the whole computation outside of products.

    Args:
        h: (B, H), output of the LSTM.
        c: (B, H), cell of the LSTM.
        read: (B, W), the vector r that was read last.
        memory: M, (B, N, W).
    """

    h: Tensor
    c: Tensor
    read: Tensor
    memory: Tensor


class DNCWeights(NamedTuple):
    """The parameters.

    Args:
        input_norm_weight: (E+W), of LN([e, r]).
        input_norm_bias: (E+W).
        input_weight: W_in, (4H, E+W), gates in torch's order i, f, g, o.
        recurrent_weight: R, (4H, H).
        bias: b, (4H).
        hidden_norm_weight: (H), of LN(h).
        hidden_norm_bias: (H).
        interface_weight: W_i, (4W+1, H), for k_r, k_w, a, f and s in this order.
        interface_bias: b_i, (4W+1).
        key_norm_weight: (2, W), of LN_r and LN_w.
        key_norm_bias: (2, W).
    """

    input_norm_weight: Tensor
    input_norm_bias: Tensor
    input_weight: Tensor
    recurrent_weight: Tensor
    bias: Tensor
    hidden_norm_weight: Tensor
    hidden_norm_bias: Tensor
    interface_weight: Tensor
    interface_bias: Tensor
    key_norm_weight: Tensor
    key_norm_bias: Tensor


class DNC(nn.Module):
    """The recurrence.

    Args:
        input_size: E, width of the inputs.
        hidden_size: H, units of the LSTM.
        memory_width: W, numbers in a slot of the memory. The weights do not depend on the number of slots.
    """

    matrices = ("input_weight", "recurrent_weight", "interface_weight")  # for low-rank directions

    def __init__(self, input_size: int, hidden_size: int, memory_width: int):
        super().__init__()
        joint, gates, interface = input_size + memory_width, 4 * hidden_size, 4 * memory_width + 1
        self.input_norm_weight = nn.Parameter(torch.empty(joint))
        self.input_norm_bias = nn.Parameter(torch.empty(joint))
        self.input_weight = nn.Parameter(torch.empty(gates, joint))
        self.recurrent_weight = nn.Parameter(torch.empty(gates, hidden_size))
        self.bias = nn.Parameter(torch.empty(gates))
        self.hidden_norm_weight = nn.Parameter(torch.empty(hidden_size))
        self.hidden_norm_bias = nn.Parameter(torch.empty(hidden_size))
        self.interface_weight = nn.Parameter(torch.empty(interface, hidden_size))
        self.interface_bias = nn.Parameter(torch.empty(interface))
        self.key_norm_weight = nn.Parameter(torch.empty(2, memory_width))
        self.key_norm_bias = nn.Parameter(torch.empty(2, memory_width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Matrices Xavier-uniform, each part of the interface by itself; biases 0; norms' weights 1, the keys' 1/√W.

        From equal slots, such as an empty memory, keys have no effect. From others, keys of unit variance would make
        scores of order √W, which at W = 128 let rounding errors grow to the size of the outputs within 64 tokens.
        """
        width, size = self.key_norm_weight.shape[1], self.hidden_norm_weight.numel()
        nn.init.xavier_uniform_(self.input_weight)
        nn.init.xavier_uniform_(self.recurrent_weight)
        bound = (6 / (size + width)) ** 0.5
        # as a whole: when some of a model's parameters are loaded, transformers spares those, but not views of them
        nn.init.uniform_(self.interface_weight, -bound, bound)
        nn.init.ones_(self.input_norm_weight)
        nn.init.ones_(self.hidden_norm_weight)
        nn.init.constant_(self.key_norm_weight, width**-0.5)
        for bias in (self.input_norm_bias, self.bias, self.hidden_norm_bias, self.interface_bias, self.key_norm_bias):
            nn.init.zeros_(bias)

    def forward(self, inputs: Tensor, state: DNCState, real: Tensor | None = None) -> tuple[Tensor, DNCState]:
        """Outputs and final state, see `dnc_scan`; under autocast the products with weights are in its dtype."""
        weights = DNCWeights(
            self.input_norm_weight,
            self.input_norm_bias,
            self.input_weight,
            self.recurrent_weight,
            self.bias,
            self.hidden_norm_weight,
            self.hidden_norm_bias,
            self.interface_weight,
            self.interface_bias,
            self.key_norm_weight,
            self.key_norm_bias,
        )
        return dnc(inputs, state, weights, real)


def dnc(inputs: Tensor, state: DNCState, weights: DNCWeights, real: Tensor | None = None) -> tuple[Tensor, DNCState]:
    """`dnc_scan` in the state's dtype, but for products with weights, which are in theirs, or in autocast's."""
    device, dtype, products = inputs.device.type, state.memory.dtype, weights.input_weight.dtype
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if autocast:
        products = torch.get_autocast_dtype(device)
    cast = {name: w.to(dtype if "norm" in name else products) for name, w in weights._asdict().items()}
    # the memory is a sum over all tokens: autocast would round it, and copy it, at each of them
    with torch.autocast(device, enabled=False) if autocast else nullcontext():
        return dnc_scan(inputs.to(dtype), state, DNCWeights(**cast), real)


def dnc_scan(
    inputs: Tensor, state: DNCState, weights: DNCWeights, real: Tensor | None = None
) -> tuple[Tensor, DNCState]:
    """[h, r] after every token, (B, T, H+W), and the final state, one token after the other.

    W_in e could be computed for all tokens before, and LN's mean and deviation put in later: below H = 512 the small
    operations cost more than that saves, and above it the memory takes most of the time. LN(M) is made once a token:
    what it reads by, the next one writes by.

    Args:
        inputs: (B, T, E), of the state's dtype, as the weights of norms are; those of products may have another.
        state: that before the first token; not modified.
        weights: shapes as in `DNCWeights`.
        real: (B, T) booleans, where False holds the state; None if all tokens are real.
    """
    w, width, outputs = weights, state.read.shape[1], []
    addresses = layer_norm(state.memory)  # (B, N, W)
    for t, token in enumerate(inputs.unbind(1)):
        h, c = lstm_step(torch.cat([token, state.read], dim=-1), state, weights)
        normed = layer_norm(h, w.hidden_norm_weight, w.hidden_norm_bias)
        interface = product(normed, w.interface_weight, w.interface_bias)  # (B, 4W+1)
        read_key, write_key, add, gates = interface.split([width, width, width, width + 1], dim=-1)
        erase, strength = gates.sigmoid().split([width, 1], dim=-1)
        if real is not None:
            strength = strength * real[:, t, None]  # nothing is written: holds the memory, exactly
        write_key = layer_norm(write_key, w.key_norm_weight[1], w.key_norm_bias[1])  # (B, W)
        written = strength * torch.softmax(times(addresses.mT, write_key), dim=-1)  # (B, N)
        memory = overwritten(state.memory, written, erase, add.tanh())
        addresses = layer_norm(memory)
        read_key = layer_norm(read_key, w.key_norm_weight[0], w.key_norm_bias[0])  # (B, W)
        r = times(memory, torch.softmax(times(addresses.mT, read_key), dim=-1))  # (B, W)
        if real is not None:
            h, c, r = (torch.where(real[:, t, None], new, old) for new, old in zip((h, c, r), state[:3], strict=True))
        state = DNCState(h, c, r, memory)
        outputs.append(torch.cat([h, r], dim=-1))
    return torch.stack(outputs, dim=1), state


def lstm_step(x: Tensor, state: DNCState, weights: DNCWeights) -> tuple[Tensor, Tensor]:
    """h and c, (B, H), from the token and what was read before it, (B, E+W)."""
    x = layer_norm(x, weights.input_norm_weight, weights.input_norm_bias)
    pre = product(x, weights.input_weight, weights.bias) + product(state.h, weights.recurrent_weight)  # (B, 4H)
    i, f, _, o = pre.sigmoid().chunk(4, dim=-1)  # (B, H) each
    g = pre.chunk(4, dim=-1)[2].tanh()
    c = torch.addcmul(f * state.c, i, g)
    return o * c.tanh(), c


def product(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """inputs weightᵀ + bias, computed in the weight's dtype and returned in the inputs'."""
    return F.linear(inputs.to(weight.dtype), weight, bias).to(inputs.dtype)


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """LN over the last dimension, finite for zeros."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, EPSILON)


def overwritten(memory: Tensor, written: Tensor, erase: Tensor, add: Tensor) -> Tensor:
    """M∘(1 − w eᵀ) + w aᵀ, (B, N, W), from w (B, N), e and a (B, W), as M + w (a − e∘M): in two passes over M."""
    change = torch.addcmul(add.unsqueeze(1), erase.unsqueeze(1), memory, value=-1)
    return torch.addcmul(memory, written.unsqueeze(2), change)


def times(matrices: Tensor, rows: Tensor) -> Tensor:
    """Each row (B, n) times its matrix (B, n, m): (B, m)."""
    # on a CPU a matrix times a column, which would be the same, takes seven times as long
    return torch.bmm(rows.unsqueeze(1), matrices).squeeze(1)
