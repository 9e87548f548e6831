"""Estimate → ĝ as tensors: of one parameter, or of many small ones in a few calls.

Letters: m directions whose coefficient is a number, R rows and C columns of a matrix, r the rank.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .estimators import Estimate
from .kernels.displace import one_pass
from .low_rank import Kind, LowRank, entries_of, factor_bytes, full, is_low_rank, parts_of
from .noise import CHUNK, Direction, spans, unpacked
from .perturbation import Parameters, by_device


FACTOR_BYTES = 1 << 22  # of low-rank directions, held at once while they are summed


class Used(NamedTuple):
    """What an estimate sums: the directions whose coefficient is a number."""

    kind: Kind
    directions: tuple[Direction, ...]
    coefficients: tuple[float, ...]


@functools.lru_cache(maxsize=4)  # of a step, for all its parameters
def names_on(used: Used, device: torch.device) -> tuple[Tensor, Tensor]:
    """Seed, step and index of the directions, (m, 3) int64, and their coefficients, (m,) float32."""
    names = torch.tensor(used.directions, dtype=torch.int64, device=device)
    return names, torch.tensor(used.coefficients, dtype=torch.float32, device=device)


def used_by(estimate: Estimate) -> Used:
    pairs = zip(estimate.directions, estimate.coefficients.tolist(), strict=True)
    directions, coefficients = zip(*((d, c) for d, c in pairs if not math.isnan(c)), strict=True)
    return Used(estimate.distribution, directions, coefficients)


def gradient(estimate: Estimate, name: str, parameter: Tensor) -> Tensor:
    """ĝ = 1/m Σᵢ cᵢ zᵢ for one parameter, in its shape and dtype, in one pass over the estimate's m used directions.

    Summed in float32 at least, in an order that depends on m and the parameter's shape alone.
    """
    return gradients(estimate, {name: parameter})[name]


def gradients(estimate: Estimate, parameters: Parameters) -> dict[str, Tensor]:
    """`gradient` of every parameter."""
    sums = wide_gradients(used_by(estimate), parameters)
    return {name: sums[name].to(p.dtype).view_as(p) for name, p in parameters.items()}


def wide_gradients(used: Used, parameters: Parameters) -> dict[str, Tensor]:
    """ĝ of every parameter, flat, in float32 at least; small ones share calls, as theirs cost calls alone."""
    m = len(used.directions)
    block = full(used.kind).entries_per_block  # of which a parameter has whole ones
    found: dict[str, Tensor] = {}
    for here in by_device(parameters).values():
        matrices = {name: p for name, p in here.items() if is_low_rank(used.kind, name)}
        whole = {name: p for name, p in here.items() if name not in matrices}
        small = {name: p for name, p in whole.items() if m * p.numel() <= CHUNK and not one_pass(p)}
        for group in together(matrices, lambda p: m * factor_bytes(used.kind, p.shape), FACTOR_BYTES):
            found |= low_rank_sums(used, group)
        for group in together(small, lambda p: m * max(p.numel(), block), CHUNK):
            found |= small_sums(used, group)
        found |= {name: full_sum(used, name, p) for name, p in here.items() if name not in found}
    return {name: total.view(-1).div_(m) for name, total in found.items()}


def together(parameters: Parameters, size: Callable[[Tensor], int], room: int) -> Iterator[Parameters]:
    """Neighbours whose sizes fit into `room` together, or one that alone does not."""
    group: Parameters = {}
    filled = 0
    for name, parameter in parameters.items():
        if group and filled + size(parameter) > room:
            yield group
            group, filled = {}, 0
        group[name] = parameter
        filled += size(parameter)
    if group:
        yield group


def full_sum(used: Used, name: str, parameter: Tensor) -> Tensor:
    """Σᵢ cᵢ zᵢ, flat."""
    names, coefficients = names_on(used, parameter.device)
    like = name, parameter.numel(), entries_of(used.kind), wide(parameter)
    return torch.ops.zoo_hf.weighted_sum(names, coefficients, *like)


def small_sums(used: Used, parameters: Parameters) -> dict[str, Tensor]:
    """Σᵢ cᵢ zᵢ of each, flat, as one product."""
    device = next(iter(parameters.values())).device
    wanted = [(part, p.numel()) for name, p in parameters.items() for part in parts_of(used.kind, name, p.shape)]
    rows = unpacked(full(used.kind), used.directions, wanted, device)  # (m, numel) each
    coefficients = torch.tensor(used.coefficients, dtype=torch.float64, device=device)
    return {
        name: coefficients.to(wide(p)) @ row.to(wide(p))
        for (name, p), row in zip(parameters.items(), rows, strict=True)
    }


def low_rank_sums(used: Used, parameters: Parameters) -> dict[str, Tensor]:
    """Σᵢ cᵢ Aᵢ Bᵢᵀ/√r, (R, C) each, as one product for every chunk of directions: their factors side by side."""
    assert isinstance(used.kind, LowRank)
    totals = {
        name: torch.zeros(p.numel() // p.shape[-1], p.shape[-1], dtype=wide(p), device=p.device)
        for name, p in parameters.items()
    }
    held = max(1, FACTOR_BYTES // sum(factor_bytes(used.kind, p.shape) for p in parameters.values()))
    for first, last in spans(len(used.directions), held):
        for name, (a, b) in used.kind.factors(used.directions[first:last], parameters).items():  # (G, R, r), (G, C, r)
            total = totals[name]
            scales = torch.tensor(used.coefficients[first:last], dtype=total.dtype, device=total.device)
            left = (a.to(total.dtype) * scales[:, None, None]).transpose(0, 1).flatten(1)  # (R, G·r)
            total.addmm_(left, b.to(total.dtype).mT.flatten(0, 1))  # (G·r, C)
    return totals


def wide(parameter: Tensor) -> torch.dtype:
    """What sums are made in: float32 at least."""
    return torch.promote_types(parameter.dtype, torch.float32)
