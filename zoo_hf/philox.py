"""Philox4x32-10: random words that are a pure function of a counter and a key.

References:
    Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3. SC 2011.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
MASK = 0xFFFFFFFF


def philox4x32(counter: Tensor, key: Tensor) -> Tensor:
    """Four random 32-bit words for every counter, (…, 4) int64 in [0, 2³²).

    Args:
        counter: integers (…, 4), taken modulo 2³².
        key: integers (…, 2), taken modulo 2³², broadcast against the counter.
    """
    counter, key = counter.to(torch.int64) & MASK, key.to(torch.int64) & MASK  # a 32-bit word may have come as signed
    shape = torch.broadcast_shapes(counter.shape[:-1], key.shape[:-1])
    words = philox_words(counter.unbind(-1), key.unbind(-1))
    return torch.stack([word.expand(shape) for word in words], dim=-1)


def philox_words(counter: Sequence[Tensor], key: Sequence[Tensor]) -> list[Tensor]:
    """`philox4x32` word by word: four int64 tensors from four of the counter and two of the key, broadcast.

    What the counters share should stay of size one: the first rounds then cost next to nothing.
    """
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(ROUNDS):
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        # masked last: the shift is arithmetic, and of a product taken over whole only the low word counts
        c0, c1, c2, c3 = (p1 >> 32 ^ c1 ^ k0) & MASK, p1, (p0 >> 32 ^ c3 ^ k1) & MASK, p0
        k0, k1 = (k0 + KEY_STEPS[0]) & MASK, (k1 + KEY_STEPS[1]) & MASK
    return [c0, c1 & MASK, c2, c3 & MASK]
