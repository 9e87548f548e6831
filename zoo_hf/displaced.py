"""A matrix that stands for W + A Bᵀ: layers multiply by it without making it."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class DisplacedMatrix(torch.Tensor):
    """A weight that stands for W + A Bᵀ: layers that multiply by it never make it, everything else does.

    Args:
        base: W, shared by all members.
        left: A, (R, r), of one member; stacked by vmap.
        right: B, (C, r).
    """

    base: Tensor
    left: Tensor
    right: Tensor

    @staticmethod
    def __new__(cls, base: Tensor, left: Tensor, right: Tensor) -> "DisplacedMatrix":
        matrix = base.detach().as_subclass(cls)
        matrix.base, matrix.left, matrix.right = base.detach(), left, right
        return matrix

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func in MULTIPLY:
                return MULTIPLY[func](*args, **kwargs)
            convert = plain if func in READ else dense
            return func(*torch.utils._pytree.tree_map(convert, args), **torch.utils._pytree.tree_map(convert, kwargs))


def plain(value: Any) -> Any:
    return value.base if isinstance(value, DisplacedMatrix) else value


def dense(value: Any) -> Any:
    """W + A Bᵀ itself, (P, …) under vmap, where something else than a layer asks for the weight."""
    if not isinstance(value, DisplacedMatrix):
        return value
    return value.base + (value.left @ value.right.mT).view(value.base.shape)


def linear(input: Any, weight: Any, bias: Any = None) -> Tensor:
    """torch's; arguments have its names, as they may come by name."""
    input, bias = dense(input), dense(bias)
    if not isinstance(weight, DisplacedMatrix):  # it is multiplied by another weight
        return F.linear(input, weight, bias)
    return multiplied(input, weight.base, bias, weight.left, weight.right)


def addmm(input: Any, mat1: Any, mat2: Any, **scales: Any) -> Tensor:
    """torch's; as gpt2's Conv1D calls it, input is a bias and mat2 a weight, (I, O)."""
    input, mat1 = dense(input), dense(mat1)
    if not isinstance(mat2, DisplacedMatrix) or scales or input.dim() != 1:
        return torch.addmm(input, mat1, dense(mat2), **scales)
    return multiplied(mat1, mat2.base.mT, input, mat2.right, mat2.left)


def multiplied(x: Tensor, weight: Tensor, bias: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """x (W + A Bᵀ)ᵀ + b, (…, O): the product with W is one for all members, and each adds its own outer products.

    Args:
        x: (…, I).
        weight: W, (O, I).
        left: A, (O, r), of one member; stacked by vmap, as are B and x.
        right: B, (I, r).
    """
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])  # (K, I)
    y = shared = F.linear(rows, weight, bias)  # (K, O)
    projected = (right.mT @ rows.mT).mT  # (K, r); x @ right would take four times as long
    for column in range(left.shape[1]):
        y = torch.addcmul(y, projected[:, column, None], left[:, column])
    return y.to(shared.dtype).view(*x.shape[:-1], y.shape[-1])  # wide factors widen it under autocast


def embedding(
    input: Tensor, weight: Any, padding_idx: int | None = None, max_norm: float | None = None, *others: Any, **by: Any
) -> Tensor:
    """torch's: rows of W and of A, the latter times Bᵀ."""
    if max_norm is not None:
        raise ValueError(RENORMED.format(f"max_norm={max_norm}"))
    found = F.embedding(input, weight.base, padding_idx, None, *others, **by)
    return found + F.embedding(input, weight.left) @ weight.right.mT


RENORMED = "{} makes an embedding write its weight, which members of a population share: set `max_norm=None`"
MULTIPLY: dict[Any, Callable[..., Tensor]] = {F.linear: linear, torch.addmm: addmm, F.embedding: embedding}
PROPERTIES = ("shape", "dtype", "device", "ndim", "requires_grad", "layout", "is_sparse", "is_cuda", "is_quantized")
READ = {  # what asks about a weight and not for it
    *(vars(torch.Tensor).get(name, vars(torch._C.TensorBase).get(name)).__get__ for name in PROPERTIES),
    torch.Tensor.size,
    torch.Tensor.dim,
    torch.Tensor.numel,
    torch.Tensor.is_floating_point,
    torch.Tensor.__len__,
}
