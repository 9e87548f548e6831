"""Passes over the weights: displacing them, and the update from all directions, against the copy bandwidth."""

from collections.abc import Callable

import torch
from timing import DEVICE, copy_bandwidth, milliseconds


WEIGHTS = 1_162_045_100  # of the paper's largest LSTM but one
DIRECTIONS = 96
MOMENTUM = "update with momentum, n = 1"
ASKED = {
    "displace": "≥ 0.8 of the copy",
    "update, n = 1": "≥ 0.8 of the copy",
    f"update, n = {DIRECTIONS}": "< 60 ms for 1.1 B",
}


def measure(weights: int = WEIGHTS, rounds: int = 20) -> list[dict]:
    """A row a pass: its time, the bytes it must read and write, and their rate over the copy's."""
    bandwidth, rows = copy_bandwidth(min(weights, 1 << 29), rounds), []
    for dtype in (torch.bfloat16, torch.float32):
        theta = torch.zeros(weights, dtype=dtype, device=DEVICE)
        for name, ms in milliseconds(passes(theta), rounds).items():
            moved = theta.nbytes * (4 if name == MOMENTUM else 2)
            rows.append(
                {
                    "pass": name,
                    "dtype": str(dtype).removeprefix("torch."),
                    "weights": theta.numel(),
                    "ms": ms,
                    "GB": moved / 1e9,
                    "GB/s": moved / ms / 1e6,
                    "copy GB/s": bandwidth / 1e9,
                    "share of copy": moved / ms * 1e3 / bandwidth,
                    "asked": ASKED.get(name, ""),
                }
            )
        del theta
    return rows


def passes(theta: torch.Tensor) -> dict[str, Callable[[], object]]:
    copy, momentum = torch.empty_like(theta), torch.zeros_like(theta)
    names = torch.tensor([[0, 1, i] for i in range(DIRECTIONS)], device=DEVICE)
    coefficients = torch.ones(DIRECTIONS, device=DEVICE)
    displace, sgd = torch.ops.zoo_hf.displace_, torch.ops.zoo_hf.sgd_
    plain, moving = [1e-9, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0], [1e-9, 0.9, 0.0, 0.0, 1.0, 0.0, 0.0]
    return {
        "displace": lambda: displace(copy, theta, [0, 1, 2], "w", 0, 1e-3, "rademacher"),
        "update, n = 1": lambda: sgd(theta, None, names[:1], coefficients[:1], "w", "rademacher", plain),
        MOMENTUM: lambda: sgd(theta, momentum, names[:1], coefficients[:1], "w", "rademacher", moving),
        f"update, n = {DIRECTIONS}": lambda: sgd(theta, None, names, coefficients, "w", "rademacher", plain),
    }
