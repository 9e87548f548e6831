"""A weight that stands for W + s Z, Z full-rank and of signs, by its name alone: its signs are made where it is used.

Nothing of the size of members times W exists: layers that multiply by it make the signs of a tile in registers.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .displaced import RENORMED, Displaced, dense
from .kernels.head_loss import token_losses


class NamedMatrix(Displaced):
    """A weight that stands for W + s Z of one member, see `noise` for what names Z.

    Args:
        base: W, contiguous, a parameter.
        index: of the direction, () int64; stacked by vmap, as is `scale`.
        scale: s, () float32.
        seed, step: of all members' directions.
        name: of the parameter, in the unwrapped model.
        form: of products, see `kernels.linear`.
    """

    index: Tensor  # type: ignore[assignment]  # the field's own word, although a tensor has a method of that name
    scale: Tensor
    direction: tuple[int, int, str]  # seed, step and name
    form: str

    @staticmethod
    def __new__(
        cls, base: Tensor, index: Tensor, scale: Tensor, *, seed: int, step: int, name: str, form: str
    ) -> "NamedMatrix":
        matrix = base.detach().as_subclass(cls)
        matrix.base, matrix.index, matrix.scale = base.detach(), index, scale
        matrix.direction, matrix.form = (seed, step, name), form
        return matrix

    def made(self) -> Tensor:
        """W + s Z."""
        flat = torch.ops.zoo_hf.displaced(self.base.view(-1), self.index, self.scale, *self.direction)
        return flat.view(self.base.shape)


def linear(input: Any, weight: Any, bias: Any = None) -> Tensor:
    """torch's; arguments have its names, as they may come by name."""
    input, bias = dense(input), dense(bias)
    if not isinstance(weight, NamedMatrix):  # it is multiplied by another weight
        return F.linear(input, dense(weight), bias)
    names = weight.index, weight.scale, *weight.direction
    return torch.ops.zoo_hf.perturbed_linear(input, weight.base, bias, *names, weight.form)


def embedding(
    input: Tensor, weight: Any, padding_idx: int | None = None, max_norm: float | None = None, *others: Any, **by: Any
) -> Tensor:
    """torch's, whose other arguments tell how gradients are made."""
    if max_norm is not None:
        raise ValueError(RENORMED.format(f"max_norm={max_norm}"))
    return torch.ops.zoo_hf.perturbed_embedding(input, weight.base, weight.index, weight.scale, *weight.direction)


def losses(hidden: Tensor, weight: Any, bias: Any, targets: Tensor, **names: Any) -> Tensor:
    """`token_losses` of a head whose weight this is."""
    seed, step, name = weight.direction
    own = {"index": weight.index, "scale": weight.scale, "seed": seed, "step": step, "name": name}
    return token_losses(hidden, weight.base, dense(bias), targets, **own)


NamedMatrix.layers = {F.linear: linear, F.embedding: embedding, token_losses: losses}
