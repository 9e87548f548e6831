"""A direction is a name; its entries are a pure function of that name.

Entries come from the counter-based generator Philox4x32-10. The key is (run seed, direction index), the counter is
(block, purpose, parameter id, step), so that every entry of every direction has a counter of its own: any slice of any
parameter is made alone, in any order, on any device, and no two streams can meet. No generator is read or advanced.

Letters: G directions, K blocks, M entries.

References:
    Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3. SC 2011.
"""

import functools
import zlib
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .philox import philox4x32, philox_words


# what a stream is for; no two purposes share a counter
PURPOSE_ENTRIES, PURPOSE_LEFT, PURPOSE_RIGHT, PURPOSE_ROUNDING = 0, 1, 2, 3
PURPOSE_DROPOUT, PURPOSE_INITIAL, PURPOSE_BATCH = 4, 5, 6

# what is made at once: much to save calls, little to stay in the cache and in the memory of inference
BLOCK_BYTES = 16  # packed, of every distribution
PHILOX_BLOCKS = 1 << 16  # 4 MiB while they are made
PACKED_BYTES = 1 << 20
CHUNK = 1 << 19  # entries unpacked, 2 MiB of float32
KEPT_BLOCKS, KEPT_BYTES = 1 << 12, 1 << 21  # packed noise of so few blocks, 64 KiB, is kept, 2 MiB of it in all


class Direction(NamedTuple):
    """Name of a random vector z; every entry of z is a pure function of these integers, each in [0, 2³²)."""

    seed: int
    step: int
    index: int  # type: ignore[assignment]  # the field's own word, although a tuple has a method of that name


class Blocks(NamedTuple):
    """Philox blocks start … stop − 1 of a stream: a parameter, by its name in the unwrapped model, and a purpose."""

    name: str
    start: int
    stop: int
    purpose: int = PURPOSE_ENTRIES


class Distribution(Hashable, Protocol):
    """How Philox blocks become entries of z.

    An entry has two forms: packed, as small as the noise allows, and unpacked, ready to be added to a weight.
    """

    entries_per_block: int
    packed_per_block: int  # elements of the packed form
    packed_bytes_per_entry: float

    def pack(self, directions: Sequence[Direction], parts: Sequence[Blocks], device: torch.device) -> Tensor:
        """Packed entries of all parts side by side, one row a direction, (G, …)."""

    def unpack_(self, out: Tensor, packed: Tensor, scale: float) -> None:
        """Write scale · z, (M,), from one row of `pack` or a part of it."""


def parameter_id(name: str) -> int:
    """32-bit hash of a parameter's name in the unwrapped model: the CRC-32 of its UTF-8 bytes."""
    return zlib.crc32(name.encode())


def check_names(names: Sequence[str]) -> None:
    """Refuse parameter names that share an id, as they would share their noise.

    Raises:
        ValueError: two names have the same `parameter_id`.
    """
    seen: dict[int, str] = {}
    for name in names:
        other = seen.setdefault(parameter_id(name), name)
        if other != name:
            raise ValueError(f"Parameters {other!r} and {name!r} have the same 32-bit id: rename one of them.")


def dropout_seed(seed: int, step: int, micro_batch: int) -> int:
    """Seed of the dropout masks that all members of a step share on one of its micro-batches, in [0, 2³²)."""
    return _number(seed, micro_batch, PURPOSE_DROPOUT, step)


def batch_seed(seed: int, epoch: int, place: int) -> int:
    """Seed of what is random in making the batch at a place in an epoch, in [0, 2³²)."""
    return _number(seed, place, PURPOSE_BATCH, epoch)


def _number(seed: int, block: int, purpose: int, step: int) -> int:
    """A 32-bit number that belongs to no parameter."""
    return int(philox4x32(torch.tensor([block, purpose, 0, step]), torch.tensor([seed, 0]))[0])


def count(parts: Sequence[Blocks]) -> int:
    """Blocks in all parts, K."""
    return sum(part.stop - part.start for part in parts)


