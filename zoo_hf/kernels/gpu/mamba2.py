"""The Triton kernel of `mamba2_scan`: one launch for all tokens, columns of a head's state in the registers of a warp.

A tile is all rows of the state and some columns: sums over rows stay in a warp, and columns never meet.

Letters: B sequences, T tokens of each, G groups of R heads of P values, N state size.
"""

import torch
import triton
import triton.language as tl

from .devices import on_device_of
from .rwkv7 import columns_of


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
    matrices, rows = batch * groups * heads, triton.next_power_of_2(size)
    columns = columns_of(matrices, values, rows)
    with on_device_of(x):
        mamba2_kernel[(matrices, triton.cdiv(values, columns))](
            *(each.contiguous() for each in (x, step, b, c, rates, state)),
            *(outputs, after),
            *(tokens, groups, heads, values, size),
            groups * heads if rates.dim() == 3 else 0,
            SIZE=rows,
            VALUES=columns,
            num_warps=1,  # sums over the state never leave it
        )
    return outputs, after


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
