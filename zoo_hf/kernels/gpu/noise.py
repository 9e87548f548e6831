"""Noise in registers: Philox4x32-10, signs and normals as functions that Triton kernels call.

Integers of counters and keys are signed 32-bit ones with the bits of the unsigned, see `signed`: for larger types a
kernel would be compiled anew.

Letters: K blocks.
"""

import triton
import triton.language as tl


NAMES = ("parameter", "step", "seed", "index")  # arguments of kernels that take no part in what is compiled


def signed(number: int) -> int:
    """The signed 32-bit integer with the bits of an unsigned one."""
    return number - (1 << 32) if number >= 1 << 31 else number


@triton.jit
def philox(block, purpose, parameter, step, seed, index):
    """The four words of every block, uint32 in the blocks' shape; arguments are int32 tensors or scalars."""
    c0, c1, c2, c3 = block.to(tl.uint32), tl.cast(purpose, tl.uint32), parameter.to(tl.uint32), step.to(tl.uint32)
    k0, k1 = seed.to(tl.uint32), index.to(tl.uint32)
    for _ in tl.static_range(10):
        high0, high1 = tl.umulhi(c0, 0xD2511F53), tl.umulhi(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, c2 * 0xCD9E8D57, high0 ^ c3 ^ k1, c0 * 0xD2511F53
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def in_order(first, second, third, fourth):
    """Four tensors (K,) as (K, 4)."""
    return tl.join(tl.join(first, third), tl.join(second, fourth)).reshape(first.shape[0], 4)


@triton.jit
def signs(block, parameter, step, seed, index):
    """The bits, 1 for +1 and 0 for −1, of the entries of K neighbouring blocks, (128 K) int32."""
    w0, w1, w2, w3 = philox(block, 0, parameter, step, seed, index)
    words = in_order(w0, w1, w2, w3)  # (K, 4)
    bits = (words[:, :, None] >> tl.arange(0, 32)[None, None, :].to(tl.uint32)) & 1  # (K, 4, 32)
    return bits.to(tl.int32).reshape(block.shape[0] * 128)


@triton.jit
def plus_minus(value, block, parameter, step, seed, index):
    """±value with the signs of the entries of K neighbouring blocks, (128 K) float32; value is a float32 scalar."""
    w0, w1, w2, w3 = philox(block, 0, parameter, step, seed, index)
    return flipped(value, in_order(w0, w1, w2, w3)).reshape(block.shape[0] * 128)


@triton.jit
def flipped(value, words):
    """value where a bit of words (K, 4) is 1 and −value where it is 0, (K, 4, 32) float32: three instructions each."""
    plus = (words[:, :, None] << (31 - tl.arange(0, 32)[None, None, :]).to(tl.uint32)) & 0x80000000
    return (plus ^ tl.cast(-value, tl.float32).to(tl.uint32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def normals(block, parameter, step, seed, index):
    """The standard normals of K neighbouring blocks, (4 K) float32."""
    w0, w1, w2, w3 = philox(block, 0, parameter, step, seed, index)
    a0, a1 = box_muller(w0, w1)
    a2, a3 = box_muller(w2, w3)
    return in_order(a0, a1, a2, a3).reshape(block.shape[0] * 4)


@triton.jit
def box_muller(first, second):
    """√(−2 ln u) (cos 2πv, sin 2πv), u = (first + 1)/2³² and v = second/2³²."""
    # in the order of the plain one: the sum in integers, rounded once
    radius = tl.sqrt(-2.0 * tl.log((first.to(tl.int64) + 1).to(tl.float32) * 2.0**-32))
    angle = second.to(tl.float32) * (6.283185307179586 * 2.0**-32)
    return radius * tl.cos(angle), radius * tl.sin(angle)


@triton.jit
def row_signs(start, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr, parameter, step, seed, index):
    """The bits of entries start[r] + 0 … COLUMNS − 1 for every row r, (R, COLUMNS) int32.

    Args:
        start: (R,) int64.
        COLUMNS: a power of two.
        ALIGNED: every start is a multiple of 128, and COLUMNS is 128: a block is a row.
    """
    block, offset = (start // 128).to(tl.int32), (start % 128).to(tl.int32)  # (R,)
    if ALIGNED:
        return signs(block, parameter, step, seed, index).reshape(start.shape[0], COLUMNS)
    entry = offset[:, None] + tl.arange(0, COLUMNS)[None, :]  # (R, COLUMNS), counted from the row's first block
    word = tl.zeros((start.shape[0], COLUMNS), dtype=tl.uint32)
    for later in tl.static_range((COLUMNS + 126) // 128 + 1):
        w0, w1, w2, w3 = philox(block + later, 0, parameter, step, seed, index)
        place = entry // 32 - 4 * later
        word = tl.where(place == 0, w0[:, None], word)
        word = tl.where(place == 1, w1[:, None], word)
        word = tl.where(place == 2, w2[:, None], word)
        word = tl.where(place == 3, w3[:, None], word)
    return ((word >> (entry % 32).to(tl.uint32)) & 1).to(tl.int32)


@triton.jit
def rounded(wide, dtype: tl.constexpr):
    """float32 to a floating dtype, to the nearest, ties to even: Triton's interpreter cuts bfloat16 off instead."""
    if dtype == tl.bfloat16:
        bits = wide.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        return tl.where(wide == wide, (bits >> 16).to(tl.uint16), 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return wide.to(dtype)
