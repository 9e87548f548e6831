"""θ + s z in one pass over the weights: of one member, or of a population.

Letters: P members, M entries.
"""

from typing import Any

import torch
from torch import Tensor

from ..noise import CHUNK, Direction, entries, spans
from .choice import backend


# of Triton's kernels, whose noise and sums are float32
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def one_pass(weights: Tensor) -> bool:
    """Whether Triton's kernels displace a parameter."""
    preferred = ["triton", "plain"] if weights.dtype in FLOATS else ["plain"]
    return backend(preferred, weights.device) == "triton"


@torch.library.custom_op("zoo_hf::displace_", mutates_args={"out"})
def displace_(
    out: Tensor, weights: Tensor, direction: list[int], name: str, start: int, scale: float, distribution: str
) -> None:
    """Write round(θ + s z) to `out`: summed in float32 at least and rounded once to the dtype of `out`.

    Args:
        out: (M,), flat and contiguous; may be `weights`.
        weights: θ, (M,), flat and contiguous: neighbouring entries of one parameter, of any floating dtype.
        direction: seed, step and index of z.
        name: of the parameter, in the unwrapped model.
        start: place of the first entry in its parameter.
        scale: s.
        distribution: "rademacher" or "gaussian".
    """
    if one_pass(weights) and one_pass(out):
        from .gpu.displace import launch

        launch(out, weights, Direction(*direction), name, start, scale, distribution)
    else:
        displace_plainly_(out, weights, Direction(*direction), name, start, scale, distribution)


def displace_plainly_(
    out: Tensor, weights: Tensor, direction: Direction, name: str, start: int, scale: float, distribution: str
) -> None:
    wide = torch.promote_types(weights.dtype, torch.float32)
    for first, last in spans(len(weights), CHUNK):
        noise = entries(
            direction,
            name,
            start + first,
            start + last,
            distribution=distribution,
            dtype=wide,
            device=weights.device,
        )
        torch.add(weights[first:last], noise.mul_(scale), out=out[first:last])


@torch.library.custom_op("zoo_hf::displaced_members", mutates_args=())
def displaced_members(
    weights: Tensor, index: Tensor, scale: Tensor, seed: int, step: int, name: str, distribution: str
) -> Tensor:
    """round(θ + s_m z_m) of every member, (P, M), in the dtype of θ and rounded once; z_m is (seed, step, index[m]).

    Args:
        weights: θ, (M,): a whole parameter, flat and contiguous.
        index: (P,) int64.
        scale: s, (P,) float32.
        name: of the parameter, in the unwrapped model.
        distribution: "rademacher" or "gaussian".
    """
    out = torch.empty(len(index), len(weights), dtype=weights.dtype, device=weights.device)
    if one_pass(weights):
        from .gpu.displace import launch_members

        launch_members(out, weights, index.contiguous(), scale.contiguous(), (seed, step, name), distribution)
        return out
    for row, number, size in zip(out, index.tolist(), scale.tolist(), strict=True):
        displace_plainly_(row, weights, Direction(seed, step, number), name, 0, size, distribution)
    return out


@displaced_members.register_fake
def _(weights: Tensor, index: Tensor, scale: Tensor, seed: int, step: int, name: str, distribution: str) -> Tensor:
    return weights.new_empty(len(index), len(weights))


@torch.library.custom_op("zoo_hf::displaced", mutates_args=())
def displaced(weights: Tensor, index: Tensor, scale: Tensor, seed: int, step: int, name: str) -> Tensor:
    """round(θ + s z) of one member, (M,), for Rademacher z; under vmap over `index` and `scale`, of each.

    Arguments as of `displaced_members`; `index` and `scale` are scalars.
    """
    return displaced_members(weights, index.view(1), scale.view(1), seed, step, name, "rademacher")[0]


@displaced.register_fake
def _(weights: Tensor, index: Tensor, scale: Tensor, seed: int, step: int, name: str) -> Tensor:
    return torch.empty_like(weights)


@displaced.register_vmap
def _(info: Any, in_dims: Any, weights: Tensor, index: Tensor, scale: Tensor, *name: Any) -> tuple[Tensor, int]:
    index, scale = (part.expand(info.batch_size) for part in (index, scale))  # either may be shared
    return displaced_members(weights, index, scale, *name, "rademacher"), 0
