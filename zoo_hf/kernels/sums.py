"""What an update makes of all directions, in one pass over a parameter.

Letters: m directions, M entries.
"""

import torch
from torch import Tensor

from ..noise import CHUNK, DISTRIBUTIONS, Blocks, Direction, blocks_held, packed_noise, spans
from .choice import backend
from .displace import FLOATS
from .rule import Rule, sgd_plainly_


@torch.library.custom_op("zoo_hf::weighted_sum", mutates_args=())
def weighted_sum(
    names: Tensor, coefficients: Tensor, name: str, numel: int, distribution: str, dtype: torch.dtype
) -> Tensor:
    """Σᵢ cᵢ zᵢ on one parameter, (numel,), summed direction after direction.

    Args:
        names: seed, step and index of every direction, (m, 3) int64.
        coefficients: c, (m,) float32, on the device of `names` and of the result.
        name: of the parameter, in the unwrapped model.
        distribution: "rademacher" or "gaussian".
        dtype: of the sum, float32 or float64.
    """
    total = torch.empty(numel, dtype=dtype, device=names.device)
    if dtype in FLOATS and backend(["triton", "plain"], names.device) == "triton":
        from .gpu.sums import launch_sum

        launch_sum(total, names, coefficients, name, distribution)
        return total
    kind, directions = DISTRIBUTIONS[distribution], [Direction(*row) for row in names.tolist()]
    size, length = kind.entries_per_block, kind.packed_per_block
    total.zero_()
    for a, b in spans(-(-numel // size), blocks_held(kind, len(directions))):
        (packed,) = packed_noise(kind, directions, [Blocks(name, a, b)], names.device)  # (m, …)
        for first, last in spans(b - a, CHUNK // size):
            part = total[(a + first) * size : (a + last) * size]
            noise = torch.empty((last - first) * size, dtype=dtype, device=names.device)
            for row, coefficient in zip(packed, coefficients.tolist(), strict=True):
                kind.unpack_(noise, row[first * length : last * length], coefficient)
                part += noise[: len(part)]
    return total


@weighted_sum.register_fake
def _(names: Tensor, coefficients: Tensor, name: str, numel: int, distribution: str, dtype: torch.dtype) -> Tensor:
    return names.new_empty(numel, dtype=dtype)


@torch.library.custom_op("zoo_hf::sgd_", mutates_args={"weights", "buffer"})
def sgd_(
    weights: Tensor,
    buffer: Tensor | None,
    names: Tensor,
    coefficients: Tensor,
    name: str,
    distribution: str,
    rule: list[float],
) -> None:
    """Make the step of a `Rule` with ĝ = 1/m Σᵢ cᵢ zᵢ, which is never written where Triton's kernels run.

    Args:
        weights: θ, (M,), flat and contiguous: a whole parameter in float32, bfloat16 or float16.
        buffer: v, (M,), if there is momentum.
        rule: the fields of a `Rule`.

    Other arguments as in `weighted_sum`.
    """
    lr, momentum, dampening, weight_decay, share, nesterov, first = rule
    step = Rule(lr, momentum, dampening, weight_decay, share, bool(nesterov), bool(first))
    if backend(["triton", "plain"], weights.device) == "triton":
        from .gpu.sums import launch_sgd

        launch_sgd(weights, buffer, names, coefficients, name, distribution, step)
        return
    total = weighted_sum(names, coefficients, name, len(weights), distribution, torch.float32).div_(len(names))
    seed, number, _ = names[0].tolist()
    sgd_plainly_(weights, buffer, total, step, name=name, seed=seed, step=number)
