"""The Triton kernel of `perturbed_linear_population`: signs are made in registers, as an operand of the tensor cores.

A tile of y is computed transposed, so that Z is the left operand, which alone may come from registers. It has as many
rows as registers allow, as signs are made again for each tile of them, and as many outputs as a Philox block has bits,
so that the two together fill the accumulators of one warp group or two.

Letters: P members, K rows of each, I inputs, O outputs.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .devices import on_device_of
from .noise import NAMES, rounded, signed_tile
from .tiles import INTERPRETED, add_product, add_shared, columns, place, store_outputs


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
    with on_device_of(y):
        linear_kernel[(members * triton.cdiv(rows, tile.rows) * triton.cdiv(outputs, tile.outputs),)](
            *(y, x, weight, bias, shared, index.contiguous(), scale.contiguous()),
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


@triton.jit(do_not_specialize=["members", "rows", *NAMES[:3]])
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
        y_t = add_signed(
            y_t,
            x_at,
            weight_at,
            start,
            inputs,
            length,
            parameter,
            step,
            seed,
            number,
            FORM == "fused",
            INPUTS,
            ALIGNED,
            STAGES,
        )
    if FORM == "apart" or FORM == "shared":
        y_t = add_shared(y_t, weight_at, x_at, inputs, PLAIN_INPUTS, ALIGNED, PLAIN_STAGES)
    store_outputs(y, y_t, shared, bias, bias_member, bias_output, member, row, output, rows, outputs)


@triton.jit
def add_signed(
    y_t,
    x_at,
    weight_at,
    start,
    inputs,
    scale,
    parameter,
    step,
    seed,
    index,
    FUSED: tl.constexpr,
    INPUTS: tl.constexpr,
    ALIGNED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """y_t, which is zero, + (W + s Z) xᵀ or s Z xᵀ, (OUTPUTS, ROWS): rows of Z begin at the entries `start`."""
    unit = scale if FUSED else 1.0
    for first in tl.range(0, inputs, INPUTS, num_stages=STAGES):
        inner = columns(x_at, first, inputs, INPUTS, ALIGNED)  # (ROWS, INPUTS)
        z = signed_tile(start + first, unit, inner.dtype, INPUTS, ALIGNED, parameter, step, seed, index)
        if FUSED:  # on the right: from registers on the left, `ptxas` would make each product wait
            w = columns(weight_at, first, inputs, INPUTS, ALIGNED)
            y_t = add_product(y_t.T, inner, displaced(w, z).T).T
        else:
            y_t = add_product(y_t, z, inner.T)
    # x W is added later, so that one sum serves both and s is exact
    return y_t if FUSED else y_t * scale


@triton.jit
def displaced(w, z):
    """W + s z, rounded once."""
    # interpreted, it would add the bits of bfloat16 as integers
    return rounded(w.to(tl.float32) + z.to(tl.float32), w.dtype) if INTERPRETED else w + z
