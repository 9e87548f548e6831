"""Estimate → ĝ as tensors: of one parameter, or of many small ones in a few calls.

Letters: m directions whose coefficient is a number, R rows and C columns of a matrix, r the rank.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .estimators import Estimate
from .low_rank import Kind, LowRank, factor_bytes, full, is_low_rank, parts_of
from .noise import CHUNK, Blocks, Direction, blocks_held, packed_noise, spans, unpacked
from .perturbation import Parameters, by_device


FACTOR_BYTES = 1 << 22  # of low-rank directions, held at once while they are summed


class Used(NamedTuple):
    """What an estimate sums: the directions whose coefficient is a number."""

    kind: Kind
    directions: tuple[Direction, ...]
    coefficients: tuple[float, ...]


def gradient(estimate: Estimate, name: str, parameter: Tensor) -> Tensor:
    """ĝ = 1/m Σᵢ cᵢ zᵢ for one parameter, in its shape and dtype, in one pass over the estimate's m used directions.

    Summed in float32 at least, in an order that depends on m and the parameter's shape alone.
    """
    return gradients(estimate, {name: parameter})[name]


def gradients(estimate: Estimate, parameters: Parameters) -> dict[str, Tensor]:
    """`gradient` of every parameter; small ones share calls, as theirs cost calls and not arithmetic."""
    pairs = zip(estimate.directions, estimate.coefficients.tolist(), strict=True)
    directions, coefficients = zip(*((d, c) for d, c in pairs if not math.isnan(c)), strict=True)
    used, m = Used(estimate.distribution, directions, coefficients), len(directions)
    block = full(used.kind).entries_per_block  # of which a parameter has whole ones
    found: dict[str, Tensor] = {}
    for here in by_device(parameters).values():
        matrices = {name: p for name, p in here.items() if is_low_rank(used.kind, name)}
        small = {name: p for name, p in here.items() if name not in matrices and m * p.numel() <= CHUNK}
        for group in together(matrices, lambda p: m * factor_bytes(used.kind, p.shape), FACTOR_BYTES):
            found |= low_rank_sums(used, group)
        for group in together(small, lambda p: m * max(p.numel(), block), CHUNK):
            found |= small_sums(used, group)
        found |= {name: full_sum(used, name, p) for name, p in here.items() if name not in found}
    return {name: found[name].div_(m).to(p.dtype).view_as(p) for name, p in parameters.items()}


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
    """Σᵢ cᵢ zᵢ, flat: direction after direction, chunk by chunk."""
    distribution = full(used.kind)
    size, length = distribution.entries_per_block, distribution.packed_per_block
    total = torch.zeros(parameter.numel(), dtype=wide(parameter), device=parameter.device)
    for a, b in spans(-(-parameter.numel() // size), blocks_held(distribution, len(used.directions))):
        (packed,) = packed_noise(distribution, used.directions, [Blocks(name, a, b)], parameter.device)  # (m, …)
        for first, last in spans(b - a, CHUNK // size):
            part = total[(a + first) * size : (a + last) * size]
            noise = torch.empty((last - first) * size, dtype=total.dtype, device=parameter.device)
            for row, coefficient in zip(packed, used.coefficients, strict=True):
                distribution.unpack_(noise, row[first * length : last * length], coefficient)
                part += noise[: len(part)]
    return total


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
