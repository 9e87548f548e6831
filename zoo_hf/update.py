"""Estimate → weights: one parameter at a time through any torch optimizer, without gradient buffers."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from .estimators import Estimate
from .low_rank import Kind, LowRank, factor_bytes, full, is_low_rank, parts_of
from .noise import (
    BLOCK_BYTES,
    CHUNK,
    KEPT_BLOCKS,
    KEPT_BYTES,
    Blocks,
    Direction,
    blocks_held,
    check_names,
    packed_noise,
    spans,
    unpacked,
)
from .perturbation import Parameters, by_device


logger = logging.getLogger(__name__)

OWN = ("forward_passes", "carried_state", "population")  # of an Update, saved with the optimizer's
FACTOR_BYTES = 1 << 22  # of low-rank directions, held at once while they are summed

# These treat every parameter by itself; all others, schedule-free ones for instance, are given all of ĝ in one step.
SEPARATE = ("torch.optim.", "transformers.", "bitsandbytes.")
REFUSED = {
    "LBFGS": "it evaluates the loss again within a step",
    "SparseAdam": "it wants sparse gradients, and an estimate is dense",
    "Lomo": "it updates the weights during a backward pass",
    "AdaLomo": "it updates the weights during a backward pass",
    "LayerWiseDummyOptimizer": "it updates the weights during a backward pass; use the optimizer without `_layerwise`",
}


def check_optimizer(kind: str) -> None:
    """Raises: ValueError when an optimizer of this class needs a backward pass, or more than a gradient."""
    if kind in REFUSED:
        raise ValueError(f"Optimizer {kind} cannot take a zero-order estimate: {REFUSED[kind]}. Try adamw_torch.")


def gradient(estimate: Estimate, name: str, parameter: Tensor) -> Tensor:
    """ĝ = 1/m Σᵢ cᵢ zᵢ for one parameter, in its shape and dtype, in one pass over the estimate's m used directions.

    Summed in float32 at least, in an order that depends on m and the parameter's shape alone.
    """
    used = [
        (d, c) for d, c in zip(estimate.directions, estimate.coefficients.tolist(), strict=True) if not math.isnan(c)
    ]
    directions, coefficients = zip(*used, strict=True)
    if is_low_rank(estimate.distribution, name):
        total = low_rank_sum(estimate.distribution, directions, coefficients, name, parameter)
    elif len(directions) * parameter.numel() <= CHUNK:
        total = small_sum(estimate.distribution, directions, coefficients, name, parameter)
    else:
        total = full_sum(estimate.distribution, directions, coefficients, name, parameter)
    return total.div_(len(directions)).to(parameter.dtype).view_as(parameter)


def full_sum(
    kind: Kind, directions: Sequence[Direction], coefficients: Sequence[float], name: str, parameter: Tensor
) -> Tensor:
    """Σᵢ cᵢ zᵢ, flat: direction after direction, chunk by chunk."""
    distribution = full(kind)
    size, length = distribution.entries_per_block, distribution.packed_per_block
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    total = torch.zeros(parameter.numel(), dtype=dtype, device=parameter.device)
    for a, b in spans(-(-parameter.numel() // size), blocks_held(distribution, len(directions))):
        (packed,) = packed_noise(distribution, directions, [Blocks(name, a, b)], parameter.device)  # (m, …)
        for first, last in spans(b - a, CHUNK // size):
            part = total[(a + first) * size : (a + last) * size]
            noise = torch.empty((last - first) * size, dtype=dtype, device=parameter.device)
            for row, coefficient in zip(packed, coefficients, strict=True):
                distribution.unpack_(noise, row[first * length : last * length], coefficient)
                part += noise[: len(part)]
    return total


def small_sum(
    kind: Kind, directions: Sequence[Direction], coefficients: Sequence[float], name: str, parameter: Tensor
) -> Tensor:
    """Σᵢ cᵢ zᵢ, flat, as one product: a parameter this small costs calls and not arithmetic."""
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    wanted = [(part, parameter.numel()) for part in parts_of(kind, name, parameter.shape)]
    (rows,) = unpacked(full(kind), directions, wanted, parameter.device, dtype)  # (m, numel)
    return torch.tensor(coefficients, dtype=dtype, device=parameter.device) @ rows


def make_noise(estimate: Estimate, parameters: Parameters) -> None:
    """Have the noise of small parameters made in one call; it is then kept for their gradients."""
    directions = [d for d, c in zip(estimate.directions, estimate.coefficients.tolist(), strict=True) if c == c]
    kind, distribution = estimate.distribution, full(estimate.distribution)
    for device, here in by_device(parameters).items():
        parts = [part for name, p in here.items() for part in parts_of(kind, name, p.shape)]
        small = [part for part in parts if len(directions) * (part.stop - part.start) <= KEPT_BLOCKS]
        held = accumulate(len(directions) * (part.stop - part.start) * BLOCK_BYTES for part in small)
        together = [part for part, size in zip(small, held, strict=True) if size <= KEPT_BYTES // 2]
        if len(together) > 1:
            packed_noise(distribution, directions, together, device)


def low_rank_sum(
    kind: Kind, directions: Sequence[Direction], coefficients: Sequence[float], name: str, parameter: Tensor
) -> Tensor:
    """Σᵢ cᵢ Aᵢ Bᵢᵀ/√r, (R, C), as one product for every chunk of directions: their factors side by side."""
    assert isinstance(kind, LowRank)
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    total = torch.zeros(
        parameter.numel() // parameter.shape[-1], parameter.shape[-1], dtype=dtype, device=parameter.device
    )
    held = max(1, FACTOR_BYTES // factor_bytes(kind, parameter.shape))
    for first, last in spans(len(directions), held):
        a, b = kind.factors(directions[first:last], {name: parameter})[name]  # (G, R, r), (G, C, r)
        scales = torch.tensor(coefficients[first:last], dtype=dtype, device=parameter.device)
        left = (a.to(dtype) * scales[:, None, None]).transpose(0, 1).flatten(1)  # (R, G·r)
        total.addmm_(left, b.to(dtype).mT.flatten(0, 1))  # (G·r, C)
    return total


class Update(torch.optim.Optimizer):
    """Runs an optimizer's step one parameter at a time, on the estimate that it holds.

    For each parameter: make ĝ, set `.grad`, step, drop it. Neighbouring small parameters share a call, so that ĝ
    never takes more memory than the largest parameter. Everything else is the optimizer's own.

    Args:
        optimizer: any torch optimizer that works from `.grad`.
        names: parameter → its name in the unwrapped model, for every parameter of the optimizer.

    Raises:
        ValueError: the optimizer needs a backward pass or more than gradients, or two names share an id.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, names: dict[Tensor, str]):
        check_optimizer(type(optimizer).__name__)
        self.optimizer = optimizer
        trained = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        if any(p not in names for p in trained):
            raise ValueError(
                "The optimizer holds parameters that are not the model's: make it from `model.parameters()`."
            )
        self.parameters = {names[p]: p for p in trained}
        check_names(list(self.parameters))
        self.forward_passes = 0  # of the whole run, saved with the optimizer as are the settings it was made with
        self.settings: dict[str, Any] = {}
        self.carried_state: Tensor | None = None  # of a recurrent model, from batch to batch, and saved as well
        self.population: int | None = None  # members a forward pass, as chosen at the first step, and saved as well
        self.estimate: Estimate | None = None
        self.clip = 1.0

    def hold(self, estimate: Estimate) -> None:
        """Keep the estimate for the next `step`."""
        self.estimate, self.clip = estimate, 1.0

    def clip_(self, max_norm: float) -> Tensor:
        """Norm of ĝ, a float64 scalar; the next step uses ĝ · min(1, max_norm / norm). Costs a pass over z."""
        norms = [torch.linalg.vector_norm(self._gradient(name)).cpu().double() for name in self.parameters]
        norm = torch.linalg.vector_norm(torch.stack(norms))
        self.clip = min(1.0, max_norm / (norm.item() + 1e-6))
        return norm

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # no loss to return
        """Apply the held estimate and drop it."""
        assert closure is None, "An estimate is applied, and no loss evaluated again."
        assert self.estimate is not None, "`hold` an estimate before `step`."
        for bucket in self._buckets():
            make_noise(self.estimate, {name: self.parameters[name] for name in bucket})
            for name in bucket:
                self.parameters[name].grad = self._gradient(name)
            self.optimizer.step()
            for name in bucket:
                self.parameters[name].grad = None
        self.estimate = None

    def _gradient(self, name: str) -> Tensor:
        assert self.estimate is not None
        full = gradient(self.estimate, name, self.parameters[name])
        return full if self.clip == 1.0 else full.mul_(self.clip)

    def _buckets(self) -> Iterator[list[str]]:
        """Neighbouring parameters, together no larger than the largest one."""
        numels = {name: p.numel() for name, p in self.parameters.items()}
        separate = f"{type(self.optimizer).__module__}.".startswith(SEPARATE)
        room = max(numels.values()) if separate else sum(numels.values())
        bucket: list[str] = []
        filled = 0
        for name, numel in numels.items():
            if bucket and filled + numel > room:
                yield bucket
                bucket, filled = [], 0
            bucket.append(name)
            filled += numel
        yield bucket

    # accelerate and the schedulers replace these lists and dicts, so they are looked up, never kept
    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        return self.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.optimizer.defaults = defaults

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        own = {name: vars(self)[name] for name in OWN}
        return self.optimizer.state_dict() | {"zoo": own | self.settings}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a saved state; an optimizer's own, from training with gradients, will do."""
        inner = dict(state_dict)
        saved = inner.pop("zoo", {})
        vars(self).update({name: saved[name] for name in OWN if name in saved})
        for name, now in self.settings.items():
            then = saved.get(name, now)
            if now != then:
                logger.warning(
                    f"`{name}` is {now!r} now and was {then!r} when the checkpoint was made: the steps from here on "
                    f"are not those of an uninterrupted run. Set `{name}`={then!r} if that is what you want."
                )
        self.optimizer.load_state_dict(inner)
