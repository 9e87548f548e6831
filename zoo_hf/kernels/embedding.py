"""Embeddings of a population of members W + s Z: of Z only the rows that are looked up are made.

Forward only: the operations have no formula for a backward pass and run under `torch.no_grad` or inference mode.

Letters: P members, T tokens of each, N ids, V rows of W, E columns.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..noise import PURPOSE_ENTRIES, Direction, parameter_id
from ..philox import philox_words
from .choice import backend
from .displace import FLOATS
from .linear import in_front


@torch.library.custom_op("zoo_hf::perturbed_embedding_population", mutates_args=())
def perturbed_embedding_population(
    ids: Tensor, weight: Tensor, index: Tensor, scale: Tensor, seed: int, step: int, name: str
) -> Tensor:
    """Rows of W + s Z of every member, (P, T, E) in the dtype of W: summed in float32 at least and rounded once.

    Args:
        ids: (P, T), integers in [0, V): a kernel does not check them.
        weight: W, (V, E), one for all members.
        index: (P,) int64, of the members' directions; seed and step are all members'. Z is Rademacher.
        scale: s, (P,) float32.
        name: of W in the unwrapped model.
    """
    preferred = ["triton", "plain"] if weight.dtype in FLOATS else ["plain"]
    if backend(preferred, weight.device) == "plain":
        return embed_plainly(ids, weight, index, scale, seed, step, name)
    from .gpu.embedding import launch
    from .gpu.noise import signed

    y = torch.empty((*ids.shape, weight.shape[1]), dtype=weight.dtype, device=weight.device)
    launch(y, ids, weight, index, scale, (signed(parameter_id(name)), signed(step), signed(seed)))
    return y


@perturbed_embedding_population.register_fake
def _(ids: Tensor, weight: Tensor, index: Tensor, scale: Tensor, seed: int, step: int, name: str) -> Tensor:
    return weight.new_empty(*ids.shape, weight.shape[1])


def embed_plainly(
    ids: Tensor, weight: Tensor, index: Tensor, scale: Tensor, seed: int, step: int, name: str
) -> Tensor:
    """The plain twin."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    y = F.embedding(ids, weight).to(wide)
    for number in index.unique().tolist():
        own = (index == number).nonzero()[:, 0]  # members; both of a pair share its entries
        seen, places = ids[own].unique(return_inverse=True)
        z = rows(seen, weight.shape[1], Direction(seed, step, number), name)  # (N, E)
        y[own] += scale[own, None, None] * z[places]
    return y.to(weight.dtype)


def rows(ids: Tensor, width: int, direction: Direction, name: str) -> Tensor:
    """Some rows of Z, (N, E) float32."""
    start = ids.long() * width
    block = start[:, None] // 128 + torch.arange(-(-width // 128) + 1, device=ids.device)  # (N, blocks of a row)
    others = torch.tensor([PURPOSE_ENTRIES, parameter_id(name), *direction], device=ids.device)
    purpose, parameter, seed, step, index = others.unbind()
    words = philox_words([block, purpose, parameter, step], [seed, index])
    entry = start[:, None] % 128 + torch.arange(width, device=ids.device)  # (N, E), counted from the row's first block
    bits = torch.stack(words, dim=-1).flatten(1).gather(1, entry // 32) >> entry % 32 & 1
    return 2.0 * bits - 1.0


@torch.library.custom_op("zoo_hf::perturbed_embedding", mutates_args=())
def perturbed_embedding(
    ids: Tensor, weight: Tensor, index: Tensor, scale: Tensor, seed: int, step: int, name: str
) -> Tensor:
    """One member's rows of W + s Z, (…, E), which `torch.func.vmap` makes a population's.

    Args:
        ids: (…); index and scale: (), of the member.
    """
    own = ids.reshape(1, ids.numel()), weight, index[None], scale[None]
    return perturbed_embedding_population(*own, seed, step, name).view(*ids.shape, weight.shape[1])


@perturbed_embedding.register_fake
def _(ids: Tensor, weight: Tensor, index: Tensor, scale: Tensor, seed: int, step: int, name: str) -> Tensor:
    return weight.new_empty(*ids.shape, weight.shape[1])


@perturbed_embedding.register_vmap
def _(
    info: Any, in_dims: Any, ids: Tensor, weight: Tensor, index: Tensor, scale: Tensor, *names: Any
) -> tuple[Tensor, int]:
    assert in_dims[1] is None, "members share their weights"
    dims = (in_dims[0], *in_dims[2:4])
    ids, index, scale = (  # type: ignore[assignment]
        in_front(value, dim, info.batch_size) for value, dim in zip((ids, index, scale), dims, strict=True)
    )
    flat = ids.reshape(len(ids), math.prod(ids.shape[1:]))
    y = perturbed_embedding_population(flat, weight, index, scale, *names)
    return y.view(*ids.shape, weight.shape[1]), 0
