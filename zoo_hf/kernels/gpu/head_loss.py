"""The Triton kernel of `head_loss_population`: one walk over the vocabulary with an online log Σ exp.

Letters: P members, K rows of hidden states, D their width, V vocabulary, S parts of the vocabulary.
"""

import torch
import triton
import triton.language as tl

from ...noise import parameter_id
from ..head_loss import IGNORED
from .noise import NAMES, in_order, philox, signed


INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
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
    head_loss_kernel[grid](
        hidden,
        weight,
        *(each if each is None else each.contiguous() for each in (bias, index, scale)),
        targets,
        sums,
        picked,
        *(length, vocabulary, width, part),
        *hidden.stride()[:2],
        *(weight.stride()[:2] if weight.dim() == 3 else (0, weight.stride(0))),
        vocabulary if own_bias else 0,
        *targets.stride(),
        *map(signed, (parameter_id(name), step, seed)),
        FITS=width % tile["DEPTH"] == 0,
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
    FITS: tl.constexpr,
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
    lines = hidden + member * hidden_member + row * hidden_row  # (ROWS,)
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
            logits = add_signed(logits, lines, there, start, width, parameter, step, seed, number, FITS, DEPTH, STAGES)
            logits *= tl.load(scale + member)
        matrix = weight + member * weight_member + column.to(tl.int64) * weight_row  # (COLUMNS,)
        logits = add_shared(logits, lines, there, matrix, within, width, FITS, DEPTH, STAGES)
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
    lines,
    there,
    start,
    width,
    parameter,
    step,
    seed,
    index,
    FITS: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    """total + x Zᵀ, (ROWS, COLUMNS) float32; rows of Z begin at the entries `start` (COLUMNS,); see `tile_at`."""
    for first in tl.range(0, width, DEPTH, num_stages=STAGES):
        x = tile_at(lines, there, first, width, FITS, DEPTH)  # 0 where a row of Z has ended
        z = signs_of(start + first, DEPTH, FITS, x.dtype, parameter, step, seed, index)
        total = add_product(total, x, z.T)
    return total


@triton.jit
def add_shared(
    total, lines, there, matrix, within, width, FITS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr
):
    """total + x Wᵀ, (ROWS, COLUMNS) float32; see `tile_at`."""
    for first in tl.range(0, width, DEPTH, num_stages=STAGES):
        w = tile_at(matrix, within, first, width, FITS, DEPTH)
        total = add_product(total, tile_at(lines, there, first, width, FITS, DEPTH), w.T)
    return total


@triton.jit
def tile_at(lines, there, first, width, FITS: tl.constexpr, DEPTH: tl.constexpr):
    """Entries first … first + DEPTH − 1 of rows that start at the pointers `lines` (R,), zeros if not `there`."""
    place = first + tl.arange(0, DEPTH)
    mask = there[:, None] if FITS else there[:, None] & (place < width)[None, :]
    return tl.load(lines[:, None] + place[None, :], mask=mask, other=0.0)


@triton.jit
def add_product(total, left, right):
    """total + left right in float32."""
    if INTERPRETED:  # it would multiply the bits of bfloat16 as integers
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision="ieee")


@triton.jit
def signs_of(start, DEPTH: tl.constexpr, FITS: tl.constexpr, dtype: tl.constexpr, parameter, step, seed, index):
    """±1 of entries start[r] + 0 … DEPTH − 1 for every row r, (R, DEPTH).

    Args:
        start: (R,) int64.
        FITS: every start is a multiple of DEPTH: a row is in one block. If not, DEPTH is at most 32.
    """
    block, place = (start // 128).to(tl.int32), (start % 128).to(tl.int32)
    w0, w1, w2, w3 = philox(block, 0, parameter, step, seed, index)
    if DEPTH == 128:
        words = in_order(w0, w1, w2, w3)  # (R, 4)
    elif DEPTH == 64:
        words = tl.join(tl.where(place == 0, w0, w2), tl.where(place == 0, w1, w3))  # (R, 2)
    else:
        word = nth(place // 32, w0, w1, w2, w3) >> place % 32
        if not FITS:
            after, _, _, _ = philox(block + 1, 0, parameter, step, seed, index)
            word |= nth(place // 32, w1, w2, w3, after) << 1 << 31 - place % 32  # 32 at once would be undefined
        words = tl.join(word, word >> DEPTH // 2)  # joined, as otherwise each thread would make its rows' blocks
    each: tl.constexpr = DEPTH // words.shape[1]
    bits = (words[:, :, None] >> tl.arange(0, each)[None, None, :].to(tl.uint32)) & 1
    bits = bits.reshape(start.shape[0], DEPTH)
    # the sign is the first bit of a number: faster than to choose or to convert
    if dtype == tl.float32:
        return ((bits << 31) ^ 0xBF800000).to(dtype, bitcast=True)
    elif dtype == tl.bfloat16:
        return ((bits << 15) ^ 0xBF80).to(tl.uint16).to(dtype, bitcast=True)
    else:
        return ((bits << 15) ^ 0xBC00).to(tl.uint16).to(dtype, bitcast=True)


@triton.jit
def nth(place, w0, w1, w2, w3):
    """The word at each of the places 0 … 3."""
    return tl.where(place < 2, tl.where(place == 0, w0, w1), tl.where(place == 2, w2, w3))
