"""The Triton kernel of `perturbed_linear_population`: signs are made in registers, as an operand of the tensor cores.

A tile of y is computed transposed, so that Z is the left operand, which alone may come from registers.

Letters: P members, K rows of each, I inputs, O outputs.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .noise import in_order, philox, rounded


INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
NUMBERS = ("members", "rows", "parameter", "step", "seed")  # take no part in what is compiled
FEW_ROWS = 64  # members with so few rows share one product with W: reading it takes longer than multiplying


class Tile(NamedTuple):
    """What a program computes, and how: lengths along each axis, stages of the loops' pipelines, and warps."""

    outputs: int
    rows: int
    inputs: int  # of a step with signs
    stages: int
    plain_inputs: int  # of a step without signs
    plain_stages: int
    warps: int


def tile_of(x: Tensor, weight: Tensor, form: str) -> Tile:
    """For an H100: what fits its registers and shared memory; many rows, as signs are made for each tile of them."""
    ragged = x.shape[2] % 16 != 0  # such rows take many registers for their addresses
    rows = min(128 if ragged else 256, max(16, triton.next_power_of_2(x.shape[1])))
    if x.dtype == torch.float32:
        return Tile(64, min(rows, 64), 32, 2, 32, 2, 8)  # CUDA cores: tensor cores would cut float32
    plain_stages = 4 if weight.dtype == x.dtype else 3
    if form != "fused":  # a step of 128 makes each Philox block once
        inputs, stages = (64, 4) if x.shape[2] % 128 else (128, 3)
        return Tile(128, rows, inputs, stages, 64, plain_stages, 4 if rows <= 64 else 8)
    if rows == 256 or ragged:
        return Tile(128, rows, 64, 4, 64, plain_stages, 8)
    # two programs share a multiprocessor: one makes signs while the other multiplies
    return Tile(128, rows, 64, 3, 64, plain_stages, 4)


def launch(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    scale: Tensor,
    name: tuple[int, int, int],
    form: str,
) -> None:
    """Write the layer's outputs to y, (P, K, O) and contiguous; name: the parameter's, step and seed, signed."""
    (members, rows, inputs), own = x.shape, (index, scale, name)
    if not y.numel():
        return
    if members > 1 and rows <= FEW_ROWS:
        shared = torch.empty(y.shape, dtype=torch.float32, device=y.device)
        flat = x.reshape(1, members * rows, inputs)
        run(shared.view(1, members * rows, y.shape[2]), flat, weight, None, None, *own, "shared")
        run(y, x, weight, bias, shared, *own, "own")
    else:
        fused = form == "fused" and weight.dtype == x.dtype and rows > FEW_ROWS
        run(y, x, weight, bias, None, *own, "fused" if fused else "apart")


def run(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shared: Tensor | None,
    index: Tensor,
    scale: Tensor,
    name: tuple[int, int, int],
    form: str,
) -> None:
    """One launch; `shared`, like y in float32, is added."""
    (members, rows, inputs), outputs, tile = x.shape, weight.shape[0], tile_of(x, weight, form)
    x, weight = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (x, weight))
    linear_kernel[(members * triton.cdiv(rows, tile.rows) * triton.cdiv(outputs, tile.outputs),)](
        y,
        x,
        weight,
        bias,
        shared,
        index.contiguous(),
        scale.contiguous(),
        *(members, rows, outputs, inputs),
        *(x.stride(0), x.stride(1), weight.stride(0)),
        *((0, 0) if bias is None else bias.stride()),
        *name,
        FORM=form,
        ALIGNED=inputs % tile.inputs == 0,
        OUTPUTS=tile.outputs,
        ROWS=tile.rows,
        INPUTS=tile.inputs,
        STAGES=tile.stages,
        PLAIN_INPUTS=tile.plain_inputs,
        PLAIN_STAGES=tile.plain_stages,
        num_warps=tile.warps,
    )


