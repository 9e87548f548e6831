"""What kernels do with tiles of matrices: where a program's own are, reading them, and multiplying them.

Letters: R rows; a tile has ROWS rows or OUTPUTS outputs and INPUTS inputs.
"""

import triton
import triton.language as tl

from .noise import rounded


INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


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
def add_shared(total, left_at, right_at, inputs, INPUTS: tl.constexpr, ALIGNED: tl.constexpr, STAGES: tl.constexpr):
    """total + A Bᵀ, where rows of A and B start at pointers: A is rounded to the dtype of B, which may be narrower."""
    for first in tl.range(0, inputs, INPUTS, num_stages=STAGES):
        right = columns(right_at, first, inputs, INPUTS, ALIGNED)
        left = columns(left_at, first, inputs, INPUTS, ALIGNED).to(right.dtype)
        total = add_product(total, left, right.T)
    return total


@triton.jit
def store_outputs(y, y_t, shared, bias, bias_member, bias_output, member, row, output, rows, outputs):
    """Write to y what it is: y_t (OUTPUTS, ROWS), and the bias and what is in `shared` where there are such."""
    if bias is not None:
        own = tl.minimum(output, outputs - 1)
        y_t += tl.load(bias + member * bias_member + own * bias_output).to(tl.float32)[:, None]
    at = (member * rows + row)[:, None] * outputs + output[None, :]  # (ROWS, OUTPUTS)
    there = (row < rows)[:, None] & (output < outputs)[None, :]
    if shared is not None:
        y_t += tl.load(shared + at, mask=there, other=0.0).T
    tl.store(y + at, rounded(y_t, y.dtype.element_ty).T, mask=there)
