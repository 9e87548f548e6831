"""Signs through `torch.compile`: the rounds of Philox in one loop, several times faster, the same bits."""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..noise import DISTRIBUTIONS, PURPOSE_ENTRIES, Direction, Rademacher, parameter_id, philox_words, spans


COMPILED_BLOCKS = 1 << 13  # one size for every call, so that one compilation serves all parameters


class CompiledRademacher(Rademacher):
    """`Rademacher` whose Philox blocks come from compiled code, 8,192 blocks of one direction a call.

    Parameters much smaller than a call waste most of it: this is for models of millions of weights.
    """

    def pack(
        self, directions: Sequence[Direction], parameter_name: str, start: int, stop: int, device: torch.device
    ) -> Tensor:
        packed = torch.empty(len(directions), stop - start, 4, dtype=torch.int32, device=device)  # (G, K, 4)
        words = _compiled(device)
        for row, (seed, step, index) in zip(packed, directions, strict=True):
            for first, last in spans(stop - start, COMPILED_BLOCKS):
                name = [start + first, parameter_id(parameter_name), step, seed, index]
                for place, word in enumerate(words(torch.tensor(name, device=device))):
                    row[first:last, place] = word[: last - first]
        return packed.view(torch.uint8).flatten(1)


def use_compiler(enabled: bool = True) -> None:
    """Make signs with `torch.compile` from now on in this process, or without it again; the bits are the same.

    The first use compiles for some seconds and needs what `torch.compile` needs, on a CPU a C++ compiler.
    """
    DISTRIBUTIONS["rademacher"] = CompiledRademacher() if enabled else Rademacher()


@functools.cache
def _compiled(device: torch.device) -> Callable[[Tensor], list[Tensor]]:
    return torch.compile(_words, dynamic=False, fullgraph=True)


def _words(name: Tensor) -> list[Tensor]:
    """The words of 8,192 blocks, (K,) int32 each, from (first block, parameter id, step, seed, direction index)."""
    first, parameter, step, seed, index = name.unbind()
    number = torch.arange(COMPILED_BLOCKS, device=name.device) + first
    words = philox_words([number, torch.full_like(parameter, PURPOSE_ENTRIES), parameter, step], [seed, index])
    return [word.to(torch.int32) for word in words]
