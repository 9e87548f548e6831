"""Plain twins: Philox and the noise written for the eye, one number at a time."""

import math
import zlib


def philox4x32_10(counter: list[int], key: list[int]) -> list[int]:
    """Four words from four counter words and two key words, in Python integers."""
    (a, b, c, d), (k, m) = counter, key
    for _ in range(10):
        p, q = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (q >> 32) ^ b ^ k, q & 0xFFFFFFFF, (p >> 32) ^ d ^ m, p & 0xFFFFFFFF
        k, m = (k + 0x9E3779B9) % 2**32, (m + 0xBB67AE85) % 2**32
    return [a, b, c, d]


def block(seed: int, step: int, index: int, name: str, number: int) -> list[int]:
    """Words of one block of the direction (seed, step, index) for the parameter `name`."""
    return philox4x32_10([number, 0, zlib.crc32(name.encode()), step], [seed, index])


def sign(seed: int, step: int, index: int, name: str, element: int) -> int:
    """Entry `element` of a Rademacher direction."""
    word = block(seed, step, index, name, element // 128)[element % 128 // 32]
    return 1 if word >> element % 32 & 1 else -1


def normal(seed: int, step: int, index: int, name: str, element: int) -> float:
    """Entry `element` of a Gaussian direction."""
    words = block(seed, step, index, name, element // 4)
    first, second = words[0:2] if element % 4 < 2 else words[2:4]
    radius, angle = math.sqrt(-2 * math.log((first + 1) / 2**32)), 2 * math.pi * second / 2**32
    return radius * (math.sin(angle) if element % 2 else math.cos(angle))
