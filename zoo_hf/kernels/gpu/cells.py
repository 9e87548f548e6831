"""What a recurrent cell does with its gates, as functions that Triton kernels call; numbers are float32.

The formulas are those of zoo_hf/models/{lstm,gru,slstm,elman}.py. A cell takes the inputs' part of its gates, a0 … a3,
and the state's, r0 … r3 of R h, and has up to four slots of state, h, c, n and m. What it does not have is given back
as it came.
"""

import triton
import triton.language as tl

from .noise import rounded


@triton.jit
def tanh(x):
    """To 1e-7, and finite for every x; `libdevice.tanh` is none of the interpreter's."""
    shrunk = tl.exp(-2.0 * tl.abs(x))
    size = (1.0 - shrunk) / (1.0 + shrunk)
    return tl.where(x < 0, -size, size)


@triton.jit
def log_sigmoid(x):
    return tl.minimum(x, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def new_state(CELL: tl.constexpr, a0, a1, a2, a3, r0, r1, r2, r3, candidate_bias, h, c, n, m):
    """The slots after a token."""
    if CELL == "lstm":
        c = tl.sigmoid(a1 + r1) * c + tl.sigmoid(a0 + r0) * tanh(a2 + r2)
        h = tl.sigmoid(a3 + r3) * tanh(c)
    elif CELL == "gru":
        update = tl.sigmoid(a1 + r1)
        candidate = tanh(a2 + tl.sigmoid(a0 + r0) * (r2 + candidate_bias))
        h = candidate + update * (h - candidate)
    elif CELL == "slstm":
        kept, i = log_sigmoid(a1 + r1) + m, a0 + r0
        m = tl.maximum(kept, i)
        keep, write = tl.exp(kept - m), tl.exp(i - m)
        c = keep * c + write * tanh(a2 + r2)
        n = keep * n + write
        h = tl.sigmoid(a3 + r3) * (c / n)
    else:
        h = tanh(a0 + r0)
    return h, c, n, m


@triton.jit
def load_gates(at, stride, there, GATES: tl.constexpr):
    """A cell's gates, `stride` apart and zero where there are none; those that it does not have are the first."""
    a0 = tl.load(at, mask=there, other=0.0)
    a1, a2, a3 = a0, a0, a0
    if GATES >= 3:
        a1 = tl.load(at + stride, mask=there, other=0.0)
        a2 = tl.load(at + 2 * stride, mask=there, other=0.0)
    if GATES == 4:
        a3 = tl.load(at + 3 * stride, mask=there, other=0.0)
    return a0, a1, a2, a3


@triton.jit
def load_slots(at, stride, there, SLOTS: tl.constexpr):
    """A cell's slots in float32, likewise."""
    h = tl.load(at, mask=there, other=0.0).to(tl.float32)
    c, n, m = h, h, h
    if SLOTS >= 2:
        c = tl.load(at + stride, mask=there, other=0.0).to(tl.float32)
    if SLOTS == 4:
        n = tl.load(at + 2 * stride, mask=there, other=0.0).to(tl.float32)
        m = tl.load(at + 3 * stride, mask=there, other=0.0).to(tl.float32)
    return h, c, n, m


@triton.jit
def store_slots(at, stride, there, SLOTS: tl.constexpr, h, c, n, m):
    """What `load_slots` reads, in the dtype of the memory."""
    dtype: tl.constexpr = at.dtype.element_ty
    tl.store(at, rounded(h, dtype), mask=there)
    if SLOTS >= 2:
        tl.store(at + stride, rounded(c, dtype), mask=there)
    if SLOTS == 4:
        tl.store(at + 2 * stride, rounded(n, dtype), mask=there)
        tl.store(at + 3 * stride, rounded(m, dtype), mask=there)
