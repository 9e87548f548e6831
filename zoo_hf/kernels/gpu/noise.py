"""Noise in registers: signs and normals as functions that Triton kernels call.

Signs are made for neighbouring blocks (`plus_minus`) or for rows that begin anywhere in a parameter: as numbers that
tensor cores multiply or that are added (`signed_tile`), or as bits (`row_signs`).

Letters: K blocks, R rows of C = COLUMNS entries, W words of a row.
"""

import triton
import triton.language as tl

from .philox import in_order, philox


NAMES = ("parameter", "step", "seed", "index")  # arguments of kernels that take no part in what is compiled


def signed(number: int) -> int:
    """The signed 32-bit integer with the bits of an unsigned one."""
    return number - (1 << 32) if number >= 1 << 31 else number


@triton.jit
def plus_minus(value, block, parameter, step, seed, index):
    """±value, float32, with the signs of K neighbouring blocks, (128 K): for a part of a parameter."""
    w0, w1, w2, w3 = philox(block, 0, parameter, step, seed, index)
    return flipped(value, in_order(w0, w1, w2, w3), 32).reshape(block.shape[0] * 128)


@triton.jit
def flipped(value, words, EACH: tl.constexpr):
    """value where one of the EACH lower bits of words (R, W) is 1 and −value where it is 0, (R, W, EACH) float32."""
    places = 31 - tl.arange(0, EACH).to(tl.uint32)
    plus = words[:, :, None] << places[None, None, :] & 0x80000000
    return (plus ^ tl.cast(-value, tl.float32).to(tl.uint32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def signed_tile(
    start, unit, dtype: tl.constexpr, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr, parameter, step, seed, index
):
    """± unit for entries start[r] + 0 … C − 1 of every row, (R, C): what is multiplied, or added to weights.

    Args:
        start: (R,) int64.
        unit: exact in dtype.
        COLUMNS: C, 16, 32, 64 or 128.
        ALIGNED: all starts are multiples of C: a row is in one block.
    """
    words = words_at(start, COLUMNS, ALIGNED, parameter, step, seed, index)
    each: tl.constexpr = COLUMNS // words.shape[1]
    if dtype == tl.float32:
        z = flipped(unit, words, each)
    else:
        z = halved(words, tl.cast(-unit, dtype).to(tl.uint16, bitcast=True).to(tl.uint32), each)
    return z.reshape(start.shape[0], COLUMNS).to(dtype, bitcast=True)


@triton.jit
def halved(words, minus, EACH: tl.constexpr):
    """The 16 bits of ± unit for each of the EACH lower bits of words (R, W), in two instructions for each pair.

    Entries 2k and 2k + 1 of a half word become the signs of the two halves of one word.
    """
    # of each half word the even bits go to the lower half and the odd ones to the same places of the upper
    lower = (words & 0xFFFF) | (words << 15 & 0xFFFF0000)
    if EACH == 32:
        upper = (words >> 16) | (words >> 1 & 0xFFFF0000)
        lower = tl.join(lower, upper).reshape(words.shape[0], 2 * words.shape[1])
    pairs_of_each: tl.constexpr = 8 if EACH == 32 else EACH // 2
    places = 15 - 2 * tl.arange(0, pairs_of_each).to(tl.uint32)
    pairs = (lower[:, :, None] << places[None, None, :] & 0x80008000) ^ (minus | minus << 16)
    return tl.join((pairs & 0xFFFF).to(tl.uint16), (pairs >> 16).to(tl.uint16))


@triton.jit
def row_signs(start, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr, parameter, step, seed, index):
    """The bits, 1 for +1 and 0 for −1, of the same entries, (R, C) int32: where what they choose is no number."""
    words = words_at(start, COLUMNS, ALIGNED, parameter, step, seed, index)
    each: tl.constexpr = COLUMNS // words.shape[1]
    bits = (words[:, :, None] >> tl.arange(0, each)[None, None, :].to(tl.uint32)) & 1
    return bits.to(tl.int32).reshape(start.shape[0], COLUMNS)


@triton.jit
def words_at(start, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr, parameter, step, seed, index):
    """The bits of entries start[r] + 0 … C − 1 of every row, (R, W): C / W lower bits of each word, W ≥ 2."""
    block, skipped = (start // 128).to(tl.int32), (start % 128).to(tl.uint32)
    w0, w1, w2, w3 = philox(block, 0, parameter, step, seed, index)
    w4, w5, w6, w7 = w0, w1, w2, w3  # that an aligned row does not reach
    if not ALIGNED:
        w4, w5, w6, w7 = philox(block + 1, 0, parameter, step, seed, index)
    # go on by two words, by one, and by bits, as far as starts differ
    if not ALIGNED or COLUMNS < 128:
        by_two = skipped >= 64
        w0, w1, w2 = tl.where(by_two, w2, w0), tl.where(by_two, w3, w1), tl.where(by_two, w4, w2)
        w3, w4, w5 = tl.where(by_two, w5, w3), tl.where(by_two, w6, w4), tl.where(by_two, w7, w5)
    if not ALIGNED or COLUMNS < 64:
        by_one = skipped % 64 >= 32
        w0, w1, w2 = tl.where(by_one, w1, w0), tl.where(by_one, w2, w1), tl.where(by_one, w3, w2)
        w3, w4 = tl.where(by_one, w4, w3), tl.where(by_one, w5, w4)
    if not ALIGNED or COLUMNS < 32:
        bits = skipped % 32
        w0, w1 = later(w0, w1, bits), later(w1, w2, bits)
        w2, w3 = later(w2, w3, bits), later(w3, w4, bits)
    # joined, also to halves of one word: else each thread that holds some of a row would make all of its blocks
    if COLUMNS == 128:
        words = in_order(w0, w1, w2, w3)
    elif COLUMNS == 64:
        words = tl.join(w0, w1)
    else:
        words = tl.join(w0, w0 >> COLUMNS // 2)
    return words


@triton.jit
def later(word, following, bits):
    """32 bits of two words after the first so many, fewer than 32."""
    return (word >> bits) | (following << 1 << (31 - bits))


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
def rounded(wide, dtype: tl.constexpr):
    """float32 to a floating dtype, to the nearest, ties to even: Triton's interpreter cuts bfloat16 off instead."""
    if dtype == tl.bfloat16:
        bits = wide.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        return tl.where(wide == wide, (bits >> 16).to(tl.uint16), 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return wide.to(dtype)
