"""Loss of a language model, in as many digits as differences of losses need.

Letters: B sequences, T tokens of each, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backends import kernel


IGNORED = -100  # the target of a position where no prediction counts


def next_tokens(labels: Tensor) -> Tensor:
    """The label after each position, (B, T), the last of which has none. Shifting logits would copy them."""
    return F.pad(labels, (0, 1), value=IGNORED)[:, 1:]


def summed_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Σ −log softmax(logits[b, t])[targets[b, t]] where a target counts: a float64 scalar.

    Token losses are computed in float32 (float64 for float64 logits) and summed in float64, and the result stays
    float64: a zero-order step differences losses, and a float32 loss near 4 moves in steps of 5e-7. On mps, which has
    no float64, all is float32.

    Args:
        logits: (B, T, V), of any floating dtype.
        targets: (B, T), −100 where none counts.
    """
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)  # (B·T, V)
    targets = targets.to(logits.device).flatten()
    losses = F.cross_entropy(scores, targets, ignore_index=IGNORED, reduction="none")  # (B·T)
    return losses.sum(dtype=torch.float32 if losses.device.type == "mps" else torch.float64)


def head_loss(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    """`summed_loss` of a head's scores of hidden states (B, T, W), which are not held where a kernel does it."""
    plain = type(head) is nn.Linear and not (head._forward_hooks or head._forward_pre_hooks)
    fused = kernel("head_loss", hidden, head.weight) if plain else None
    if fused is None:
        return summed_loss(head(hidden), targets)
    return fused(hidden, head.weight, head.bias, targets.to(hidden.device)).sum(dtype=torch.float64)


def number_of_targets(targets: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor | int:
    """What a summed loss is divided by: the labels of the whole optimizer step if known, or else of this batch."""
    return (targets != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch


def causal_lm_loss(logits: Tensor, labels: Tensor, *, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """Mean negative log-probability of the next token, a float64 scalar, see `summed_loss`.

        L = 1/n Σ_{b,t} −log softmax(logits[b, t])[labels[b, t+1]]

    Args:
        logits: (B, T, V), of any floating dtype.
        labels: (B, T), the tokens themselves, −100 where none counts; the shift by one is made here.
        num_items_in_batch: n, the labels of the whole optimizer step; without it n counts this batch's own labels.
    """
    targets = next_tokens(labels)
    return summed_loss(logits, targets) / number_of_targets(targets, num_items_in_batch)
