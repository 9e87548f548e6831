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

FEW = 8  # members of a step, with which a population does not make up for its own beginning
LARGE = 3e9  # weights times numbers in a batch: 50 ms of arithmetic on two cores, beside which all else is little
ADDED_BYTES = 64_000_000  # that a population may add to the memory of inference, or the weights' size if that is more


class Probes:
    """Evaluates the members of a run's steps, in the same way for all batches of one size.

    Args:
        choice: "serial", one member at a time; "population", many in a forward pass; "auto", what pays.
        members_per_forward: of a population; None: as many as fit into what may be added to inference's memory, which
            is max(weights, 64 MB).
        chosen: numbers in a batch → members a forward pass, as chosen before; 1 is serial.
    """

    def __init__(self, choice: str, members_per_forward: int | None = None, chosen: dict[int, int] | None = None):
        self.choice, self.members_per_forward = choice, members_per_forward
        self.chosen = dict(chosen or {})

    def losses(
        self,
        objective: Objective,
        parameters: Parameters,
        members: Sequence[Member],
        smoothing_radius: float,
        *,
        model: nn.Module,
        distribution: Kind,
        of: tuple[int, int] = (0, 0),
    ) -> Tensor:
        """Losses of the members, (P,) float64 on the CPU; see `probe`.

        Args:
            of: members of the whole step, on all ranks, and numbers in the batch.

        Raises:
            RuntimeError: a population was asked for, and the model cannot be run as one.
        """
        arguments = objective, parameters, members, smoothing_radius
        total, size = max(of[0], len(members)), of[1]
        try:
            if size not in self.chosen:
                large = size * sum(p.numel() for p in parameters.values()) > LARGE
                little = large or total < FEW
                serial = self.choice == "serial" or len(members) < 2 or (little and self.choice == "auto")
                self.chosen[size] = (
                    1 if serial else self._choose(*arguments, model=model, kind=distribution, total=total)
                )
            if self.chosen[size] > 1:
                return self._population(*arguments, model=model, kind=distribution, size=size)
        except Exception as error:
            if self.choice == "population":
                raise RuntimeError(
                    f"probes='population': this model or objective cannot be run under torch.func.vmap ({error}). "
                    "Use probes='serial' or 'auto'."
                ) from error
            logger.warning(f"probes='auto': members are evaluated one at a time, as a population failed: {error}")
            self.choice, self.chosen = "serial", {size: 1}
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
        total: int,
    ) -> int:
        """Members a forward pass, 1 where one at a time is faster: from shapes alone, so always the same."""
        asked = self.choice == "population"
        if asked and self.members_per_forward:
            return self.members_per_forward
        device = next(iter(parameters.values())).device.type
        rates, room = RATES.get(device, RATES["cuda"]), max(ADDED_BYTES, sum(p.nbytes for p in model.parameters()))
        if not asked and 2 * least_bytes(parameters, kind) > room:
            return 1
        with torch.no_grad():
            one = work(objective)
            if not asked and (2 * least_bytes(parameters, kind) + one.peak > room or not may_pay(one, rates)):
                return 1
            weights = member_weights(parameters, members[:2], smoothing_radius, kind)
            with warnings.catch_warnings():
                if not asked:  # an operation without a rule for vmap runs member by member, which does not pay
                    warnings.filterwarnings("error", message=".*batching rule")
                two = work(lambda: evaluate(objective, model, parameters, weights))
        # a direction's noise is there as long as the weights of its two members
        held = (two.peak + 1.5 * sum(tensor.nbytes for tensor in tensors(weights))) / 2
        size = self.members_per_forward or even(total, int((room + one.peak) / held))
        serial, population = seconds(one, two, total, size, rates)
        chosen = size if asked or population < serial else 1
        logger.info(
            f"probes: {chosen} members a forward pass; a population of {size} would hold about "
            f"{size * held / 1e6:,.0f} MB, and should take {population / serial:.2f} of the time of {size} alone."
        )
        return chosen

    def _population(self, *arguments: Any, model: nn.Module, kind: Kind, size: int) -> Tensor:
        """Losses by populations; where one does not fit into memory, although it was foreseen to, by smaller ones."""
        members = self.chosen[size]
        try:
            return probe_population(*arguments, model=model, members_per_forward=members, distribution=kind)
        except Exception as error:
            if not out_of_memory(error) or members == 1:
                raise
            logger.warning(
                f"A population of {members} members does not fit into memory ({str(error).splitlines()[0]}): "
                f"{members // 2} in a forward pass from now on."
            )
        self.chosen[size] = members // 2  # outside of the handler, whose error holds what did not fit
        return self._population(*arguments, model=model, kind=kind, size=size)


def even(total: int, most: int) -> int:
    """Members a forward pass: as few passes as can be with at most so many, of about one size."""
    return math.ceil(total / math.ceil(total / max(1, min(most, total))))


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


def may_pay(one: Work, rates: Rates) -> bool:
    """Whether starting operations, which members can share, is a third of a forward pass or more."""
    return 2 * one.operations * rates.operation >= one.bytes * rates.byte + one.flops * rates.flop


def seconds(one: Work, two: Work, members: int, size: int, rates: Rates) -> tuple[float, float]:
    """About how long the members of a step take, alone and as populations of a size.

    Args:
        one, two: the work of one member alone, and of a population of two.
    """
    alone = one.operations * rates.operation + one.bytes * rates.byte + one.flops * rates.flop
    member = two.bytes / 2 * rates.byte + two.flops / 2 * rates.flop
    passes = math.ceil(members / size)
    return members * alone, passes * two.operations * rates.member_operation + members * member


def out_of_memory(error: Exception) -> bool:
    """Whether an allocator gave up; a CPU's has no class of errors of its own."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)
