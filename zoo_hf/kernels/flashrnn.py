"""FlashRNN's kernels for single models, where its package is installed; it is optional and has its own licence.

Letters: T tokens of each of B sequences, N heads of D units, H = N·D, G gates, S slots of the state.

References:
    Korbinian Pöppel, Maximilian Beck, Sepp Hochreiter, "FlashRNN: I/O-Aware Optimization of Traditional RNNs on modern
    hardware", 2024, arXiv:2412.07752.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


FAR = -1e4  # as m where n = 0: exp(FAR) is 0, while FlashRNN knows of no m = −∞
NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def scan(cell: str, inputs: Tensor, state: Tensor, weights: Any, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Outputs (B, T, H) and final state (B, S, H) of one layer, as the cell's plain scan has them; arguments are its.

    FlashRNN keeps the state in one dtype with all else, so that the sLSTM, which counts, runs in float32.
    """
    from flashrnn import flashrnn

    pre = F.linear(inputs, weights.input, weights.bias)
    dtype = torch.float32 if cell == "slstm" else pre.dtype
    there, seen = (None, None) if real is None else in_front(real)
    moved = pre if there is None else pre.take_along_dim(there[..., None], dim=1)
    before = state_before(cell, state, weights.recurrent.shape[1])  # (S, B, 1, N, D)
    states, _ = flashrnn(
        *parameters(cell, moved.to(dtype), weights),
        states=before.to(dtype),
        function=cell,
        backend="cuda_fused" if pre.is_cuda else "vanilla",
        dtype=NAMES[dtype],
    )  # (S, B, T, N, D)
    states = torch.cat([before.to(dtype), states], dim=2)
    if seen is None:
        outputs, final = states[0, :, 1:], states[:, :, -1]
    else:  # a masked position repeats what is after the real token before it
        states = states.take_along_dim(seen[None, :, :, None, None], dim=2)  # (S, B, T, N, D)
        outputs, final = states[0], states[:, :, -1]
    final = final.flatten(-2).transpose(0, 1)  # (B, S, H)
    if cell == "slstm":
        final = torch.cat([final[:, :3], final[:, 3:].masked_fill(final[:, 2:3] == 0, 0)], dim=1)
    kept = torch.float32 if cell == "slstm" else state.dtype
    return outputs.flatten(-2).to(pre.dtype), final.to(kept)


def in_front(real: Tensor) -> tuple[Tensor, Tensor]:
    """Places (B, T) that bring a row's real tokens to its front, and of how many of them each position has seen."""
    return (~real).byte().argsort(dim=1, stable=True), real.cumsum(1)


def state_before(cell: str, state: Tensor, heads: int) -> Tensor:
    """(B, S, H) as FlashRNN has it, (S, B, 1, N, D)."""
    slots = state.transpose(0, 1).unflatten(-1, (heads, -1)).unsqueeze(2)
    if cell != "slstm":
        return slots
    return torch.cat([slots[:3], slots[3:].masked_fill(slots[2:3] == 0, FAR)])


def parameters(cell: str, pre: Tensor, weights: Any) -> tuple[Tensor, Tensor, Tensor]:
    """W x (B, T, G, N, D), R (G, N, D, D) and b (G, N, D) as FlashRNN has them, from pre = W x + b, (B, T, G·H).

    Its GRU has R n before r and z, and four biases: that of R n first, then those of r, z and n.
    """
    gates, heads, size, _ = weights.recurrent.shape
    inputs, recurrent = pre.unflatten(-1, (gates, heads, size)), weights.recurrent.to(pre.dtype)
    bias = pre.new_zeros(gates, heads, size)
    if cell == "gru":
        recurrent = recurrent.roll(1, dims=0)
        bias = torch.cat([weights.candidate_bias.view(1, heads, size).to(pre.dtype), bias])
    return inputs, recurrent, bias
