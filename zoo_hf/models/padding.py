"""Padding in recurrent models: a masked position holds the state. Letters: B sequences, T tokens of each."""

import torch
from torch import Tensor


def real_tokens(attention_mask: Tensor) -> Tensor | None:
    """Where tokens are real, (B, T) booleans, or None if all are: the one device synchronisation of a chunk."""
    return None if attention_mask.all() else attention_mask.bool()


def to_front(real: Tensor) -> tuple[Tensor, Tensor]:
    """Places (B, T) that bring each row's real tokens to its front, in order, and places that bring outputs back.

    `x.take_along_dim(there[..., None], 1)` has all padding on the right, after `real.sum(1)` tokens of a row. Back at
    its place, a masked position repeats the output of the real token before it, if there is one.
    """
    there = (~real).byte().argsort(dim=1, stable=True)
    return there, (real.cumsum(1) - 1).clamp_(min=0)


def repeat_last(outputs: Tensor, before: Tensor | None, real: Tensor) -> Tensor:
    """Outputs (B, T, W) with every masked position's replaced by that of the real token before it.

    Where there is none, it is `before` (B, 1, W), or else the outputs' own first.
    """
    places = torch.arange(1, real.shape[1] + 1, device=real.device)
    latest = torch.where(real, places, 0).cummax(dim=1).values  # (B, T), 0 where there is none
    before = outputs[:, :1] if before is None else before
    return torch.cat([before, outputs], dim=1).take_along_dim(latest[..., None], dim=1)


def put_back(outputs: Tensor, before: Tensor, real: Tensor) -> Tensor:
    """Outputs (B, T, H) of tokens that `to_front` brought to the front, back at their places.

    A masked position repeats the output of the real token before it, or `before` (B, H) if there is none.
    """
    seen = real.cumsum(1)[..., None]  # (B, T, 1), how many outputs there are up to here
    return torch.cat([before[:, None].to(outputs.dtype), outputs], dim=1).take_along_dim(seen, dim=1)
