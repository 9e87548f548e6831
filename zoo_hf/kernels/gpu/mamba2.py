"""The Triton kernels of `mamba2_scan`: one launch for all tokens, columns of a head's state in registers.

A tile is all rows of the state and some columns, which never meet. Few tokens go one by one, each tile in a warp, so
that sums over rows stay in it. Many go in blocks, whose tokens meet in matrix products (SSD): with aₜ = Σ_{r ≤ t} Δᵣ A
within a block, and S the state before it,

    yₜ = exp(aₜ) Sᵀ Cₜ + Σ_{r ≤ t} exp(aₜ − aᵣ) (Cₜ · Bᵣ) Δᵣ xᵣ      S ← exp(a_Q) S + Σᵣ exp(a_Q − aᵣ) Bᵣ (Δᵣ xᵣ)ᵀ

Letters: B sequences, T tokens of each, Q of a block, G groups of R heads of P values, N state size.
"""

import torch
import triton
import triton.language as tl

from .devices import on_device_of
from .rwkv7 import columns_of


BLOCK = 32  # tokens


def launch(
    x: torch.Tensor, step: torch.Tensor, b: torch.Tensor, c: torch.Tensor, rates: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sᵀ C (B, T, G, R, P), and the state after the last token, (B, G, N, R, P), both float32."""
    batch, tokens, groups, heads, values = x.shape
    size = b.shape[-1]
    outputs = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    after = torch.empty(state.shape, dtype=torch.float32, device=x.device)
    if not outputs.numel() and not after.numel():
        return outputs, after
    arguments = *(each.contiguous() for each in (x, step, b, c, rates, state)), outputs, after
    matrices, sizes = batch * groups * heads, (tokens, groups, heads, values, size)
    rates_sequence, rows = groups * heads if rates.dim() == 3 else 0, triton.next_power_of_2(size)
    with on_device_of(x):
        if tokens < BLOCK:
            columns = columns_of(matrices, values, rows)
            tile = {"SIZE": rows, "VALUES": columns, "num_warps": 1}  # sums over the state never leave a warp
            mamba2_kernel[(matrices, triton.cdiv(values, columns))](*arguments, *sizes, rates_sequence, **tile)
        else:
            tile = tile_of_blocks(rows, values, x.dtype)
            grid = matrices, triton.cdiv(values, tile["VALUES"])
            mamba2_blocks_kernel[grid](*arguments, *sizes, rates_sequence, **tile)
    return outputs, after


def tile_of_blocks(rows: int, values: int, dtype: torch.dtype) -> dict[str, object]:
    """For an H100. Sides of products are 16 at least; those of float32 have no tensor cores, and take registers."""
    exact, columns = dtype == torch.float32, triton.next_power_of_2(values)
    return {
        "SIZE": max(16, rows),
        "VALUES": 16 if exact else min(64, max(16, columns)),
        "BLOCK": 16 if exact else BLOCK,
        "PRECISION": "ieee" if exact else "tf32",  # which has all digits of the narrow types
        "num_warps": 8 if rows > 64 else 4,
    }


@triton.jit(do_not_specialize=["tokens"])
def mamba2_kernel(
    x,
    step,
    b,
    c,
    rates,
    state,
    outputs,
    after,
    tokens,
    groups,
    heads,
    values,
    size,
    rates_sequence,
    SIZE: tl.constexpr,
    VALUES: tl.constexpr,
):
    """All tokens of a sequence's head, for VALUES columns of its state; a token is read while the last is computed."""
    matrix = tl.program_id(0).to(tl.int64)
    group, head = matrix // heads, matrix % (groups * heads)  # of all sequences; of one sequence
    sequence = matrix // (groups * heads)
    row, column = tl.arange(0, SIZE), tl.program_id(1) * VALUES + tl.arange(0, VALUES)
    in_row, in_column = row < size, column < values
    entry = ((group * size + row[:, None]) * heads + matrix % heads) * values + column[None, :]
    held = in_row[:, None] & in_column[None, :]
    s = tl.load(state + entry, mask=held, other=0.0)  # (SIZE, VALUES)
    rate = tl.load(rates + sequence * rates_sequence + head).to(tl.float32)
    of_head = sequence * tokens * groups * heads + head  # place of a token's Δ
    of_group = (sequence * tokens * groups + group % groups) * size + row  # places of its B and C
    x_t, step_t, b_t, c_t = token(x, step, b, c, of_head, of_group, column, values, in_row, in_column, tokens > 0)
    for t in range(tokens):
        of_group += groups * size
        place = of_head + groups * heads
        x_n, step_n, b_n, c_n = token(
            x, step, b, c, place, of_group, column, values, in_row, in_column, t + 1 < tokens
        )
        s = tl.exp(step_t * rate) * s + b_t[:, None] * (step_t * x_t)[None, :]
        tl.store(outputs + of_head * values + column, tl.sum(c_t[:, None] * s, 0), mask=in_column)
        of_head = place
        x_t, step_t, b_t, c_t = x_n, step_n, b_n, c_n
    tl.store(after + entry, s, mask=held)


@triton.jit
def token(x, step, b, c, of_head, of_group, column, values, in_row, in_column, there):
    """What the recurrence reads at a token if it is there, float32: x (VALUES,), Δ, B and C (SIZE,)."""
    in_row, in_column = in_row & there, in_column & there
    return (
        tl.load(x + of_head * values + column, mask=in_column, other=0.0).to(tl.float32),
        tl.load(step + of_head, mask=there, other=0.0).to(tl.float32),
        tl.load(b + of_group, mask=in_row, other=0.0).to(tl.float32),
        tl.load(c + of_group, mask=in_row, other=0.0).to(tl.float32),
    )


@triton.jit(do_not_specialize=["tokens"])
def mamba2_blocks_kernel(
    x,
    step,
    b,
    c,
    rates,
    state,
    outputs,
    after,
    tokens,
    groups,
    heads,
    values,
    size,
    rates_sequence,
    SIZE: tl.constexpr,
    VALUES: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """All tokens of a sequence's head, BLOCK at a time, for VALUES columns of its state."""
    matrix = tl.program_id(0).to(tl.int64)
    group, head = matrix // heads, matrix % (groups * heads)  # of all sequences; of one sequence
    sequence = matrix // (groups * heads)
    row, column = tl.arange(0, SIZE), tl.program_id(1) * VALUES + tl.arange(0, VALUES)
    in_row, in_column = (row < size)[None, :], (column < values)[None, :]
    entry = ((group * size + row[:, None]) * heads + matrix % heads) * values + column[None, :]
    held = (row < size)[:, None] & in_column
    s = tl.load(state + entry, mask=held, other=0.0)  # (SIZE, VALUES)
    rate = tl.load(rates + sequence * rates_sequence + head).to(tl.float32)
    q = tl.arange(0, BLOCK)
    past = q[:, None] >= q[None, :]
    for first in range(0, tokens, BLOCK):
        here = first + q < tokens
        token = sequence * tokens + first + q
        of_head, of_group = token * groups * heads + head, (token * groups + group % groups)[:, None] * size + row
        delta = tl.load(step + of_head, mask=here, other=0.0).to(tl.float32)  # 0 holds the state, also after the end
        b_q = tl.load(b + of_group, mask=here[:, None] & in_row, other=0.0).to(tl.float32)  # (BLOCK, SIZE)
        c_q = tl.load(c + of_group, mask=here[:, None] & in_row, other=0.0).to(tl.float32)
        at, there = of_head[:, None] * values + column, here[:, None] & in_column
        written = delta[:, None] * tl.load(x + at, mask=there, other=0.0).to(tl.float32)  # (BLOCK, VALUES)
        a = tl.cumsum(delta * rate, 0)
        whole = tl.sum(delta * rate, 0)
        decay = tl.where(past, tl.exp(tl.where(past, a[:, None] - a[None, :], 0.0)), 0.0)  # (BLOCK, BLOCK)
        among = decay * tl.dot(c_q, b_q.T, input_precision=PRECISION)
        y = tl.dot(tl.exp(a)[:, None] * c_q, s, input_precision=PRECISION)
        y = tl.dot(among, written, y, input_precision=PRECISION)
        tl.store(outputs + at, y, mask=there)
        kept = (tl.exp(whole - a)[:, None] * b_q).T  # (SIZE, BLOCK)
        s = tl.dot(kept, written, tl.exp(whole) * s, input_precision=PRECISION)
    tl.store(after + entry, s, mask=held)