@triton.jit(do_not_specialize=NUMBERS)
def linear_kernel(
    y,
    x,
    weight,
    bias,
    shared,
    index,
    scale,
    members,
    rows,
    outputs,
    inputs,
    x_member,
    x_row,
    weight_row,
    bias_member,
    bias_output,
    parameter,
    step,
    seed,
    FORM: tl.constexpr,
    ALIGNED: tl.constexpr,
    OUTPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    INPUTS: tl.constexpr,
    STAGES: tl.constexpr,
    PLAIN_INPUTS: tl.constexpr,
    PLAIN_STAGES: tl.constexpr,
):
    """One program computes OUTPUTS outputs of ROWS rows of a member.

    FORM: "fused" x (W + s Z)ᵀ, "apart" s x Zᵀ + x Wᵀ, "own" s x Zᵀ, "shared" x Wᵀ.
    """
    member, row, output = place(members, rows, outputs, ROWS, OUTPUTS)
    # what is beyond the last row or output is computed as that one is, and not stored
    x_at = x + member * x_member + tl.minimum(row, rows - 1) * x_row  # (ROWS)
    own = tl.minimum(output, outputs - 1)
    weight_at, start = weight + own * weight_row, own * inputs  # (OUTPUTS) each
    y_t = tl.zeros((OUTPUTS, ROWS), tl.float32)
    if FORM != "shared":
        number, length = tl.load(index + member).to(tl.int32), tl.load(scale + member)
        unit = length if FORM == "fused" else 1.0
        for first in tl.range(0, inputs, INPUTS, num_stages=STAGES):
            inner = columns(x_at, first, inputs, INPUTS, ALIGNED)  # (ROWS, INPUTS)
            z = signed_tile(start + first, unit, inner.dtype, INPUTS, ALIGNED, parameter, step, seed, number)
            if FORM == "fused":  # on the right: from registers on the left, `ptxas` would make each product wait
                w = columns(weight_at, first, inputs, INPUTS, ALIGNED)
                y_t = add_product(y_t.T, inner, displaced(w, z).T).T
            else:
                y_t = add_product(y_t, z, inner.T)
        # W comes second and Z first, so that one sum serves both and s is exact
        y_t = y_t if FORM == "fused" else y_t * length
    if FORM == "apart" or FORM == "shared":
        for first in tl.range(0, inputs, PLAIN_INPUTS, num_stages=PLAIN_STAGES):
            inner = columns(x_at, first, inputs, PLAIN_INPUTS, ALIGNED)
            w = columns(weight_at, first, inputs, PLAIN_INPUTS, ALIGNED).to(inner.dtype)
            y_t = add_product(y_t, w, inner.T)
    if bias is not None:
        y_t += tl.load(bias + member * bias_member + own * bias_output).to(tl.float32)[:, None]
    at = (member * rows + row)[:, None] * outputs + output[None, :]  # (ROWS, OUTPUTS)
    there = (row < rows)[:, None] & (output < outputs)[None, :]
    if shared is not None:
        y_t += tl.load(shared + at, mask=there, other=0.0).T
    tl.store(y + at, rounded(y_t, y.dtype.element_ty).T, mask=there)


@triton.jit
def place(members, rows, outputs, ROWS: tl.constexpr, OUTPUTS: tl.constexpr):
    """This program's member, and its rows (ROWS) and outputs (OUTPUTS), all int64.

    Eight tiles of rows take turns at the same outputs, so that x and W are found in the cache.
    """
    per_member, across = tl.cdiv(rows, ROWS), tl.cdiv(outputs, OUTPUTS)
    group = tl.program_id(0) // (8 * across)
    height = tl.minimum(members * per_member - 8 * group, 8)
    within = tl.program_id(0) % (8 * across)
    tile = 8 * group + within % height
    row = (tile % per_member).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    return (tile // per_member).to(tl.int64), row, (within // height).to(tl.int64) * OUTPUTS + tl.arange(0, OUTPUTS)


@triton.jit
def columns(row_at, first, inputs, INPUTS: tl.constexpr, ALIGNED: tl.constexpr):
    """Entries first … first + INPUTS − 1 of rows that start at pointers (R), zeros beyond the last, (R, INPUTS)."""
    column = first + tl.arange(0, INPUTS)
    if ALIGNED:
        entries = tl.load(row_at[:, None] + column[None, :])
    else:
        entries = tl.load(row_at[:, None] + column[None, :], mask=(column < inputs)[None, :], other=0.0)
    return entries


@triton.jit
def add_product(total, left, right):
    """total + left right in float32."""
    if INTERPRETED:  # it would multiply the bits of bfloat16 as integers
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision="ieee")


