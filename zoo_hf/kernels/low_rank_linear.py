"""Linear layers of a population of members W + A Bᵀ, whose matrices are never made.

Forward only: the operations have no formula for a backward pass and run under `torch.no_grad` or inference mode.

Letters: P members, K rows of each, I inputs, O outputs, r the rank.
"""

import math
from typing import Any

import torch
from torch import Tensor

from .choice import backend
from .displace import FLOATS
from .linear import in_front


MOST = 16  # the largest rank of Triton's kernel


@torch.library.custom_op("zoo_hf::low_rank_linear_population", mutates_args=())
def low_rank_linear_population(x: Tensor, weight: Tensor, bias: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """y = x (W + A Bᵀ)ᵀ + b = x Wᵀ + (x B) Aᵀ + b of every member, (P, K, O) in the dtype of x.

    x B is accumulated in float32 and rounded to the dtype of x.

    Args:
        x: (P, K, I), of any strides.
        weight: W, (O, I), one for all members; where it is wider than x, it is rounded to the dtype of x as autocast
            does, and so is B.
        bias: b, (P, O), or None.
        left: A, (P, O, r), which may be wider than x; right: B, (P, I, r).
    """
    if not x.shape[2] == weight.shape[1] == right.shape[1]:
        columns = x.shape[2], weight.shape[1], right.shape[1]
        raise ValueError(f"`x`, `weight` and `right` must have as many inputs, got {columns}.")
    dtypes = {tensor.dtype for tensor in (weight, left, right)} <= {x.dtype, torch.float32}
    known = x.dtype in FLOATS and dtypes and left.shape[2] <= MOST
    if backend(["triton", "plain"] if known else ["plain"], x.device) == "plain":
        return low_rank_plainly(x, weight, bias, left, right)
    from .gpu.low_rank_linear import launch

    y = torch.empty((*x.shape[:2], len(weight)), dtype=x.dtype, device=x.device)
    launch(y, x, weight, bias, left, right)
    return y


@low_rank_linear_population.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], weight.shape[0])


def low_rank_plainly(x: Tensor, weight: Tensor, bias: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """The plain twin: one product with W for all members, and to each its own outer products are added."""
    y = x @ weight.mT.to(x.dtype)  # (P, K, O)
    if bias is not None:
        y = y + bias[:, None]
    projected = (right.mT.to(x.dtype) @ x.mT).mT  # (P, K, r); x @ right would take four times as long
    for column in range(left.shape[2]):
        y = torch.addcmul(y, projected[..., column, None], left[:, None, :, column])
    return y.to(x.dtype)


@torch.library.custom_op("zoo_hf::low_rank_linear", mutates_args=())
def low_rank_linear(x: Tensor, weight: Tensor, bias: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """One member's y = x (W + A Bᵀ)ᵀ + b, (…, O), which `torch.func.vmap` makes a population's.

    Args:
        x: (…, I); bias: (O,) or None; left: (O, r) and right: (I, r), of the member.
    """
    rows = x.reshape(1, math.prod(x.shape[:-1]), x.shape[-1])
    y = low_rank_linear_population(rows, weight, None if bias is None else bias[None], left[None], right[None])
    return y.view(*x.shape[:-1], len(weight))


@low_rank_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@low_rank_linear.register_vmap
def _(
    info: Any, in_dims: Any, x: Tensor, weight: Tensor, bias: Tensor | None, left: Tensor, right: Tensor
) -> tuple[Tensor, int]:
    assert in_dims[1] is None, "members share their weights"
    dims = (in_dims[0], *in_dims[2:])
    x, bias, left, right = (  # type: ignore[assignment]
        in_front(value, dim, info.batch_size) for value, dim in zip((x, bias, left, right), dims, strict=True)
    )
    rows = x.reshape(len(x), math.prod(x.shape[1:-1]), x.shape[-1])
    return low_rank_linear_population(rows, weight, bias, left, right).view(*x.shape[:-1], len(weight)), 0
