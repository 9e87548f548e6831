"""Stochastic rounding: bfloat16 weights that move by less than their spacing, on average by the right amount.

A number between two neighbours becomes the upper one with a probability of how far it has gone, so that E[rounded] is
the number. Random bits come from counters as all noise does: 16 for each entry, eight entries a block.

References:
    Gupta, Agrawal, Gopalakrishnan, Narayanan: Deep Learning with Limited Numerical Precision. 2015. arXiv:1502.02551.
"""

import torch
from torch import Tensor

from .noise import CHUNK, PURPOSE_ROUNDING, Blocks, Direction, Rademacher, spans


ENTRIES = 8  # of a Philox block: 16 bits each, the lower ones of a word first


def round_(out: Tensor, wide: Tensor, name: str, start: int = 0, *, seed: int, step: int, stream: int = 0) -> None:
    """Write float32 numbers to a flat bfloat16 tensor, each as one of its two neighbours; what is none stays so.

    Args:
        out: (M,) bfloat16.
        wide: (M,) float32.
        name: of the parameter that they are entries of.
        start: place of the first entry in its parameter, a multiple of 8.
        seed, step: of the run.
        stream: numbers of one parameter and step that are rounded apart have different ones.
    """
    for first, last in spans(len(wide), CHUNK):
        part = Blocks(name, (start + first) // ENTRIES, -(-(start + last) // ENTRIES), PURPOSE_ROUNDING)
        packed = Rademacher().pack([Direction(seed, step, stream)], [part], wide.device)[0]  # (16 K) bytes
        chance = packed.view(torch.int16)[: last - first].to(torch.int32) & 0xFFFF
        numbers = wide[first:last]
        cut = (numbers.view(torch.int32) + chance) & -0x10000
        out[first:last] = torch.where(numbers.isfinite(), cut.view(torch.float32), numbers)
