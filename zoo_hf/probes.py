"""How members are evaluated, one at a time or many in a forward pass: what pays, what fits, and what is done if not.

Letters: P members.
"""

import logging
import math
import re
import traceback
import warnings
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .low_rank import Kind, factor_bytes, is_low_rank
from .meter import Work, tensors, work
from .perturbation import Member, Objective, Parameters, kept, probe
from .population import evaluate, member_weights, probe_population


logger = logging.getLogger(__name__)

FEW = 12  # members of a step; with fewer a population may not make up for its own beginning
LARGE = 3e9  # weights times numbers in a batch: 50 ms of arithmetic on two cores, beside which all else is little
PAYS = 0.9  # of the time of members alone that a population should take at most: a prediction errs
ADDED_BYTES = 64_000_000  # that a population may add to the memory of inference, or the weights' size if that is more
EVERY = 1 << 32  # in place of a batch's key, which has 32 bits: whatever the batch


class Asked(NamedTuple):
    """Members to be evaluated; see `Probes.losses`."""

    objective: Objective
    parameters: Parameters
    members: Sequence[Member]
    smoothing_radius: float
    model: nn.Module
    kind: Kind


class Growth(NamedTuple):
    """The largest batch of a key beside the present one.

    Args:
        numbers: in all tensors of the largest.
        linear: what grows with a tensor's entries.
        quadratic: what also grows with one dimension squared, as attention does, at most.
    """

    numbers: int
    linear: float
    quadratic: float


class Measured(NamedTuple):
    """The work of one member alone and of a population of two, and the bytes of the latter's weights."""

    one: Work
    two: Work
    weights: int


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
            self.chosen[key] = self._choose(asked, key, total, growth(batch))
        while len(asked.members) > 1 and self.chosen.get(key, 1) > 1:
            found = self._population(asked, key)
            if found is not None:
                return found
        return None

    def _choose(self, asked: Asked, key: int, total: int, larger: Growth) -> int:
        """Members a forward pass for all batches of a key, 1 where one at a time is faster.

        It depends on shapes alone: those of the first batch of its key, scaled to the largest.

        Args:
            total: members that a rank has, about.
            larger: what the largest of these batches is beside the present one.
        """
        auto = self.choice == "auto"
        if self.members_per_forward == 1 or (auto and not may_be_worth(asked, total, larger.numbers)):
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


def work_of_two(asked: Asked, *, loops: bool) -> tuple[Work, int]:
    """The work of a population of two, and the bytes of its weights.

    Args:
        loops: whether operations without a rule for vmap may run member by member, which does not pay.
    """
    members = [*asked.members, *asked.members][:2]  # a process may have one of a step's members
    weights = member_weights(asked.parameters, members, asked.smoothing_radius, asked.kind)
    with warnings.catch_warnings():
        if not loops:
            warnings.filterwarnings("error", message=".*batching rule")
        two = work(lambda: evaluate(asked.objective, asked.model, asked.parameters, weights))
    return two, sum(tensor.nbytes for tensor in tensors(weights))


def beside(asked: Asked) -> float:
    """Bytes that are there beside a member's weights while they are made: its share of the noise, and a wide copy."""
    whole = [p for name, p in asked.parameters.items() if not is_low_rank(asked.kind, name)]
    directions = len({member.direction for member in asked.members})
    noise = 4 * sum(p.numel() for p in whole) * directions / len(asked.members)
    return noise + max((4 * p.numel() for p in whole if p.itemsize < 4), default=0)


def largest(batch: Mapping[str, Any]) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a batch's tensors, every dimension rounded up to a power of two.

    Batches of all lengths in between share one choice, as measuring takes as long as three forward passes and more.
    """
    shapes = [(str(name), tensor.shape) for name, value in batch.items() for tensor in tensors(value)]
    return sorted((name, tuple(map(rounded, shape))) for name, shape in shapes)


def rounded(length: int) -> int:
    return 1 << (length - 1).bit_length() if length else 0


def growth(batch: Mapping[str, Any]) -> Growth:
    shapes = [tensor.shape for value in batch.values() for tensor in tensors(value) if tensor.numel()]
    ratios = [[rounded(length) / length for length in shape] for shape in shapes]
    linear = max(map(math.prod, ratios), default=1.0)
    longest = max((ratio for some in ratios for ratio in some), default=1.0)
    return Growth(sum(math.prod(shape) for _, shape in largest(batch)), linear, linear * longest)


def grown(done: Work, weights: int, larger: Growth) -> Work:
    """The same on a larger batch, for which weights are read as before; as many operations, as if none were a loop."""
    fixed = min(weights, done.bytes)
    activations = (done.bytes - fixed) * larger.linear
    return done._replace(bytes=int(fixed + activations), flops=int(done.flops * larger.linear))


def work_alone(asked: Asked, one: Work, larger: Growth) -> Work:
    """The work of one member on a larger batch."""
    return grown(one, sum(p.nbytes for p in asked.parameters.values()), larger)


def may_be_worth(asked: Asked, total: int, numbers: int) -> bool:
    """Whether a population may pay, before anything was run."""
    small = numbers * sum(p.numel() for p in asked.parameters.values()) <= LARGE
    return total >= FEW and small and 2 * least_bytes(asked.parameters, asked.kind) <= room(asked.model)


def may_pay(asked: Asked, one: Work, larger: Growth) -> bool:
    """Whether two members fit, and starting operations, which they can share, is a third of a forward pass or more."""
    if 2 * least_bytes(asked.parameters, asked.kind) + larger.quadratic * one.peak > room(asked.model):
        return False
    done, rates = work_alone(asked, one, larger), rates_of(asked)
    return 2 * done.operations * rates.operation >= done.bytes * rates.byte + done.flops * rates.flop


def room(model: nn.Module) -> int:
    """Bytes that a population may add to the memory of inference."""
    return max(ADDED_BYTES, sum(p.nbytes for p in model.parameters()))


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


def rates_of(asked: Asked) -> Rates:
    """Of the device that the model is on."""
    return RATES.get(next(iter(asked.parameters.values())).device.type, RATES["cuda"])


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
    """Whether an allocator gave up; not all have a class of errors of their own."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(text in str(error) for text in FULL)


FULL = (
    "DefaultCPUAllocator",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "MPS backend out of memory",
)
# of torch, to file an issue about what is no fault of its own
ADVICE = re.compile(r",?\s*(Please file|If error is occurring|\(Triggered internally).*", re.DOTALL | re.IGNORECASE)


def said(error: Exception) -> str:
    """What an error says, in one line."""
    return " ".join(ADVICE.sub("", str(error)).split()) or type(error).__name__


def place(error: Exception) -> str:
    """Where in the objective it was raised: file, line and function of the innermost frame outside of torch."""
    ours = [str(Path(__file__).with_name(name)) for name in ("population.py", "meter.py", "probes.py")]
    frames, torchs = traceback.extract_tb(error.__traceback__), str(Path(torch.__file__).parent)
    calls = [number for number, frame in enumerate(frames) if (frame.filename, frame.name) == (ours[0], "forward")]
    inside = frames[calls[0] :] if calls else []  # from where the objective is called
    found = [f for f in inside if f.filename not in ours and not f.filename.startswith(torchs)]
    return f"; {found[-1].filename}, line {found[-1].lineno}, in {found[-1].name}" if found else ""
