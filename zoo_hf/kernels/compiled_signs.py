"""Signs through `torch.compile`: the rounds of Philox in one loop, several times faster, the same bits."""

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..noise import DISTRIBUTIONS, Blocks, Direction, Rademacher, counters, spans
from ..philox import philox_words


COMPILED_BLOCKS = 1 << 13  # one size for every call, so that one compilation serves all parameters


class CompiledRademacher(Rademacher):
    """`Rademacher` whose Philox blocks come from compiled code, 8,192 blocks a call, of one direction or many.

    A stream with much less for all directions together wastes most of a call: this is for models of millions of
    weights, and for the factors of many low-rank directions.
    """

    def pack(self, directions: Sequence[Direction], parts: Sequence[Blocks], device: torch.device) -> Tensor:
        number, constants = counters(parts, device)
        names = torch.tensor(directions, dtype=torch.int64, device=device)  # (G, 3)
        if len(parts) == 1 and len(number) >= COMPILED_BLOCKS:
            packed = [_pack(number, constants, name[:, None]) for name in names]
        else:  # the blocks of all directions in one row
            rows = torch.arange(len(directions), device=device).repeat_interleave(len(number))
            constants = constants.expand(2, len(number)).repeat(1, len(directions))
            packed = [_pack(number.repeat(len(directions)), constants, names[rows].T.contiguous())]
        return torch.cat(packed).view(torch.uint8).view(len(directions), -1)


def _pack(number: Tensor, constants: Tensor, name: Tensor) -> Tensor:
    """The words of some blocks, (K, 4) int32.

    Args:
        number: (K), of the blocks.
        constants: purpose and parameter id, (2, K) or (2, 1).
        name: seed, step and index, (3, K) or (3, 1).
    """
    packed, words = torch.empty(len(number), 4, dtype=torch.int32, device=number.device), _compiled(number.device)
    for first, last in spans(len(number), COMPILED_BLOCKS):
        counters_ = (filled(row[first:last] if row.numel() > 1 else row) for row in (number, *constants, *name))
        for column, word in enumerate(words(*counters_)):
            packed[first:last, column] = word[: last - first]
    return packed


def filled(row: Tensor) -> Tensor:
    """A row of 8,192 numbers, of which the last ones may be of no use; one number that all share stays one."""
    return row if len(row) in (1, COMPILED_BLOCKS) else F.pad(row, (0, COMPILED_BLOCKS - len(row)))


def use_compiler(enabled: bool = True) -> None:
    """Make signs with `torch.compile` from now on in this process, or without it again; the bits are the same.

    The first use compiles for some seconds and needs what `torch.compile` needs, on a CPU a C++ compiler.
    """
    DISTRIBUTIONS["rademacher"] = CompiledRademacher() if enabled else Rademacher()


@functools.cache
def _compiled(device: torch.device) -> Callable[..., list[Tensor]]:
    return torch.compile(_words, dynamic=False, fullgraph=True)


def _words(
    number: Tensor, purpose: Tensor, parameter: Tensor, seed: Tensor, step: Tensor, index: Tensor
) -> list[Tensor]:
    """The words of 8,192 blocks, (K,) int32 each, from their counters and keys, (K,) each or one for all."""
    return [word.to(torch.int32) for word in philox_words([number, purpose, parameter, step], [seed, index])]
