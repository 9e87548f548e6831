"""The Triton kernel of `low_rank_linear_population`: both skinny products in the program that multiplies by W.

A tile of y is computed transposed, as `linear_kernel` does. It is tall, as programs of the same rows all compute x B,
and wide enough for the tensor cores.

Letters: P members, K rows of each, I inputs, O outputs, r the rank.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .devices import on_device_of
from .linear import FEW_ROWS, Tile, run
from .noise import rounded
from .tiles import add_product, columns, place, store_outputs


RANK = 16  # what tensor cores multiply at least: smaller ranks are filled up with zeros


def tile_of(x: Tensor) -> Tile:
    """For an H100; the more outputs, the fewer programs compute x B again."""
    if x.dtype == torch.float32:
        return Tile(64, min(64, max(16, triton.next_power_of_2(x.shape[1]))), 32, 2, 32, 2, 8)
    if x.shape[1] > FEW_ROWS:
        return Tile(128 if x.shape[2] % 16 else 256, 128, 64, 3, 64, 3, 8)  # as rows of ragged lengths need registers
    return Tile(128, max(16, triton.next_power_of_2(x.shape[1])), 64, 4, 64, 4, 4)


def launch(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, left: Tensor, right: Tensor) -> None:
    """Write the layer's outputs to y, (P, K, O) and contiguous."""
    (members, rows, inputs), outputs, tile, shared = x.shape, weight.shape[0], tile_of(x), None
    if not y.numel():
        return
    if members > 1 and rows <= FEW_ROWS:
        shared = torch.empty(y.shape, dtype=torch.float32, device=y.device)
        flat, none = x.reshape(1, members * rows, inputs), x.new_empty(0)  # of what names a direction
        run(shared.view(1, members * rows, outputs), flat, weight, None, None, none, none, (0, 0, 0), "shared")
    x, weight = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (x, weight))
    factor = x.new_zeros(members, RANK, inputs)
    factor[:, : right.shape[2]] = right.mT  # its rows are read as those of x are
    with on_device_of(y):
        low_rank_kernel[(members * triton.cdiv(rows, tile.rows) * triton.cdiv(outputs, tile.outputs),)](
            *(y, x, weight, bias, shared, left, factor),
            *(members, rows, outputs, inputs),
            *(x.stride(0), x.stride(1), weight.stride(0)),
            *((0, 0) if bias is None else bias.stride()),
            *left.stride(),
            TAKEN=left.shape[2],
            RANK=RANK,
            ALIGNED=inputs % tile.inputs == 0,
            OUTPUTS=tile.outputs,
            ROWS=tile.rows,
            INPUTS=tile.inputs,
            STAGES=tile.stages,
            num_warps=tile.warps,
        )


@triton.jit(do_not_specialize=["members", "rows"])
def low_rank_kernel(
    y,
    x,
    weight,
    bias,
    shared,
    left,
    factor,
    members,
    rows,
    outputs,
    inputs,
    x_member,
    x_row,
    weight_row,
    bias_member,
    bias_output,
    left_member,
    left_output,
    left_column,
    TAKEN: tl.constexpr,
    RANK: tl.constexpr,
    ALIGNED: tl.constexpr,
    OUTPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    INPUTS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program computes OUTPUTS outputs of ROWS rows of a member, transposed; x Wᵀ is in `shared` or made here.

    TAKEN: r. factor: Bᵀ, (P, RANK, I) and contiguous, zero beyond r.
    """
    member, row, output = place(members, rows, outputs, ROWS, OUTPUTS)
    x_at = x + member * x_member + tl.minimum(row, rows - 1) * x_row  # (ROWS)
    own = tl.minimum(output, outputs - 1)
    weight_at = weight + own * weight_row  # (OUTPUTS)
    factor_at = factor + (member * RANK + tl.arange(0, RANK)) * inputs  # (RANK)
    y_t, projected = tl.zeros((OUTPUTS, ROWS), tl.float32), tl.zeros((ROWS, RANK), tl.float32)
    for first in tl.range(0, inputs, INPUTS, num_stages=STAGES):
        inner = columns(x_at, first, inputs, INPUTS, ALIGNED)  # (ROWS, INPUTS)
        projected = add_product(projected, inner, columns(factor_at, first, inputs, INPUTS, ALIGNED).T)
        if shared is None:
            w = columns(weight_at, first, inputs, INPUTS, ALIGNED).to(inner.dtype)
            y_t = add_product(y_t, w, inner.T)
    column = tl.arange(0, RANK)
    a_at = left + member * left_member + own[:, None] * left_output + column[None, :] * left_column
    a = tl.load(a_at, mask=column[None, :] < TAKEN, other=0.0)  # (OUTPUTS, RANK)
    y_t = add_factors(y_t, a, rounded(projected, x.dtype.element_ty).T)
    store_outputs(y, y_t, shared, bias, bias_member, bias_output, member, row, output, rows, outputs)


@triton.jit
def add_factors(total, left, right):
    """total + A right, where A may be wider than right: then as the sum of two numbers, for what is rounded off."""
    most = rounded(left.to(tl.float32), right.dtype)
    total = add_product(total, most, right)
    if left.dtype != right.dtype:
        total = add_product(total, rounded(left.to(tl.float32) - most.to(tl.float32), right.dtype), right)
    return total
