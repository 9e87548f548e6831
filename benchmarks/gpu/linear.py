"""A linear layer of a population beside the plain one on the same rows."""

import torch
import torch.nn.functional as F
from timing import DEVICE, milliseconds, product_rate


ROWS = (16, 64, 256, 1024, 4096)
RADIUS = 2.0**-6
NAME = 0, 1, "w"  # seed, step and parameter of the directions


def measure(size: int = 8192, rows: tuple[int, ...] = ROWS, rounds: int = 20) -> list[dict]:
    """A row a dtype and number of rows a member: each way's share of the plain layer's speed, noise included."""
    found = []
    for dtype in (torch.float16, torch.bfloat16):
        rate = product_rate(size, dtype, rounds)
        weight = torch.randn(size, size, device=DEVICE).div_(size**0.5).to(dtype)
        for number in rows:
            members = max(2, min(16, 8192 // number))
            times = milliseconds(ways(weight, number, members), rounds)
            flops = 2 * size**2 * number * members
            shares = {name: times["plain"] / ms for name, ms in times.items() if name != "plain"}
            found.append(
                {
                    "dtype": str(dtype).removeprefix("torch."),
                    "rows a member": number,
                    "members": members,
                    "plain ms": times["plain"],
                    "plain / product rate": flops / times["plain"] * 1e3 / rate,
                    **shares,
                }
            )
    return found


def ways(weight: torch.Tensor, number: int, members: int) -> dict:
    size = len(weight)
    x = torch.randn(members, number, size, device=DEVICE).to(weight.dtype)
    index = torch.arange(members, device=DEVICE) // 2
    scale = RADIUS * (1 - 2.0 * (torch.arange(members, device=DEVICE) % 2))
    left, right = torch.ones(2, members, size, 1, device=DEVICE, dtype=weight.dtype).unbind()
    perturbed, low_rank = torch.ops.zoo_hf.perturbed_linear_population, torch.ops.zoo_hf.low_rank_linear_population
    return {
        "plain": lambda: F.linear(x, weight),
        "full rank, one product": lambda: perturbed(x, weight, None, index, scale, *NAME, "fused"),
        "full rank, apart": lambda: perturbed(x, weight, None, index, scale, *NAME, "apart"),
        "rank 1": lambda: low_rank(x, weight, None, left, right),
    }
