"""How members are evaluated, one at a time or many in a forward pass: what pays, what fits, and what is done if not.

Letters: P members.
"""

import logging
import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .low_rank import Kind, factor_bytes, is_low_rank
from .meter import Work, tensors, work
from .perturbation import Member, Objective, Parameters, probe
from .population import evaluate, member_weights, probe_population


logger = logging.getLogger(__name__)

ADDED_BYTES = 64_000_000  # that a population may add to the memory of inference, or the weights' size if that is more


class Probes:
    """Evaluates the members of a run's steps, always in the same way.

    Args:
        choice: "serial", one member at a time; "population", many in a forward pass; "auto", what pays.
        members_per_forward: of a population; None: as many as fit into what may be added to inference's memory, which
            is max(weights, 64 MB). 1 is serial.
    """

    def __init__(self, choice: str, members_per_forward: int | None = None):
        self.choice = choice
        self.members_per_forward = 1 if choice == "serial" else members_per_forward

    def losses(
        self,
        objective: Objective,
        parameters: Parameters,
        members: Sequence[Member],
        smoothing_radius: float,
        *,
        model: nn.Module,
        distribution: Kind,
    ) -> Tensor:
        """Losses of the members, (P,) float64 on the CPU; see `probe`.

        Raises:
            RuntimeError: a population was asked for, and the model cannot be run as one.
        """
        arguments = objective, parameters, members, smoothing_radius
        try:
            if self.members_per_forward is None:
                self.members_per_forward = self._choose(*arguments, model=model, kind=distribution)
            if self.members_per_forward > 1:
                return self._population(*arguments, model=model, kind=distribution)
        except Exception as error:
            if self.choice == "population":
                raise RuntimeError(
                    f"probes='population': this model or objective cannot be run under torch.func.vmap ({error}). "
                    "Use probes='serial' or 'auto'."
                ) from error
            logger.warning(f"probes='auto': members are evaluated one at a time, as a population failed: {error}")
            self.members_per_forward = 1
        return probe(*arguments, distribution=distribution)

    def _choose(
        self,
        objective: Objective,
        parameters: Parameters,
        members: Sequence[Member],
        smoothing_radius: float,
        *,
        model: nn.Module,
        kind: Kind,
    ) -> int:
        """Members a forward pass, 1 where one at a time is faster: from shapes alone, so always the same."""
        asked = self.choice == "population"
        room = max(ADDED_BYTES, sum(p.nbytes for p in model.parameters()))
        if len(members) < 2 or (not asked and 2 * least_bytes(parameters, kind) > room):
            return 1
        with torch.no_grad(), warnings.catch_warnings():
            if not asked:  # an operation without a rule for vmap runs member by member, which does not pay
                warnings.filterwarnings("error", message=".*batching rule")
            weights = member_weights(parameters, members[:2], smoothing_radius, kind)
            one = work(objective)
            if not asked and 2 * least_bytes(parameters, kind) + one.peak > room:
                return 1
            two = work(lambda: evaluate(objective, model, parameters, weights))
        # a direction's noise is there as long as the weights of its two members
        held = (two.peak + 1.5 * sum(tensor.nbytes for tensor in tensors(weights))) / 2
        fits = int((room + one.peak) / held)
        passes = math.ceil(len(members) / max(1, min(fits, len(members))))
        size = math.ceil(len(members) / passes)
        device = next(iter(parameters.values())).device.type
        serial, population = seconds(one, two, len(members), passes, RATES.get(device, RATES["cuda"]))
        chosen = size if size > 1 and (asked or population < serial) else 1
        logger.info(
            f"probes: {chosen} members a forward pass; a population of {size} would hold about "
            f"{size * held / 1e6:,.0f} MB, and should take {population / serial:.2f} of the time of {size} alone."
        )
        return chosen

    def _population(self, *arguments: Any, model: nn.Module, kind: Kind) -> Tensor:
        """Losses by populations; where one does not fit into memory, although it was foreseen to, by smaller ones."""
        size = self.members_per_forward
        assert size is not None
        try:
            return probe_population(*arguments, model=model, members_per_forward=size, distribution=kind)
        except Exception as error:
            if not out_of_memory(error) or size == 1:
                raise
            logger.warning(
                f"A population of {size} members does not fit into memory ({str(error).splitlines()[0]}): "
                f"{size // 2} in a forward pass from now on."
            )
        self.members_per_forward = size // 2  # outside of the handler, whose error holds what did not fit
        return self._population(*arguments, model=model, kind=kind)


def least_bytes(parameters: Parameters, kind: Kind) -> int:
    """What a member's weights, or their displacements' factors, take at least."""
    return sum(factor_bytes(kind, p.shape) if is_low_rank(kind, name) else p.nbytes for name, p in parameters.items())


class Rates(NamedTuple):
    """What a device needs, in seconds.

    Args:
        operation: for each operation of a model that runs alone.
        member_operation: for each operation of a population, which goes through vmap.
        byte: for each byte read or written.
        flop: for each floating-point operation of a matrix product.
    """

    operation: float
    member_operation: float
    byte: float
    flop: float


# fitted by benchmarks/population.py on two cores of an AMD EPYC; those of a GPU are not measured
RATES = {"cpu": Rates(6.7e-6, 8.3e-6, 5.4e-11, 1.5e-11), "cuda": Rates(6e-6, 2e-5, 1e-12, 5e-14)}


def seconds(one: Work, two: Work, members: int, passes: int, rates: Rates) -> tuple[float, float]:
    """About how long the members of a step take, alone and as populations in so many forward passes.

    Args:
        one, two: the work of one member alone, and of a population of two.
    """
    alone = one.operations * rates.operation + one.bytes * rates.byte + one.flops * rates.flop
    member = two.bytes / 2 * rates.byte + two.flops / 2 * rates.flop
    return members * alone, passes * two.operations * rates.member_operation + members * member


def out_of_memory(error: Exception) -> bool:
    """Whether an allocator gave up; a CPU's has no class of errors of its own."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)
