"""Weights that stand for displaced ones: layers multiply by them without making them. Here the low-rank, W + A Bᵀ."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels.displace import one_pass
from .kernels.head_loss import IGNORED, token_losses


class Displaced(torch.Tensor):
    """A weight that stands for a displaced one, which layers multiply by without making it; everything else makes it.

    Attributes:
        base: W, shared by all members.
        layers: function that multiplies by a weight → what does so in its place.
    """

    base: Tensor
    layers: dict[Any, Callable[..., Tensor]]

    def made(self) -> Tensor:
        """The displaced weight itself, (P, …) under vmap."""
        raise NotImplementedError

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func in cls.layers:
                return cls.layers[func](*args, **kwargs)
            convert = plain if func in READ else dense
            return func(*torch.utils._pytree.tree_map(convert, args), **torch.utils._pytree.tree_map(convert, kwargs))


class DisplacedMatrix(Displaced):
    """A weight that stands for W + A Bᵀ.

    Args:
        base: W.
        left: A, (R, r), of one member; stacked by vmap.
        right: B, (C, r).
    """

    left: Tensor
    right: Tensor

    @staticmethod
    def __new__(cls, base: Tensor, left: Tensor, right: Tensor) -> "DisplacedMatrix":
        matrix = base.detach().as_subclass(cls)
        matrix.base, matrix.left, matrix.right = base.detach(), left, right
        return matrix

    def made(self) -> Tensor:
        """W + A Bᵀ."""
        return self.base + (self.left @ self.right.mT).view(self.base.shape)


def plain(value: Any) -> Any:
    return value.base if isinstance(value, Displaced) else value


def dense(value: Any) -> Any:
    """The weight itself, where something else than a layer asks for it."""
    return value.made() if isinstance(value, Displaced) else value


def linear(input: Any, weight: Any, bias: Any = None) -> Tensor:
    """torch's; arguments have its names, as they may come by name."""
    input, bias = dense(input), dense(bias)
    if not isinstance(weight, DisplacedMatrix):  # it is multiplied by another weight
        return F.linear(input, weight, bias)
    if one_pass(weight.base):
        return torch.ops.zoo_hf.low_rank_linear(input, weight.base, bias, weight.left, weight.right)
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


def losses(hidden: Tensor, weight: Any, bias: Any, targets: Tensor, **names: Any) -> Tensor:
    """Of a head's logits, which are few beside a population's hidden states where its vocabulary is small."""
    own = autocast_dtype(hidden)
    hidden, bias = (value if own is None or value is None else value.to(own) for value in (hidden, dense(bias)))
    logits = linear(hidden, weight, bias).flatten(0, -2)  # (K, V)
    found = F.cross_entropy(logits.float(), targets.flatten(), ignore_index=IGNORED, reduction="none")
    return found.view(targets.shape)


def autocast_dtype(of: Tensor) -> torch.dtype | None:
    """What autocast computes products in on a tensor's device; None while it is off, and for doubles."""
    device = of.device.type
    on = torch.is_autocast_enabled(device) and of.dtype is not torch.float64
    return torch.get_autocast_dtype(device) if on else None


RENORMED = "{} makes an embedding write its weight, which members of a population share: set `max_norm=None`"
DisplacedMatrix.layers = {F.linear: linear, torch.addmm: addmm, F.embedding: embedding, token_losses: losses}
PROPERTIES = ("shape", "dtype", "device", "ndim", "requires_grad", "layout", "is_sparse", "is_cuda", "is_quantized")
READ = {  # what asks about a weight and not for it
    *(vars(torch.Tensor).get(name, vars(torch._C.TensorBase).get(name)).__get__ for name in PROPERTIES),
    torch.Tensor.size,
    torch.Tensor.dim,
    torch.Tensor.numel,
    torch.Tensor.is_floating_point,
    torch.Tensor.__len__,
}
