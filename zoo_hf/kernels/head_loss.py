"""Losses of a language model's head, whose logits are never held.

    loss[p, k] = −log softmax(hidden[p, k] (W + s_p Z_p)ᵀ + b_p)[target[p, k]], and 0 where the target is −100

Forward only: the operations have no gradients.

Letters: P members, K rows of hidden states, one a token, D their width, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from ..noise import Direction, entries, spans
from .choice import backend
from .displace import FLOATS


IGNORED = -100  # the target of a row that does not count, torch's own
LOGITS = 1 << 22  # that the plain twin holds at once


def suits(hidden: Tensor, weight: Tensor) -> bool:
    """Whether `token_losses` is faster here than logits and their loss, and nobody asks for gradients."""
    dtypes = hidden.dtype, weight.dtype
    if torch.is_autocast_enabled(hidden.device.type):
        dtypes = (torch.get_autocast_dtype(hidden.device.type),) * 2
    return not torch.is_grad_enabled() and backend(preferred(*dtypes), hidden.device) != "plain"


def preferred(hidden: torch.dtype, weight: torch.dtype) -> list[str]:
    """Backends that suit the arguments, the best first."""
    return ["triton", "plain"] if hidden == weight and hidden in FLOATS else ["plain"]


def token_losses(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    index: Tensor | None = None,
    scale: Tensor | None = None,
    seed: int = 0,
    step: int = 0,
    name: str = "",
) -> Tensor:
    """Losses of rows in any number of dimensions, in the targets' shape; products in autocast's dtype where it is on.

    Weights that stand for displaced ones may override it, as they do torch's functions.

    Args:
        hidden: (…, D).
        weight: W, (V, D).
        bias: b, (V,).
        targets: (…), −100 where none counts.
        index, scale: () each, of a member whose weight is W + s Z; see `head_loss_population`. None for W itself.
    """
    given = hidden, weight, bias, targets
    if has_torch_function(given):
        names: dict[str, Any] = {"index": index, "scale": scale, "seed": seed, "step": step, "name": name}
        return handle_torch_function(token_losses, given, *given, **names)
    if torch.is_autocast_enabled(hidden.device.type) and hidden.dtype is not torch.float64:
        narrow = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(narrow), weight.to(narrow)
    rows, goals = hidden.reshape(-1, hidden.shape[-1]), targets.to(hidden.device).reshape(-1)
    return head_loss(rows, weight, bias, goals, index, scale, seed, step, name).view(targets.shape)


@torch.library.custom_op("zoo_hf::head_loss_population", mutates_args=())
def head_loss_population(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    index: Tensor | None,
    scale: Tensor | None,
    seed: int,
    step: int,
    name: str,
) -> Tensor:
    """Losses of every member's rows, (P, K), float32, or float64 for hidden states that are.

    Logits are summed in float32 at least, x W and s · x Z apart, and are not rounded to the inputs' dtype.

    Args:
        hidden: (P, K, D).
        weight: W, (V, D) for all members or (P, V, D).
        bias: b, (V,) or (P, V).
        targets: (K,) or (P, K) int64, 0 … V − 1, or −100 where none counts. The Triton kernel makes another one's
            loss NaN, the plain twin raises.
        index: (P,) int64, of each member's direction; signs Z are made from (seed, step, index) and the name.
        scale: s, (P,) float32; with `index`.
        name: of the weight, in the unwrapped model.
    """
    if backend(preferred(hidden.dtype, weight.dtype), hidden.device) == "triton":
        from .gpu.head_loss import launch

        return launch(hidden, weight, bias, targets, index, scale, seed, step, name)
    return head_loss_plainly(hidden, weight, bias, targets, index, scale, seed, step, name)


@head_loss_population.register_fake
def _(hidden: Tensor, *others: Any) -> Tensor:
    return hidden.new_empty(hidden.shape[:2], dtype=wide(hidden))


def head_loss_plainly(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    index: Tensor | None,
    scale: Tensor | None,
    seed: int,
    step: int,
    name: str,
) -> Tensor:
    """The plain twin: member by member, in chunks of rows with at most `LOGITS` logits, but one row at least."""
    members, length, _ = hidden.shape
    dtype, targets = wide(hidden), targets.expand(members, length)
    losses = torch.empty(members, length, dtype=dtype, device=hidden.device)
    shared = weight.to(dtype)  # once for all members
    for member in range(members):
        matrix = shared if shared.dim() == 2 else shared[member]
        own = bias[member] if bias is not None and bias.dim() == 2 else bias
        noise = None
        if index is not None and scale is not None:
            direction = Direction(seed, step, int(index[member]))
            noise = entries(direction, name, 0, matrix.numel(), dtype=dtype, device=hidden.device).view_as(matrix)
        for first, last in spans(length, max(1, LOGITS // len(matrix))):
            rows = hidden[member, first:last].to(dtype)
            with torch.autocast(hidden.device.type, enabled=False):
                logits = F.linear(rows, matrix, None if own is None else own.to(dtype))  # (rows, V)
                if noise is not None and scale is not None:
                    logits += scale[member].to(dtype) * F.linear(rows, noise)
                losses[member, first:last] = F.cross_entropy(logits, targets[member, first:last], reduction="none")
    return losses


def wide(hidden: Tensor) -> torch.dtype:
    """Of logits and losses."""
    return torch.promote_types(hidden.dtype, torch.float32)


@torch.library.custom_op("zoo_hf::head_loss", mutates_args=())
def head_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    index: Tensor | None,
    scale: Tensor | None,
    seed: int,
    step: int,
    name: str,
) -> Tensor:
    """`head_loss_population` of one member, (K,): hidden (K, D), weight (V, D), bias (V,), index and scale ()."""
    own = (None if one is None else one.unsqueeze(0) for one in (index, scale))
    return head_loss_population(hidden.unsqueeze(0), weight, bias, targets, *own, seed, step, name)[0]


@head_loss.register_fake
def _(hidden: Tensor, *others: Any) -> Tensor:
    return hidden.new_empty(hidden.shape[:1], dtype=wide(hidden))


@head_loss.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Tensor, int]:
    """Members in one call; what they share stays one, except that each has its own hidden states and direction."""
    tensors = [
        each if each is None or dim is None else each.movedim(dim, 0)
        for each, dim in zip(arguments[:6], in_dims, strict=False)
    ]
    for place in (0, 4, 5):
        if in_dims[place] is None and tensors[place] is not None:
            tensors[place] = tensors[place].expand(info.batch_size, *tensors[place].shape)
    return head_loss_population(*tensors, *arguments[6:]), 0