@triton.jit
def displaced(w, z):
    """W + s z, rounded once."""
    # interpreted, it would add the bits of bfloat16 as integers
    return rounded(w.to(tl.float32) + z.to(tl.float32), w.dtype) if INTERPRETED else w + z


@triton.jit
def signed_tile(
    start, unit, dtype: tl.constexpr, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr, parameter, step, seed, index
):
    """± unit, which is exact in dtype, for entries start[r] + 0 … COLUMNS − 1 of every row r, (R, COLUMNS).

    Args:
        start: (R,) int64.
        COLUMNS: 32, 64 or 128; the last only where ALIGNED.
        ALIGNED: all starts are multiples of COLUMNS.
    """
    words = words_at(start, COLUMNS, ALIGNED, parameter, step, seed, index)  # (R, COLUMNS / 32)
    minus = (-unit).to(dtype)
    if dtype == tl.float32:
        places = 31 - tl.arange(0, 32).to(tl.uint32)
        bits = words[:, :, None] << places[None, None, :] & 0x80000000  # (R, COLUMNS / 32, 32)
        z = bits ^ minus.to(tl.uint32, bitcast=True)
    else:
        z = halved(words, minus.to(tl.uint16, bitcast=True).to(tl.uint32), COLUMNS)
    return z.reshape(start.shape[0], COLUMNS).to(dtype, bitcast=True)


@triton.jit
def halved(words, minus, COLUMNS: tl.constexpr):
    """The 16 bits of ± unit for each bit of words (R, W), (R, 2 W, 8, 2), in two instructions for each pair.

    Entries 2k and 2k + 1 of a half word become the signs of the two halves of one word.
    """
    # of each half word the even bits go to the lower half and the odd ones to the same places of the upper
    lower = (words & 0xFFFF) | (words << 15 & 0xFFFF0000)
    upper = (words >> 16) | (words >> 1 & 0xFFFF0000)
    halves = tl.join(lower, upper).reshape(words.shape[0], COLUMNS // 16)
    places = 15 - 2 * tl.arange(0, 8).to(tl.uint32)
    pairs = (halves[:, :, None] << places[None, None, :] & 0x80008000) ^ (minus | minus << 16)  # (R, 2 W, 8)
    return tl.join((pairs & 0xFFFF).to(tl.uint16), (pairs >> 16).to(tl.uint16))


@triton.jit
def words_at(start, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr, parameter, step, seed, index):
    """The bits of entries start[r] + 0 … COLUMNS − 1 of every row, (R, COLUMNS / 32)."""
    block, skipped = (start // 128).to(tl.int32), (start % 128).to(tl.int32)
    w0, w1, w2, w3 = philox(block, 0, parameter, step, seed, index)
    if COLUMNS == 128:
        words = in_order(w0, w1, w2, w3)
    else:  # go on by two words, then by one, then by bits
        by_two, by_one = skipped >= 64, skipped % 64 >= 32
        w0, w1 = tl.where(by_two, w2, w0), tl.where(by_two, w3, w1)
        if not ALIGNED:
            w4, w5, _, _ = philox(block + 1, 0, parameter, step, seed, index)
            w2, w3 = tl.where(by_two, w4, w2), tl.where(by_two, w5, w3)
            w0, w1, w2 = tl.where(by_one, w1, w0), tl.where(by_one, w2, w1), tl.where(by_one, w3, w2)
            bits = (skipped % 32).to(tl.uint32)
            w0, w1 = later(w0, w1, bits), later(w1, w2, bits)
        elif COLUMNS == 32:
            w0 = tl.where(by_one, w1, w0)
        words = tl.join(w0, w1) if COLUMNS == 64 else w0[:, None]
    return words


@triton.jit
def later(word, following, bits):
    """32 bits of two words after the first so many, fewer than 32."""
    return (word >> bits) | (following << 1 << (31 - bits))
