"""One step on a long text: memory and time, and what backpropagation through time holds at the same length."""

from steps import DOES_NOT_FIT, Steps
from timing import if_it_fits, once, with_peak

from zoo_hf import RNNConfig, RNNForCausalLM


TOKENS = (1_000, 5_000, 100_000)


def measure(config: RNNConfig | None = None, tokens: tuple[int, ...] = TOKENS) -> list[dict]:
    """A row a context length: one text, one direction, two forward passes, timed once."""
    steps = Steps(RNNForCausalLM, config or RNNConfig.preset("1.1B"), 1, batch=1, tokens=tokens[0])
    steps.zoo(1)  # compiles
    return [row(steps, length) for length in tokens]


def row(steps: Steps, length: int) -> dict:
    steps.take(1, length)
    ms, memory = with_peak(lambda: once(lambda: steps.zoo(1)))
    print(f"  {length:,} tokens: {ms / 1e3:.4g} s, {memory:.4g} GB", flush=True)  # should the part be cut off
    held = if_it_fits(lambda: with_peak(steps.bptt))
    steps.descent.zero_grad()  # what a pass that did not fit has left
    return {
        "tokens": length,
        "weights": steps.weights,
        "n": 1,
        "zoo s": ms / 1e3,
        "zoo GB": memory,
        "bptt GB": DOES_NOT_FIT if held is None else held[1],
    }
