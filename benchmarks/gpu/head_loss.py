"""The head and its loss in one kernel, beside logits and their cross-entropy: time, and the most memory held."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from timing import DEVICE, milliseconds, product_rate, with_peak


VOCABULARIES = (256, 65_536)
RADIUS = 2.0**-6
NAME = 0, 1, "w"  # seed, step and parameter of the directions


def measure(
    vocabularies: tuple[int, ...] = VOCABULARIES,
    width: int = 2048,
    *,
    members: int = 8,
    rows: int = 1024,
    rounds: int = 20,
    size: int = 8192,
) -> list[dict]:
    """A row a vocabulary and way; `rows` of each member are multiplied, and as many in all without members."""
    rate, found = product_rate(size), []
    for vocabulary in vocabularies:
        runs = ways(vocabulary, width, members, rows)
        times, flops = milliseconds(runs, rounds), 2 * vocabulary * width * members * rows
        for name, run in runs.items():
            found.append(
                {
                    "way": name,
                    "vocabulary": vocabulary,
                    "width": width,
                    "tokens": members * rows,
                    "ms": times[name],
                    "logits / way": times["logits, cross-entropy"] / times[name],
                    "product TFLOP/s": rate / 1e12,
                    "product / way": flops / rate / times[name] * 1e3,
                    "GB": with_peak(run)[1],
                }
            )
        del runs, run  # with what they hold
    return found


def ways(vocabulary: int, width: int, members: int, rows: int) -> dict[str, Callable[[], object]]:
    hidden = torch.randn(members, rows, width, device=DEVICE).to(torch.bfloat16)
    weight = torch.randn(vocabulary, width, device=DEVICE).div_(width**0.5).to(torch.bfloat16)
    targets = torch.randint(vocabulary, (members, rows), device=DEVICE)
    index = torch.arange(members, device=DEVICE) // 2
    scale = RADIUS * (1 - 2.0 * (torch.arange(members, device=DEVICE) % 2))
    flat, goals, losses = hidden.view(1, -1, width), targets.view(-1), torch.ops.zoo_hf.head_loss_population

    def logits() -> torch.Tensor:
        return F.cross_entropy(F.linear(flat[0], weight).float(), goals, reduction="none")

    return {
        "logits, cross-entropy": logits,
        "one kernel": lambda: losses(flat, weight, None, goals, None, None, *NAME),
        f"one kernel, {members} members": lambda: losses(hidden, weight, None, targets, index, scale, *NAME),
    }
