"""One step on a long text: memory and time, and what backpropagation through time holds at the same length."""

import torch
from steps import Steps
from timing import once, peak_bytes

from zoo_hf import RNNConfig


TOKENS = (1_000, 10_000, 100_000)


def measure(config: RNNConfig | None = None, tokens: tuple[int, ...] = TOKENS) -> list[dict]:
    """A row a context length: one text, one direction, two forward passes."""
    rows = []
    for length in tokens:
        steps = Steps(config or RNNConfig.preset("1.1B"), directions=1, together=1, batch=1, tokens=length)
        taken: list[float] = []
        memory = peak_bytes(lambda steps=steps, taken=taken: taken.append(once(steps.zoo)))
        rows.append(
            {
                "tokens": length,
                "weights": sum(p.numel() for p in steps.parameters.values()),
                "zoo s": taken[0] / 1e3,
                "zoo GB": memory / 1e9,
                "bptt GB": held_by_bptt(steps),
            }
        )
    return rows


def held_by_bptt(steps: Steps) -> float | str:
    try:
        return peak_bytes(steps.bptt) / 1e9
    except torch.cuda.OutOfMemoryError:
        return "does not fit"
