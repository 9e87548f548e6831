"""Layout of recurrent layers whose units are split into heads, and whose recurrent matrix is therefore block-diagonal.

Letters: B sequences, T tokens of each, H hidden units, N heads of D = H/N units, G gates, S slots of the state.
"""

import torch
from torch import Tensor


def split_heads(inputs: Tensor, gates: int, heads: int) -> Tensor:
    """(B, T, G·H) to (T, N, B, G·D): one contiguous block of pre-activations a time step."""
    return inputs.unflatten(-1, (gates, heads, -1)).permute(1, 3, 0, 2, 4).flatten(-2)


def merge_heads(outputs: list[Tensor]) -> Tensor:
    """T tensors (N, B, D) to (B, T, H)."""
    return torch.stack(outputs).permute(2, 0, 1, 3).flatten(-2)


def split_state(state: Tensor, heads: int) -> tuple[Tensor, ...]:
    """(B, S, H) to S tensors (N, B, D)."""
    return state.unflatten(-1, (heads, -1)).permute(1, 2, 0, 3).contiguous().unbind(0)


def recurrent_blocks(recurrent_weight: Tensor) -> Tensor:
    """(G, N, D, D) [gate, head, out, in] to (N, D, G·D): all gates of a step in one batched product h @ blocks."""
    return recurrent_weight.permute(1, 3, 0, 2).flatten(-2)
