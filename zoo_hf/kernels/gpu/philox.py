"""Philox4x32-10 in registers: the words that noise is made of, see zoo_hf/philox.py.

Integers of counters and keys are signed 32-bit ones with the bits of the unsigned, see `signed` in noise.py: for
larger types a kernel would be compiled anew.

Letters: K blocks.
"""

import triton
import triton.language as tl


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
