"""The step of stochastic gradient descent with momentum, with weights that may be bfloat16 alone."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..noise import CHUNK, spans
from ..rounding import round_


class Rule(NamedTuple):
    """A step of `torch.optim.SGD` on one parameter.

        g ← share · ĝ + weight_decay θ    v ← momentum v + (1 − dampening) g    θ ← θ − lr v

    with g in place of v where there is no momentum, g + momentum v for Nesterov's, and v = g in the first step.
    """

    lr: float
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    share: float = 1.0  # of ĝ that clipping leaves
    nesterov: bool = False
    first: bool = False


def sgd_plainly_(
    weights: Tensor, buffer: Tensor | None, gradient: Tensor, rule: Rule, *, name: str, seed: int, step: int
) -> None:
    """Make the step in place, in float32, and round its results once: to bfloat16 stochastically, see `rounding`.

    Args:
        weights: θ, (M,).
        buffer: v, (M,), if there is momentum; of any floating dtype.
        gradient: ĝ, (M,) float32, which is overwritten.
        name: of the parameter; with `seed` and `step` it names the random bits.
    """
    for first, last in spans(len(weights), CHUNK):
        own = slice(first, last)
        wide, g = weights[own].to(gradient.dtype), gradient[own]
        g.mul_(rule.share).add_(wide, alpha=rule.weight_decay)
        if buffer is not None:
            moving = g
            if not rule.first:
                moving = buffer[own].to(g.dtype) * rule.momentum + g * (1 - rule.dampening)
            store_(buffer[own], moving, name, first, seed=seed, step=step, stream=1)
            g = g + rule.momentum * moving if rule.nesterov else moving
        store_(weights[own], wide - rule.lr * g, name, first, seed=seed, step=step, stream=0)


def store_(out: Tensor, wide: Tensor, name: str, start: int, *, seed: int, step: int, stream: int) -> None:
    if out.dtype is torch.bfloat16:
        round_(out, wide, name, start, seed=seed, step=step, stream=stream)
    else:
        out.copy_(wide)
