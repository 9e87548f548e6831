"""A linear layer of a population beside the plain one on the same rows, over the number of rows a member."""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from timing import DEVICE, milliseconds, product_rate

from zoo_hf.low_rank import LowRank
from zoo_hf.noise import Direction
from zoo_hf.population import factors


ROWS = (16, 64, 128, 256, 512, 1024, 4096)
RADIUS = 2.0**-6
NAME = 0, 1, "w"  # seed, step and parameter of the directions
ONE_PRODUCT, APART, RANK_1, WITH_NOISE = "full rank, one product", "full rank, apart", "rank 1", "rank 1 and its noise"
ASKED = f"{ONE_PRODUCT} ≥ 0.6; apart ≥ 0.45"
EGGROLL = {RANK_1: 0.91, WITH_NOISE: 0.69}  # arXiv:2511.16652, an 8192 × 8192 layer in bfloat16, batch 1024


def measure(
    size: int = 8192, rows: tuple[int, ...] = ROWS, *, asked_at: int = 1024, rounds: int = 20
) -> dict[str, list[dict]]:
    """Each way's share of the plain layer's speed, a row a dtype and number of rows; and where full rank overtakes."""
    curves, crossings = [], []
    for dtype in (torch.float16, torch.bfloat16):
        rate = product_rate(size, dtype, rounds)
        weight = torch.randn(size, size, device=DEVICE).div_(size**0.5).to(dtype)
        curve = [row(weight, number, rate, rounds, asked_at) for number in rows]
        curves += curve
        crossings += [crossing(curve, way, asked_at) for way in EGGROLL]
    return {"linear": curves, "crossing": crossings}


def row(weight: torch.Tensor, number: int, rate: float, rounds: int, asked_at: int) -> dict:
    """A row of the curve; signs are always made on the way, and counted."""
    members = max(2, min(16, 8192 // number))
    times = milliseconds(ways(weight, number, members), rounds)
    flops = 2 * weight.numel() * number * members
    return {
        "dtype": str(weight.dtype).removeprefix("torch."),
        "rows a member": number,
        "members": members,
        "plain ms": times["plain"],
        "product TFLOP/s": rate / 1e12,
        "plain / product": flops / times["plain"] * 1e3 / rate,
        **{name: times["plain"] / ms for name, ms in times.items() if name != "plain"},
        "asked": ASKED if number == asked_at else "",
    }


def ways(weight: torch.Tensor, number: int, members: int) -> dict[str, Callable[[], object]]:
    x = torch.randn(members, number, len(weight), device=DEVICE).to(weight.dtype)
    index = torch.arange(members, device=DEVICE) // 2
    scale = RADIUS * (1 - 2.0 * (torch.arange(members, device=DEVICE) % 2))
    directions = [Direction(*NAME[:2], i) for i in range(members // 2)]
    perturbed, low_rank = torch.ops.zoo_hf.perturbed_linear_population, torch.ops.zoo_hf.low_rank_linear_population

    def made() -> tuple[torch.Tensor, torch.Tensor]:
        """A and B of every member, as a step makes them."""
        return factors({NAME[2]: weight}, directions, index, scale, LowRank(frozenset({NAME[2]})))[NAME[2]]

    left, right = made()
    return {
        "plain": lambda: F.linear(x, weight),
        ONE_PRODUCT: lambda: perturbed(x, weight, None, index, scale, *NAME, "fused"),
        APART: lambda: perturbed(x, weight, None, index, scale, *NAME, "apart"),
        RANK_1: lambda: low_rank(x, weight, None, left, right),
        WITH_NOISE: lambda: low_rank(x, weight, None, *made()),
    }


def crossing(curve: list[dict], way: str, asked_at: int) -> dict:
    """From how many rows a member on full rank, by its better form, is as fast as one way of rank 1."""
    return {
        "dtype": curve[0]["dtype"],
        "way": way,
        "full rank is as fast, rows a member": overtaken(curve, way),
        f"share of the plain layer, {asked_at:,} rows": next(o[way] for o in curve if o["rows a member"] == asked_at),
        "EGGROLL's share": EGGROLL[way],
    }


def overtaken(curve: list[dict], way: str) -> str:
    """Rows a member, on a straight line over their logarithm between the two numbers that were measured."""
    ahead = [(math.log2(one["rows a member"]), max(one[ONE_PRODUCT], one[APART]) - one[way]) for one in curve]
    if ahead[0][1] >= 0:
        return f"from {curve[0]['rows a member']:,} or fewer"
    for (a, low), (b, high) in pairwise(ahead):
        if low < 0 <= high:
            return f"from {2 ** (a + (b - a) * low / (low - high)):,.0f}"
    return f"not up to {curve[-1]['rows a member']:,}"


def plot(axes, rows: list[dict]) -> None:
    """Shares of the plain layer's speed over the rows a member."""
    for name in (ONE_PRODUCT, APART, RANK_1, WITH_NOISE):
        for dtype, line in (("float16", "--"), ("bfloat16", "-")):
            own = [one for one in rows if one["dtype"] == dtype]
            axes.plot([o["rows a member"] for o in own], [o[name] for o in own], line, label=f"{name}, {dtype}")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("rows a member")
    axes.set_ylabel("speed / plain layer's")
    axes.legend(fontsize=7)
