"""The Triton kernel of `rwkv7_scan`: one launch for all tokens, columns of a head's state in the registers of a warp.

A tile is all rows of the state, its keys, and some columns: sums over rows stay in a warp, and columns never meet.

Letters: B sequences, T tokens of each, N heads of D units.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .devices import on_device_of


HELD = 2048  # numbers of the state in a warp, 64 registers of each thread
PROGRAMS = 1056  # eight for each multiprocessor of an H100: with fewer each holds less of the state


def launch(steps: Sequence[torch.Tensor], state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs (B, T, N, D) and the state after the last token, (B, N, D, D), both float32."""
    batch, tokens, heads, size = steps[0].shape
    outputs = torch.empty(steps[0].shape, dtype=torch.float32, device=state.device)
    after = torch.empty(state.shape, dtype=torch.float32, device=state.device)
    if not after.numel():
        return outputs, after
    keys = triton.next_power_of_2(size)
    values = columns_of(batch * heads, size, keys)
    with on_device_of(state):
        rwkv7_kernel[(batch * heads, triton.cdiv(size, values))](
            *(each.contiguous() for each in (*steps, state)),
            *(outputs, after),
            *(tokens, heads, size),
            KEYS=keys,
            VALUES=values,
            num_warps=1,  # sums over keys never leave it
        )
    return outputs, after


def columns_of(matrices: int, size: int, rows: int) -> int:
    """Columns of a matrix that a program holds: a power of two."""
    columns = max(1, min(HELD // rows, triton.next_power_of_2(size)))
    while columns > 8 and matrices * triton.cdiv(size, columns) < PROGRAMS:
        columns //= 2
    return columns


@triton.jit(do_not_specialize=["tokens"])
def rwkv7_kernel(
    r,
    log_decay,
    k,
    v,
    kappa,
    rate,
    state,
    outputs,
    after,
    tokens,
    heads,
    size,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
):
    """All tokens of a sequence's head, for VALUES columns of its state; a token is read while the last is computed."""
    matrix = tl.program_id(0).to(tl.int64)
    key, value = tl.arange(0, KEYS), tl.program_id(1) * VALUES + tl.arange(0, VALUES)
    in_key, in_value = key < size, value < size
    entry = matrix * size * size + key[:, None] * size + value[None, :]
    held = in_key[:, None] & in_value[None, :]
    s = tl.load(state + entry, mask=held, other=0.0)  # (KEYS, VALUES)
    start = (matrix // heads * tokens * heads + matrix % heads) * size
    row, column = start + key, start + value  # of a token
    r_t, w_t, k_t, v_t, kappa_t, rate_t = token(
        r, log_decay, k, v, kappa, rate, row, column, in_key, in_value, tokens > 0
    )
    for t in range(tokens):
        row += heads * size
        more = t + 1 < tokens
        r_n, w_n, k_n, v_n, kappa_n, rate_n = token(
            r, log_decay, k, v, kappa, rate, row, column + heads * size, in_key, in_value, more
        )
        forgotten = tl.sum(kappa_t[:, None] * s, 0)  # (VALUES,), the value at κ
        s = tl.exp(w_t)[:, None] * s - (rate_t * kappa_t)[:, None] * forgotten[None, :] + k_t[:, None] * v_t[None, :]
        tl.store(outputs + column, tl.sum(r_t[:, None] * s, 0), mask=in_value)
        column += heads * size
        r_t, w_t, k_t, v_t, kappa_t, rate_t = r_n, w_n, k_n, v_n, kappa_n, rate_n
    tl.store(after + entry, s, mask=held)


@triton.jit
def token(r, log_decay, k, v, kappa, rate, row, column, in_key, in_value, there):
    """What the recurrence reads at a token if it is there, float32: (KEYS,) each, v (VALUES,)."""
    in_key, in_value = in_key & there, in_value & there
    return (
        tl.load(r + row, mask=in_key, other=0.0).to(tl.float32),
        tl.load(log_decay + row, mask=in_key, other=0.0).to(tl.float32),
        tl.load(k + row, mask=in_key, other=0.0).to(tl.float32),
        tl.load(v + column, mask=in_value, other=0.0).to(tl.float32),
        tl.load(kappa + row, mask=in_key, other=0.0).to(tl.float32),
        tl.load(rate + row, mask=in_key, other=0.0).to(tl.float32),
    )
