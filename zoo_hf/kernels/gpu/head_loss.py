"""The Triton kernel of `head_loss_population`: one walk over the vocabulary with an online log Σ exp.

A tile of logits has as many rows as registers allow, as signs are made again for each tile of them, and few columns:
they are summed up at once. Where rows are few, parts of the vocabulary are walked by programs of their own.

Letters: P members, K rows of hidden states, D their width, V vocabulary, S parts of the vocabulary.
"""

import torch
import triton
import triton.language as tl

from ...noise import parameter_id
from ..head_loss import IGNORED
from .devices import on_device_of
from .noise import NAMES, signed, signed_tile
from .tiles import add_product, add_shared, columns


PROGRAMS = 264  # two for each multiprocessor of an H100: with fewer the vocabulary is split


def launch(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    index: torch.Tensor | None,
    scale: torch.Tensor | None,
    seed: int,
    step: int,
    name: str,
) -> torch.Tensor:
    """Losses (P, K) float32; arguments as of `head_loss_population`."""
    (members, length, width), vocabulary = hidden.shape, weight.shape[-2]
    hidden, weight = (each if each.stride(-1) == 1 else each.contiguous() for each in (hidden, weight))
    targets, own_bias = targets.expand(members, length), bias is not None and bias.dim() == 2
    picked = hidden.new_full((members, length), float("nan"), dtype=torch.float32)  # stays where no target is one
    if not picked.numel():
        return picked
    tile = tile_of(length, vocabulary, width, hidden.dtype)
    grid, part = parts(members, length, vocabulary, tile)
    sums = torch.empty(grid[2], members, length, dtype=torch.float32, device=hidden.device)
    with on_device_of(hidden):
        head_loss_kernel[grid](
            *(hidden, weight),
            *(each if each is None else each.contiguous() for each in (bias, index, scale)),
            *(targets, sums, picked),
            *(length, vocabulary, width, part),
            *hidden.stride()[:2],
            *(weight.stride()[:2] if weight.dim() == 3 else (0, weight.stride(0))),
            vocabulary if own_bias else 0,
            *targets.stride(),
            *map(signed, (parameter_id(name), step, seed)),
            ALIGNED=width % tile["DEPTH"] == 0,
            IGNORED=IGNORED,
            **tile,
        )
    return torch.logsumexp(sums, 0).sub_(picked).masked_fill_(targets == IGNORED, 0.0)


def parts(members: int, length: int, vocabulary: int, tile: dict[str, int]) -> tuple[tuple[int, int, int], int]:
    """The grid (tiles of rows, P, S), and the columns of a part of the vocabulary."""
    across, tiles = triton.cdiv(length, tile["ROWS"]), triton.cdiv(vocabulary, tile["COLUMNS"])
    wanted = min(tiles, triton.cdiv(PROGRAMS, members * across))
    part = triton.cdiv(tiles, wanted) * tile["COLUMNS"]
    return (across, members, triton.cdiv(vocabulary, part)), part


def tile_of(length: int, vocabulary: int, width: int, dtype: torch.dtype) -> dict[str, int]:
    """Rows, columns and depth of a tile, and how a program is run: many rows share the signs, as registers allow."""
    rows = min(256 if width % 64 == 0 else 128, max(16, triton.next_power_of_2(length)))
    if dtype is torch.float32:  # CUDA cores: tensor cores would cut it
        rows, columns, deepest, warps = min(rows, 64), 64, 32, 8
    elif rows <= 64:
        columns, deepest, warps = 64, 128, 4
    else:
        columns, deepest, warps = 128, 64 if rows == 256 else 128, 8
    depth = next((size for size in (128, 64, 32, 16) if size <= deepest and width % size == 0), 16)
    return {
        "ROWS": rows,
        "COLUMNS": min(columns, max(16, triton.next_power_of_2(vocabulary))),
        "DEPTH": depth,
        "STAGES": 2 if depth == 128 else 3,
        "num_warps": warps,
    }


@triton.jit(do_not_specialize=["length", "vocabulary", "part", *NAMES[:3]])
def head_loss_kernel(
    hidden,
    weight,
    bias,
    index,
    scale,
    targets,
    sums,
    picked,
    length,
    vocabulary,
    width,
    part,
    hidden_member,
    hidden_row,
    weight_member,
    weight_row,
    bias_member,
    targets_member,
    targets_row,
    parameter,
    step,
    seed,
    ALIGNED: tl.constexpr,
    IGNORED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    """log Σ exp of some rows' logits over a part of the vocabulary, and their targets' logits if they are in it."""
    member = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < length
    target = tl.load(targets + member * targets_member + row * targets_row, mask=there, other=IGNORED)
    # what is beyond the last row or column is computed as that one is, and does not count
    x_at = hidden + member * hidden_member + tl.minimum(row, length - 1) * hidden_row  # (ROWS,)
    begin = tl.program_id(2) * part
    end = tl.minimum(begin + part, vocabulary)
    highest = tl.full((ROWS,), -3.4e38, dtype=tl.float32)  # finite: a whole tile may be −∞
    total = tl.zeros((ROWS,), dtype=tl.float32)
    chosen = tl.zeros((ROWS,), dtype=tl.float32)
    for first in range(begin, end, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        within = column < end
        logits = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        if index is not None:  # Z before W, so that one sum serves both and s is exact
            start, number = column.to(tl.int64) * width, tl.load(index + member).to(tl.int32)
            logits = add_signed(logits, x_at, start, width, parameter, step, seed, number, DEPTH, ALIGNED, STAGES)
            logits *= tl.load(scale + member)
        weight_at = weight + member * weight_member + tl.minimum(column, vocabulary - 1).to(tl.int64) * weight_row
        logits = add_shared(logits, x_at, weight_at, width, DEPTH, ALIGNED, STAGES)
        if bias is not None:
            own = tl.load(bias + member * bias_member + column, mask=within, other=0.0)
            logits += own.to(tl.float32)[None, :]
        logits = tl.where(within[None, :], logits, float("-inf"))
        higher = tl.maximum(highest, tl.max(logits, 1))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(logits - higher[:, None]), 1)
        highest = higher
        chosen += tl.sum(tl.where(column[None, :] == target[:, None], logits, 0.0), 1)
    at = member * length + row
    whole = tl.num_programs(1).to(tl.int64) * length
    tl.store(sums + tl.program_id(2) * whole + at, highest + tl.log(total), mask=there)
    tl.store(picked + at, chosen, mask=there & (target >= begin) & (target < end))


@triton.jit
def add_signed(
    total,
    x_at,
    start,
    width,
    parameter,
    step,
    seed,
    index,
    DEPTH: tl.constexpr,
    ALIGNED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """total + x Zᵀ, (ROWS, COLUMNS) float32; rows of Z begin at the entries `start` (COLUMNS,)."""
    for first in tl.range(0, width, DEPTH, num_stages=STAGES):
        x = columns(x_at, first, width, DEPTH, ALIGNED)  # 0 where a row of Z has ended
        z = signed_tile(start + first, 1.0, x.dtype, DEPTH, ALIGNED, parameter, step, seed, index)
        total = add_product(total, x, z.T)
    return total
