"""How members are evaluated, one at a time or many in a forward pass: what pays, what fits, and what is done if not.

Letters: P members.
"""

import logging
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .failures import out_of_memory, place, said
from .low_rank import Kind
from .meter import work
from .perturbation import Member, Objective, Parameters, kept, probe
from .population import probe_population
from .prediction import (
    Asked,
    Growth,
    Measured,
    beside,
    even,
    grown,
    growth,
    largest,
    may_be_worth,
    may_pay,
    rates_of,
    room,
    seconds,
    work_alone,
    work_of_two,
)


logger = logging.getLogger(__name__)

PAYS = 0.9  # of the time of members alone that a population should take at most: a prediction errs
EVERY = 1 << 32  # in place of a batch's key, which has 32 bits: whatever the batch


class Probes:
    """Evaluates the members of a run's steps, in the same way for all batches of about one shape.

    Args:
        choice: "serial", one member at a time; "population", many in a forward pass; "auto", what pays.
        members_per_forward: of a population; None: as many as fit into what may be added to inference's memory, which
            is max(weights, 64 MB).
        chosen: `key` of a batch → members a forward pass, as chosen before; 1 is serial, and 1 for `EVERY` is what
            `auto` keeps to once a population has failed.

    Attributes:
        predicted: `key` of a batch → MB that a population of as many members as were chosen should hold.
    """

    def __init__(self, choice: str, members_per_forward: int | None = None, chosen: dict[int, int] | None = None):
        self.choice, self.members_per_forward = choice, members_per_forward
        self.chosen = dict(chosen or {})
        self.predicted: dict[int, float] = {}
        self.warned = False  # that there is nothing to be evaluated together

    def key(self, batch: Mapping[str, Any]) -> int:
        """A number for all batches that share a choice, the same in every process, or `EVERY` when all of them do."""
        if self.choice == "auto" and EVERY in self.chosen:
            return EVERY
        # what was asked for is a part of it: under other arguments, what a checkpoint brings is no choice
        return zlib.crc32(repr((self.choice, self.members_per_forward, largest(batch))).encode())

    def losses(
        self,
        objective: Objective,
        parameters: Parameters,
        members: Sequence[Member],
        smoothing_radius: float,
        *,
        model: nn.Module,
        distribution: Kind,
        total: int = 0,
        batch: Mapping[str, Any] | None = None,
        watched: bool = False,
    ) -> Tensor:
        """Losses of the members, (P,) float64 on the CPU; see `probe`.

        Args:
            total: members by which is chosen, the same on all ranks; those given, if it is 0.
            batch: the objective's; of its tensors, nested ones included, the shapes alone are read.
            watched: somebody looks at each member's forward pass, so that `auto` runs them one at a time.

        Raises:
            RuntimeError: a population was asked for, and the model cannot be run as one.
        """
        asked = Asked(objective, parameters, members, smoothing_radius, model, distribution)
        if self.choice == "population" or (self.choice == "auto" and not watched and EVERY not in self.chosen):
            found = self._together(asked, total or len(members), batch or {})
            if found is not None:
                return found
        if self.choice == "population" and members:
            self._warn_of_one(asked)
        return probe(objective, parameters, members, smoothing_radius, distribution=distribution)

    def _together(self, asked: Asked, total: int, batch: Mapping[str, Any]) -> Tensor | None:
        """Losses by populations; None where members are to be evaluated one at a time."""
        key = self.key(batch)
        if total > 1 and asked.members and key not in self.chosen:
            self.chosen[key] = self._choose(asked, key, total, batch)
        while len(asked.members) > 1 and self.chosen.get(key, 1) > 1:
            found = self._population(asked, key)
            if found is not None:
                return found
        return None

    def _choose(self, asked: Asked, key: int, total: int, batch: Mapping[str, Any]) -> int:
        """Members a forward pass for all batches of a key, 1 where one at a time is faster.

        It depends on shapes alone: those of the first batch of its key, scaled to the largest.

        Args:
            total: members that a rank has, about.
        """
        auto, larger = self.choice == "auto", growth(batch)
        if self.members_per_forward == 1 or (auto and not may_be_worth(asked, total, batch)):
            return 1
        with torch.no_grad(), kept(asked.parameters):  # an objective may write θ, as embeddings with `max_norm` do
            one = work(asked.objective)  # its errors are not those of a population
            if auto and not may_pay(asked, one, larger):
                return 1
            try:
                measured = Measured(one, *work_of_two(asked, loops=not auto))
            except Exception as error:
                self._failed(error, key, 2)
                return 1
        return self._compared(asked, key, total, measured, larger)

    def _compared(self, asked: Asked, key: int, total: int, measured: Measured, larger: Growth) -> int:
        """As many members as fit, or 1 where they should take longer than one at a time."""
        held = (larger.quadratic * measured.two.peak + measured.weights) / 2 + beside(asked)
        size = self.members_per_forward or even(total, int((room(asked.model) + measured.one.peak) / held))
        self.predicted[key] = min(size, total) * held / 1e6
        one, two = work_alone(asked, measured.one, larger), grown(measured.two, measured.weights, larger)
        serial, population = seconds(one, two, total, size, rates_of(asked))
        chosen = size if self.choice == "population" or population < PAYS * serial else 1
        logger.info(
            f"probes: {chosen} members a forward pass; a population of {size} would hold about "
            f"{self.predicted[key]:,.0f} MB, and should take {population / serial:.2f} of the time of {size} alone."
        )
        return chosen

    def _population(self, asked: Asked, key: int) -> Tensor | None:
        """Losses by populations; None where they failed, and something else is to be done from now on."""
        members = self.chosen[key]
        try:
            return probe_population(
                *asked[:4], model=asked.model, members_per_forward=members, distribution=asked.kind
            )
        except Exception as error:
            self._failed(error, key, members)
        return None  # outside of the handler, whose error holds what did not fit

    def _failed(self, error: Exception, key: int, members: int) -> None:
        """What is done from now on: half as many members where memory did not suffice, else one at a time.

        Raises:
            RuntimeError: a population was asked for, and more memory would not help.
        """
        if out_of_memory(error):
            self.chosen[key], self.warned = members // 2, True
            logger.warning(
                f"A population of {members} members does not fit into memory ({said(error)}): "
                f"{members // 2} in a forward pass from now on."
            )
            return
        if self.choice == "population":
            raise RuntimeError(
                "probes='population': this model or objective cannot be run under torch.func.vmap "
                f"({said(error)}{place(error)}). Use probes='serial' or 'auto'."
            ) from error
        logger.warning(
            f"probes='auto': members are evaluated one at a time, as a population failed: {said(error)}{place(error)}"
        )
        self.chosen = {EVERY: 1}

    def _warn_of_one(self, asked: Asked) -> None:
        if not self.warned:
            logger.warning(ONE.format(self.members_per_forward, f"{room(asked.model) / 1e6:,.0f}", len(asked.members)))
        self.warned = True


ONE = (
    "probes='population': members are evaluated one at a time, as one is all that fits. `members_per_forward` is {} "
    "(unset, it is what fits into {} MB), and of a step this process has {}: raise `members_per_forward` or "
    "`num_directions`, or use probes='serial'."
)