def counters(parts: Sequence[Blocks], device: torch.device) -> tuple[Tensor, Tensor]:
    """Numbers of all parts' blocks, (K), and their purposes and parameter ids, (2, K), or (2, 1) for one part."""
    number = torch.cat([torch.arange(part.start, part.stop, device=device) for part in parts])
    constants = torch.tensor([[part.purpose, parameter_id(part.name)] for part in parts], device=device).T
    if len(parts) == 1:
        return number, constants
    lengths = torch.tensor([part.stop - part.start for part in parts], device=device)
    return number, constants.repeat_interleave(lengths, dim=1)


def words_of(
    directions: Sequence[Direction], parts: Sequence[Blocks], device: torch.device
) -> Iterator[tuple[int, int, list[Tensor]]]:
    """(first, last, the four words of these blocks for every direction, int64 (G, last − first) each)."""
    seed, step, index = torch.tensor(directions, dtype=torch.int64, device=device).T[..., None]  # (G, 1) each
    number, constants = counters(parts, device)
    for first, last in spans(len(number), max(1, PHILOX_BLOCKS // len(directions))):
        purpose, parameter = constants if constants.shape[1] == 1 else constants[:, first:last]
        yield first, last, philox_words([number[first:last], purpose, parameter, step], [seed, index])


class Rademacher:
    """Independent signs, ±1: entry e is bit e mod 32 of word ⌊(e mod 128)/32⌋ of block ⌊e/128⌋, and a 1 is +1.

    Packed, an entry is one bit.
    """

    entries_per_block = 128
    packed_per_block = 16
    packed_bytes_per_entry = 1 / 8

    def pack(self, directions: Sequence[Direction], parts: Sequence[Blocks], device: torch.device) -> Tensor:
        packed = torch.empty(len(directions), count(parts), 4, dtype=torch.int32, device=device)  # (G, K, 4)
        for a, b, words in words_of(directions, parts, device):
            for place, word in enumerate(words):
                packed[:, a:b, place] = word
        return packed.view(torch.uint8).flatten(1)  # (G, 16 K), least significant byte first

    def unpack_(self, out: Tensor, packed: Tensor, scale: float) -> None:
        signs = _signs_of_bytes(out.device).index_select(0, packed.int()).view(torch.int8)
        out.copy_(signs).mul_(scale)  # twice as fast as looking up floats


class Gaussian:
    """Independent standard normals, four a block, by Box–Muller on the word pairs (0, 1) and (2, 3).

    √(−2 ln u) cos 2πv, then √(−2 ln u) sin 2πv, with u = (w + 1)/2³² from a pair's first word and v = w'/2³² from its
    second. Packed, an entry is a float32, so that signs alone are equal to the last bit on all devices.
    """

    entries_per_block = 4
    packed_per_block = 4
    packed_bytes_per_entry = 4.0

    def pack(self, directions: Sequence[Direction], parts: Sequence[Blocks], device: torch.device) -> Tensor:
        packed = torch.empty(len(directions), count(parts), 4, dtype=torch.float32, device=device)  # (G, K, 4)
        for a, b, words in words_of(directions, parts, device):
            packed[:, a:b] = _box_muller(words)
        return packed.flatten(1)  # (G, 4 K)

    def unpack_(self, out: Tensor, packed: Tensor, scale: float) -> None:
        torch.mul(packed.to(out.dtype), scale, out=out)


DISTRIBUTIONS: dict[str, Distribution] = {"rademacher": Rademacher(), "gaussian": Gaussian()}


def entries(
    direction: Direction,
    parameter_name: str,
    start: int,
    stop: int,
    *,
    distribution: str = "rademacher",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Entries start … stop − 1 of z for one parameter, flattened, (stop − start,).

    Args:
        direction: the name of z.
        parameter_name: the parameter's name in the unwrapped model.
        start, stop: 0 ≤ start ≤ stop; any slice equals that slice of the whole.
        distribution: "rademacher" (±1) or "gaussian" (mean 0, variance 1).

    Raises:
        ValueError: unknown distribution, a slice or a direction that is none, or a dtype that is not floating.
    """
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"`distribution` must be one of {sorted(DISTRIBUTIONS)}, got {distribution!r}.")
    if not all(0 <= number < 2**32 for number in direction):
        raise ValueError(f"The integers of a direction must be in [0, 2**32), got {direction}.")
    if not 0 <= start <= stop:
        raise ValueError(f"`start` and `stop` must satisfy 0 <= start <= stop, got {start} and {stop}.")
    kind, device = DISTRIBUTIONS[distribution], torch.device(device)
    if stop > kind.entries_per_block << 32:
        raise ValueError(f"`stop` must be at most {kind.entries_per_block << 32}, got {stop}: blocks have 32 bits.")
    if not dtype.is_floating_point:
        raise ValueError(f"`dtype` must be a floating one, got {dtype}.")
    size, length = kind.entries_per_block, kind.packed_per_block
    first, last = start // size, -(-stop // size)
    whole = torch.empty((last - first) * size, dtype=dtype, device=device)
    for a, b in spans(last - first, blocks_held(kind, 1)):
        packed = kind.pack([direction], [Blocks(parameter_name, first + a, first + b)], device)[0]
        for c, d in spans(b - a, CHUNK // size):
            kind.unpack_(whole[(a + c) * size : (a + d) * size], packed[c * length : d * length], 1.0)
    return whole[start - first * size : stop - first * size]


def packed_noise(
    distribution: Distribution, directions: Sequence[Direction], parts: Sequence[Blocks], device: torch.device
) -> list[Tensor]:
    """`distribution.pack(…)` of every part, (G, …) each; small ones are made in one call and kept for the update."""
    keys = {part: (distribution, tuple(directions), part, device) for part in parts}
    small = [part for part in parts if len(directions) * (part.stop - part.start) <= KEPT_BLOCKS]
    missing = [part for part in small if keys[part] not in _kept]
    found = {part: _kept[keys[part]] for part in small if keys[part] in _kept}
    if missing:
        lengths = [(part.stop - part.start) * distribution.packed_per_block for part in missing]
        found |= zip(missing, distribution.pack(directions, missing, device).split(lengths, dim=1), strict=True)
    for part in missing:
        _kept[keys[part]] = found[part].clone()  # not a view of all that was made with it
    held = sum(tensor.nbytes for tensor in _kept.values())
    while held > KEPT_BYTES:
        held -= _kept.pop(next(iter(_kept))).nbytes  # the oldest
    return [found[part] if part in found else distribution.pack(directions, [part], device) for part in parts]


_kept: dict[Any, Tensor] = {}


def unpacked(
    distribution: Distribution,
    directions: Sequence[Direction],
    wanted: Sequence[tuple[Blocks, int]],
    device: torch.device,
) -> list[Tensor]:
    """The first entries of several streams, one row a direction, (G, numel) float32 each, made in a few calls.

    Args:
        wanted: the blocks of each stream, and how many of their entries.
    """
    parts, numels = [part for part, _ in wanted], [numel for _, numel in wanted]
    packed = torch.cat(packed_noise(distribution, directions, parts, device), dim=1)
    lengths = [(part.stop - part.start) * distribution.entries_per_block for part in parts]
    rows = torch.empty(len(directions), sum(lengths), dtype=torch.float32, device=device)
    distribution.unpack_(rows.view(-1), packed.flatten(), 1.0)
    return [row[:, :numel] for row, numel in zip(rows.split(lengths, dim=1), numels, strict=True)]


def blocks_held(distribution: Distribution, directions: int) -> int:
    """Blocks whose packed noise, for so many directions, takes PACKED_BYTES; at least one."""
    size = distribution.entries_per_block * distribution.packed_bytes_per_entry * directions
    return max(1, int(PACKED_BYTES / size))


def spans(total: int, length: int) -> Iterator[tuple[int, int]]:
    """(start, stop) after (start, stop), at most `length` long, that cover range(total)."""
    for start in range(0, total, length):
        yield start, min(start + length, total)


@functools.cache
def _signs_of_bytes(device: torch.device) -> Tensor:
    """The eight signs that each byte stands for, as the int8 that an int64 is made of, (256,)."""
    bits = torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device) & 1
    return (2 * bits - 1).to(torch.int8).view(torch.int64).flatten()


def _box_muller(words: list[Tensor]) -> Tensor:
    """Normals (G, K, 4) from four words (G, K)."""
    normals = []
    for first, second in (words[:2], words[2:]):
        radius = ((first + 1).float() * 2.0**-32).log_().mul_(-2).sqrt_()
        angle = second.float() * (2 * torch.pi * 2.0**-32)
        normals += [radius * angle.cos(), radius * angle.sin()]
    return torch.stack(normals, dim=-1)
