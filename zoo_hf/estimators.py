"""Objective + directions → estimate of the gradient, as n coefficients.

Letters: n directions, P members.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .low_rank import Kind
from .noise import Direction
from .perturbation import Member, Objective, Parameters, probe


class Estimate(NamedTuple):
    """ĝ = 1/m Σᵢ cᵢ zᵢ over the m directions whose coefficient is a number: everything an update needs."""

    directions: Sequence[Direction]
    coefficients: Tensor  # (n,) float32 on the CPU, NaN for a pair left out
    loss: float  # mean over the probes that were used
    distribution: Kind = "rademacher"
    signal_to_noise: float = math.nan  # see `CentralDifference.estimate`

    @property
    def left_out(self) -> float:
        """Share of the directions whose losses were not finite, in [0, 1/2]."""
        return self.coefficients.isnan().float().mean().item()


class Estimator(Protocol):
    """Which members a set of directions needs, and what their losses say about the gradient."""

    @property
    def smoothing_radius(self) -> float: ...

    @property
    def distribution(self) -> Kind: ...

    @property
    def normalize(self) -> str: ...

    def members(self, directions: Sequence[Direction]) -> list[Member]: ...

    def estimate(self, directions: Sequence[Direction], losses: Tensor) -> Estimate: ...


@dataclass(frozen=True)
class CentralDifference:
    """CD-RGE: cᵢ = [L(θ + ε zᵢ) − L(θ − ε zᵢ)] / 2ε, 2n forward passes.

    With Gaussian z an unbiased gradient of the smoothed loss E L(θ + ε z); its distance from ∇L, the bias, is O(ε²).
    The error of a single coefficient against z·∇L is O(ε²) as well, and none on a quadratic. For small ε the cosine
    of ĝ to ∇L is about √(n / (n + d − 1)) in d dimensions (Rademacher). With `normalize="loss_std"` coefficients are
    divided by `length`, as those of `ForwardDifference` are.

    References:
        Chaubard, Kochenderfer: Scaling Recurrent Neural Networks to a Billion Parameters with Zero-Order Optimization.
        2025. arXiv:2505.17852. Nesterov, Spokoiny: Random Gradient-Free Minimization of Convex Functions. 2017.
    """

    smoothing_radius: float
    distribution: Kind = "rademacher"
    normalize: str = "none"

    def members(self, directions: Sequence[Direction]) -> list[Member]:
        """θ + ε z and θ − ε z, direction after direction, (2n)."""
        return [Member(direction, sign) for direction in directions for sign in (1, -1)]

    def estimate(self, directions: Sequence[Direction], losses: Tensor) -> Estimate:
        """The estimate from the members' losses, (2n,) float64 in the order of `members`.

        Its `signal_to_noise` is the spread of [L(θ + ε zᵢ) − L(θ − ε zᵢ)]/2 over that of the pairs' means: slopes are
        in the first alone, curvature, O(ε²), in the second, and what rounds losses in both. It grows as 1/ε until
        rounding outweighs curvature.

        Raises:
            FloatingPointError: more than half of the pairs have a loss that is not finite.
        """
        pairs = losses.view(-1, 2)  # (n, 2)
        coefficients = (pairs[:, 0] - pairs[:, 1]) / (2 * self.smoothing_radius)
        estimate = _finite_part(self, directions, losses, pairs, coefficients)
        used = pairs[estimate.coefficients.isfinite()]
        slopes, means = used[:, 0] - used[:, 1], used[:, 0] + used[:, 1]
        return estimate._replace(signal_to_noise=(slopes.std(correction=0) / means.std(correction=0)).item())

    def __call__(self, objective: Objective, parameters: Parameters, directions: Sequence[Direction]) -> Estimate:
        """The estimate of the objective's gradient at the parameters' present values; θ is left as it was."""
        return _evaluate(self, objective, parameters, directions)


@dataclass(frozen=True)
class ForwardDifference:
    """RGE: cᵢ = [L(θ + ε zᵢ) − L(θ)] / ε, n + 1 forward passes.

    The error of a single coefficient is O(ε); for symmetric z it is noise, and the bias of ĝ is O(ε²), the same as
    that of `CentralDifference`.

    References:
        Nesterov, Spokoiny: Random Gradient-Free Minimization of Convex Functions. 2017.
    """

    smoothing_radius: float
    distribution: Kind = "rademacher"
    normalize: str = "none"

    def members(self, directions: Sequence[Direction]) -> list[Member]:
        """θ itself, then θ + ε z for every direction, (n + 1)."""
        return [Member(directions[0], 0), *(Member(direction, 1) for direction in directions)]

    def estimate(self, directions: Sequence[Direction], losses: Tensor) -> Estimate:
        """The estimate from the members' losses, (n + 1,) float64 in the order of `members`.

        Its `loss` is the mean of L(θ) and L(θ + ε zᵢ) over the pairs that were used.

        Raises:
            FloatingPointError: L(θ) is not finite, or more than half of the others are not.
        """
        pairs = torch.stack([losses[1:], losses[:1].expand(len(directions))], dim=1)  # (n, 2)
        coefficients = (pairs[:, 0] - pairs[:, 1]) / self.smoothing_radius
        return _finite_part(self, directions, losses, pairs, coefficients)

    def __call__(self, objective: Objective, parameters: Parameters, directions: Sequence[Direction]) -> Estimate:
        """The estimate of the objective's gradient at the parameters' present values; θ is left as it was."""
        return _evaluate(self, objective, parameters, directions)


ESTIMATORS: dict[str, Callable[[float, Kind, str], Estimator]] = {
    "central": CentralDifference,
    "forward": ForwardDifference,
}


def _evaluate(
    estimator: CentralDifference | ForwardDifference,
    objective: Objective,
    parameters: Parameters,
    directions: Sequence[Direction],
) -> Estimate:
    losses = probe(
        objective,
        parameters,
        estimator.members(directions),
        estimator.smoothing_radius,
        distribution=estimator.distribution,
    )
    return estimator.estimate(directions, losses)


def _finite_part(
    estimator: Estimator, directions: Sequence[Direction], losses: Tensor, pairs: Tensor, coefficients: Tensor
) -> Estimate:
    """Coefficients rounded once to float32; a pair whose difference is not finite is left out, never replaced."""
    used = coefficients.float().isfinite()
    if 2 * used.sum() < len(used):
        left_out = (~used).nonzero().flatten().tolist()
        shown = {index: pairs[index].tolist() for index in left_out[:8]}
        raise FloatingPointError(
            f"Step {directions[0].step}: {len(left_out)} of {len(used)} pairs have losses that are not finite; "
            f"no update was made. Losses of the first of them, by direction: {shown}. "
            "Lower `learning_rate` or `smoothing_radius`."
        )
    if estimator.normalize == "loss_std":
        coefficients = coefficients / length(losses, estimator.smoothing_radius)
    rounded = coefficients.float().where(used, torch.nan)
    return Estimate(directions, rounded, pairs[used].mean().item(), estimator.distribution)


def length(losses: Tensor, smoothing_radius: float) -> Tensor:
    """σ/ε, with σ the standard deviation of a step's losses: about the gradient's length; 1 where they are all equal.

    Coefficients that are divided by it depend on neither the loss's scale nor its units.

    References:
        Sizhe Dang et al.: FZOO: Fast Zeroth-Order Optimizer for Fine-Tuning Large Language Models towards Adam-Scale
        Speed. 2025. arXiv:2506.09034.
    """
    spread = losses[losses.isfinite()].std()
    return torch.where(spread > 0, spread / smoothing_radius, 1.0)
