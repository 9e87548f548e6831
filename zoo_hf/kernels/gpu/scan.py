"""The fused form of the recurrent scans: one program runs all tokens of a head of a member, for some sequences.

R of the head, with signs that are made of their name, is made once and stays in shared memory for all tokens, the
state stays in registers. A product is R_g hᵀ, (D, D) times (D, rows): tensor cores want the long side on the left, and
units are more than sequences. A token's inputs are loaded while the one before it is computed.

Letters: P members, T tokens of each of B sequences, N heads of D units, G gates, S slots of the state.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..scan import Task, width
from .cells import load_gates, load_slots, new_state, store_slots
from .devices import on_device_of
from .noise import rounded, row_signs, signed


INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def tile(task: Task) -> tuple[int, int]:
    """Sequences of a program, and its warps, so that an H100 has registers for all."""
    units, few = width(task.pre.shape[-1]), task.pre.shape[3] <= 16 or task.cell == "slstm"  # it has the most slots
    if task.pre.dtype == torch.float32:
        return 16, 4 if units <= 32 else 8  # no tensor cores: more sequences take more time
    return 16 if few else 32, 4 if units <= 64 else 8


def launch(outputs: Tensor, final: Tensor, task: Task) -> None:
    """Write outputs (P, T, N, B, D), of any strides but 1 the last, and the final state, contiguous."""
    cell, pre, state, recurrent, bias, real, name = task
    members, tokens, heads, batch, gates, size = pre.shape
    rows, warps = tile(task)
    if not final.numel():
        return
    with on_device_of(outputs):
        scan_kernel[(members * heads * triton.cdiv(batch, rows),)](
            outputs,
            final,
            pre,
            state.contiguous(),
            recurrent.contiguous(),
            None if bias is None else bias.contiguous(),
            None if real is None else real.view(torch.uint8),
            None if name is None else name.index.contiguous(),
            None if name is None else name.scale.contiguous(),
            *(tokens, batch, heads),
            0 if len(recurrent) == 1 else recurrent[0].numel(),
            *outputs.stride()[:4],
            *pre.stride()[:5],
            *mask_strides(real),
            *map(signed, (0, 0, 0) if name is None else name.numbers),
            CELL=cell,
            GATES=gates,
            SLOTS=state.shape[1],
            SIZE=size,
            WIDTH=width(size),
            ROWS=rows,
            num_warps=warps,
        )


def mask_strides(real: Tensor | None) -> tuple[int, ...]:
    """Of members, sequences and tokens, of a mask (B, T) or (P, B, T)."""
    return (0, 0, 0) if real is None else (0, *real.stride())[-3:]


@triton.jit(do_not_specialize=["tokens", "batch", "heads", "parameter", "step", "seed"])
def scan_kernel(
    outputs,
    final,
    pre,
    state,
    recurrent,
    candidate_bias,
    real,
    index,
    scale,
    tokens,
    batch,
    heads,
    recurrent_member,
    out_member,
    out_token,
    out_head,
    out_row,
    pre_member,
    pre_token,
    pre_head,
    pre_row,
    pre_gate,
    real_member,
    real_row,
    real_token,
    parameter,
    step,
    seed,
    CELL: tl.constexpr,
    GATES: tl.constexpr,
    SLOTS: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program: all tokens of ROWS sequences of a head of a member, as tensors (WIDTH, ROWS)."""
    tiles = tl.cdiv(batch, ROWS)
    member, head = (tl.program_id(0) // (tiles * heads)).to(tl.int64), tl.program_id(0) // tiles % heads
    row, unit = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    there = (unit < SIZE)[:, None] & (row < batch)[None, :]
    dtype: tl.constexpr = pre.dtype.element_ty
    first, gate = (head * SIZE).to(tl.int64) * SIZE, (heads * SIZE).to(tl.int64) * SIZE
    recurrent += member * recurrent_member
    number, s = 0, 0.0
    if index is not None:
        number, s = tl.load(index + member).to(tl.int32), tl.load(scale + member)
    R0, R1, R2, R3 = matrices(
        recurrent, first, gate, s, index is not None, parameter, step, seed, number, GATES, SIZE, WIDTH, dtype
    )
    place = (member * SLOTS * heads + head) * batch * SIZE + row[None, :] * SIZE + unit[:, None]
    h, c, n, m = load_slots(state + place, heads * batch * SIZE, there, SLOTS)
    bias = 0.0
    if CELL == "slstm":
        m = tl.where(n == 0, float("-inf"), m)
    if CELL == "gru":
        bias = tl.load(candidate_bias + (member * heads + head) * SIZE + unit, mask=unit < SIZE, other=0.0)
        bias = bias.to(tl.float32)[:, None]

    wide = row[None, :].to(tl.int64)
    pre += member * pre_member + head * pre_head + wide * pre_row + unit[:, None]
    outputs += member * out_member + head * out_head + wide * out_row + unit[:, None]
    if real is not None:
        real += member * real_member + row.to(tl.int64) * real_row
    n0, n1, n2, n3 = load_gates(pre, pre_gate, there & (tokens > 0), GATES)
    for t in range(tokens):
        a0, a1, a2, a3 = n0.to(tl.float32), n1.to(tl.float32), n2.to(tl.float32), n3.to(tl.float32)
        pre += pre_token
        n0, n1, n2, n3 = load_gates(pre, pre_gate, there & (t + 1 < tokens), GATES)
        narrow = rounded(h, dtype)
        r0, r1, r2, r3 = products(R0, R1, R2, R3, narrow, GATES)
        new_h, new_c, new_n, new_m = new_state(CELL, a0, a1, a2, a3, r0, r1, r2, r3, bias, h, c, n, m)
        if real is not None:
            now = (tl.load(real, mask=row < batch, other=0) != 0)[None, :]
            real += real_token
            new_h, new_c = tl.where(now, new_h, h), tl.where(now, new_c, c)
            new_n, new_m = tl.where(now, new_n, n), tl.where(now, new_m, m)
        h, c, n, m = new_h, new_c, new_n, new_m
        tl.store(outputs, rounded(h, dtype), mask=there)
        outputs += out_token
    if CELL == "slstm":
        m = tl.where(n == 0, 0.0, m)  # rows that saw no token yet: a state is finite
    store_slots(final + place, heads * batch * SIZE, there, SLOTS, h, c, n, m)


@triton.jit
def products(R0, R1, R2, R3, h, GATES: tl.constexpr):
    """R_g h of a cell's gates, (WIDTH, ROWS) float32; those that it does not have are the first."""
    r0 = product(R0, h)
    r1, r2, r3 = r0, r0, r0
    if GATES >= 3:
        r1, r2 = product(R1, h), product(R2, h)
    if GATES == 4:
        r3 = product(R3, h)
    return r0, r1, r2, r3


@triton.jit
def product(R, h):
    if INTERPRETED:  # it would multiply the bits of bfloat16 as integers
        R, h = R.to(tl.float32), h.to(tl.float32)
    return tl.dot(R, h, input_precision="ieee")


@triton.jit
def matrices(
    recurrent,
    first,
    gate,
    scale,
    NAMED: tl.constexpr,
    parameter,
    step,
    seed,
    index,
    GATES: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    dtype: tl.constexpr,
):
    """R of a head's gates, `gate` entries apart, see `matrix`; those that a cell does not have are the first."""
    R0 = matrix(recurrent, first, scale, NAMED, parameter, step, seed, index, SIZE, WIDTH, dtype)
    R1, R2, R3 = R0, R0, R0
    if GATES >= 3:
        R1 = matrix(recurrent, first + gate, scale, NAMED, parameter, step, seed, index, SIZE, WIDTH, dtype)
        R2 = matrix(recurrent, first + 2 * gate, scale, NAMED, parameter, step, seed, index, SIZE, WIDTH, dtype)
    if GATES == 4:
        R3 = matrix(recurrent, first + 3 * gate, scale, NAMED, parameter, step, seed, index, SIZE, WIDTH, dtype)
    return R0, R1, R2, R3


@triton.jit
def matrix(
    recurrent,
    first,
    scale,
    NAMED: tl.constexpr,
    parameter,
    step,
    seed,
    index,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    dtype: tl.constexpr,
):
    """R of a head's gate, (WIDTH, WIDTH) [out, in], with zeros around its (SIZE, SIZE), from the entry `first` on."""
    unit = tl.arange(0, WIDTH)
    start, there = first + unit * SIZE, (unit < SIZE)[:, None] & (unit < SIZE)[None, :]
    kept: tl.constexpr = recurrent.dtype.element_ty
    made = tl.load(recurrent + start[:, None] + unit[None, :], mask=there, other=0.0).to(tl.float32)
    if NAMED:
        bits = row_signs(start, WIDTH, SIZE == WIDTH, parameter, step, seed, index)
        made = tl.where(there, made + tl.where(bits == 1, scale, -scale), 0.0)
        made = rounded(made, kept).to(tl.float32)  # as a member's own weight would be
    return rounded(made, dtype)
