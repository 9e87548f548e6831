"""Linear layers of a population of members W + s Z, whose Z is made while it is multiplied and never stored.

Forward only: the operations have no formula for a backward pass and run under `torch.no_grad` or inference mode.

Letters: P members, K rows of each, I inputs, O outputs.
"""

import math
from typing import Any

import torch
from torch import Tensor

from ..noise import CHUNK, Direction, entries, parameter_id, spans
from .choice import backend
from .displace import FLOATS


FORMS = ("apart", "fused")


def fits(weight: Tensor, smoothing_radius: float) -> bool:
    """Whether members W ± ε Z may be rounded to the dtype of W, as none of their entries then is moved by 0.

    It is so where ε is a power of two and no smaller than the spacing of the dtype at max|W|. Elsewhere ε x Z has to
    be accumulated apart from x W. For powers of two it waits for the device, once.
    """
    if math.frexp(smoothing_radius)[0] != 0.5:
        return False
    least, most = torch.stack(torch.aminmax(weight.detach())).tolist()
    largest, kind = max(-least, most), torch.finfo(weight.dtype)
    # at m 2ᵉ, ½ ≤ m < 1, numbers are eps 2ᵉ⁻¹ apart, and nowhere less than the smallest ones
    spacing = max(kind.eps * 2.0 ** (math.frexp(largest)[1] - 1), kind.eps * kind.smallest_normal)
    return math.isfinite(largest) and smoothing_radius >= spacing


def form_of(weight: Tensor, smoothing_radius: float) -> str:
    """The cheapest form that is right: "fused" costs one product, "apart" two."""
    return "fused" if fits(weight, smoothing_radius) else "apart"


@torch.library.custom_op("zoo_hf::perturbed_linear_population", mutates_args=())
def perturbed_linear_population(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    scale: Tensor,
    seed: int,
    step: int,
    name: str,
    form: str,
) -> Tensor:
    """y = x (W + s Z)ᵀ + b of every member, (P, K, O) in the dtype of x, accumulated in float32.

    Args:
        x: (P, K, I), of any strides.
        weight: W, (O, I), one for all members; where it is wider than x, it is rounded to the dtype of x as autocast
            does, and Z's part is apart in either form.
        bias: b, (P, O), or None.
        index: (P,) int64, of the members' directions; seed and step are all members'. Z is Rademacher.
        scale: s, (P,) float32.
        name: of W in the unwrapped model.
        form: "apart", s x Zᵀ is accumulated apart from the rounding of W; "fused", one product with W + s Z rounded to
            the dtype of W, for which |s| must be as `fits` says.
    """
    check(x, weight, form)
    known = x.dtype in FLOATS and weight.dtype in (x.dtype, torch.float32)
    if backend(["triton", "plain"] if known else ["plain"], x.device) == "plain":
        return linear_plainly(x, weight, bias, index, scale, seed, step, name, form)
    from .gpu.linear import launch
    from .gpu.noise import signed

    y = torch.empty((*x.shape[:2], len(weight)), dtype=x.dtype, device=x.device)
    numbers = signed(parameter_id(name)), signed(step), signed(seed)
    launch(y, x, weight, bias, index, scale, numbers, form)
    return y


@perturbed_linear_population.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    scale: Tensor,
    seed: int,
    step: int,
    name: str,
    form: str,
) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], weight.shape[0])


def check(x: Tensor, weight: Tensor, form: str) -> None:
    """Raises: ValueError, with the remedy."""
    if form not in FORMS:
        raise ValueError(f"`form` must be one of {FORMS}, got {form!r}.")
    if x.shape[-1] != weight.shape[-1]:
        raise ValueError(f"`x` must have as many columns as `weight`, got {x.shape[-1]} and {weight.shape[-1]}.")


def linear_plainly(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    scale: Tensor,
    seed: int,
    step: int,
    name: str,
    form: str,
) -> Tensor:
    """The plain twin: products in the dtype of x, and Z of one direction and some outputs at a time."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y = torch.zeros(*x.shape[:2], len(weight), dtype=wide, device=x.device)
    members: dict[int, list[int]] = {}  # of each direction; both of a pair share its entries
    for member, number in enumerate(index.tolist()):
        members.setdefault(number, []).append(member)
    fused = form == "fused" and weight.dtype == x.dtype
    for first, last in spans(len(weight), max(1, CHUNK // max(1, x.shape[2]))):
        w = weight[first:last]
        if not fused:
            y[..., first:last] = x @ w.mT.to(x.dtype)
        span = first * x.shape[2], last * x.shape[2]
        for number, own in members.items():
            direction = Direction(seed, step, number)
            z = entries(direction, name, *span, dtype=wide, device=x.device).view(w.shape)
            if fused:
                for member in own:
                    y[member, :, first:last] = x[member] @ (w + scale[member] * z).to(x.dtype).mT
            else:
                y[own, :, first:last] += scale[own, None, None] * (x[own] @ z.to(x.dtype).mT)
    return (y if bias is None else y + bias[:, None]).to(x.dtype)


@torch.library.custom_op("zoo_hf::perturbed_linear", mutates_args=())
def perturbed_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    scale: Tensor,
    seed: int,
    step: int,
    name: str,
    form: str,
) -> Tensor:
    """One member's y = x (W + s Z)ᵀ + b, (…, O), which `torch.func.vmap` makes a population's.

    Args:
        x: (…, I); bias: (O,) or None; index and scale: (), of the member. All others as of the population.
    """
    rows = x.reshape(1, math.prod(x.shape[:-1]), x.shape[-1])
    own = None if bias is None else bias[None]
    y = perturbed_linear_population(rows, weight, own, index[None], scale[None], seed, step, name, form)
    return y.view(*x.shape[:-1], len(weight))


@perturbed_linear.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    scale: Tensor,
    seed: int,
    step: int,
    name: str,
    form: str,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@perturbed_linear.register_vmap
def _(
    info: Any,
    in_dims: Any,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    scale: Tensor,
    *names: Any,
) -> tuple[Tensor, int]:
    assert in_dims[1] is None, "members share their weights"
    dims = (in_dims[0], *in_dims[2:5])
    x, bias, index, scale = (  # type: ignore[assignment]
        in_front(value, dim, info.batch_size) for value, dim in zip((x, bias, index, scale), dims, strict=True)
    )
    rows = x.reshape(len(x), math.prod(x.shape[1:-1]), x.shape[-1])
    return perturbed_linear_population(rows, weight, bias, index, scale, *names).view(*x.shape[:-1], len(weight)), 0


def in_front(value: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """A value with the batch as its first dimension, expanded where it has none; None stays None."""
    if value is None:
        return None
    return value.expand(size, *value.shape) if dim is None else value.movedim(dim, 0)
