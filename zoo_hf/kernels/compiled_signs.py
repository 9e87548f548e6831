"""Signs through `torch.compile`: the rounds of Philox in one loop, several times faster, the same bits."""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..noise import DISTRIBUTIONS, Blocks, Direction, Rademacher, counters, philox_words, spans


COMPILED_BLOCKS = 1 << 13  # one size for every call, so that one compilation serves all parameters


class CompiledRademacher(Rademacher):
    """`Rademacher` whose Philox blocks come from compiled code, 8,192 blocks a call, of one direction or many.

    A stream with much less for all directions together wastes most of a call: this is for models of millions of
    weights, and for the factors of many low-rank directions.
    """

    def pack(self, directions: Sequence[Direction], parts: Sequence[Blocks], device: torch.device) -> Tensor:
        number, constants = counters(parts, device)
        constants = constants.expand(2, len(number))
        words, names = _compiled(device), torch.tensor(directions, dtype=torch.int64, device=device)  # (G, 3)
        packed = torch.empty(len(directions) * len(number), 4, dtype=torch.int32, device=device)  # (G · K, 4)
        for first, last in spans(len(packed), COMPILED_BLOCKS):
            place = torch.arange(first, first + COMPILED_BLOCKS, device=device).clamp_(max=last - 1)
            seed, step, index = names[place // len(number)].unbind(1)
            place %= len(number)
            for column, word in enumerate(words(number[place], *constants[:, place], seed, step, index)):
                packed[first:last, column] = word[: last - first]
        return packed.view(torch.uint8).view(len(directions), -1)


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
    """The words of 8,192 blocks, (K,) int32 each, from their counters and keys, (K,) each."""
    return [word.to(torch.int32) for word in philox_words([number, purpose, parameter, step], [seed, index])]
