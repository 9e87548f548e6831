"""What a population of members would take, and one at a time, from the work of two: a function of shapes alone.

Letters: P members.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from .low_rank import Kind, factor_bytes, is_low_rank
from .meter import Work, tensors, work
from .perturbation import Member, Objective, Parameters
from .population import evaluate, forms_of_names, member_weights


FEW = 12  # members of a step; with fewer a population may not make up for its own beginning
ADDED_BYTES = 64_000_000  # that a population may add to the memory of inference, or the weights' size if that is more
ADDED_SHARE = 1 / 8  # of a GPU's memory that it may add there


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
        linear: what grows with a tensor's entries.
        quadratic: what also grows with one dimension squared, as attention does, at most.
    """

    linear: float
    quadratic: float


class Measured(NamedTuple):
    """The work of one member alone and of a population of two, and the bytes of the latter's weights."""

    one: Work
    two: Work
    weights: int


def work_of_two(asked: Asked, *, loops: bool) -> tuple[Work, int]:
    """The work of a population of two, and the bytes of its weights.

    Args:
        loops: whether operations without a rule for vmap may run member by member, which does not pay.
    """
    members = [*asked.members, *asked.members][:2]  # a process may have one of a step's members
    forms = forms_of_names(asked.model, asked.parameters, members, asked.smoothing_radius, asked.kind)
    weights = member_weights(asked.parameters, members, asked.smoothing_radius, asked.kind, forms)
    with warnings.catch_warnings():
        if not loops:
            warnings.filterwarnings("error", message=".*batching rule")
        two = work(lambda: evaluate(asked.objective, asked.model, weights))
    return two, sum(tensor.nbytes for tensor in tensors(weights.own))


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
    return Growth(linear, linear * longest)


def grown(done: Work, weights: int, larger: Growth) -> Work:
    """The same on a larger batch, for which weights are read as before; as many operations, as if none were a loop."""
    fixed = min(weights, done.bytes)
    activations = (done.bytes - fixed) * larger.linear
    return done._replace(bytes=int(fixed + activations), flops=int(done.flops * larger.linear))


def work_alone(asked: Asked, one: Work, larger: Growth) -> Work:
    """The work of one member on a larger batch."""
    return grown(one, sum(p.nbytes for p in asked.parameters.values()), larger)


def may_be_worth(asked: Asked, total: int, batch: Mapping[str, Any]) -> bool:
    """Whether a population may pay, before anything was run."""
    numbers = sum(math.prod(shape) for _, shape in largest(batch))
    small = numbers * sum(p.numel() for p in asked.parameters.values()) <= rates_of(asked).large
    return total >= FEW and small and 2 * least_bytes(asked) <= room(asked.model)


def may_pay(asked: Asked, one: Work, larger: Growth) -> bool:
    """Whether two members fit, and starting operations, which they can share, is a third of a forward pass or more."""
    if 2 * least_bytes(asked) + larger.quadratic * one.peak > room(asked.model):
        return False
    done, rates = work_alone(asked, one, larger), rates_of(asked)
    return 2 * done.operations * rates.operation >= done.bytes * rates.byte + done.flops * rates.flop


def room(model: nn.Module) -> int:
    """Bytes that a population may add to the memory of inference."""
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    on_gpus = [torch.cuda.get_device_properties(device).total_memory * ADDED_SHARE for device in devices]
    return max(ADDED_BYTES, sum(p.nbytes for p in model.parameters()), *map(int, on_gpus))


def even(total: int, most: int) -> int:
    """Members a forward pass: as few passes as can be with at most so many, of about one size."""
    return math.ceil(total / math.ceil(total / max(1, min(most, total))))


def least_bytes(asked: Asked) -> int:
    """What a member's weights, or what their displacements are made of, take at least."""
    named = forms_of_names(asked.model, asked.parameters, asked.members, asked.smoothing_radius, asked.kind)
    whole = [p for name, p in asked.parameters.items() if name not in named and not is_low_rank(asked.kind, name)]
    matrices = [p for name, p in asked.parameters.items() if is_low_rank(asked.kind, name)]
    return sum(p.nbytes for p in whole) + sum(factor_bytes(asked.kind, p.shape) for p in matrices)


class Rates(NamedTuple):
    """What a device needs, in seconds.

    Args:
        operation: for each operation of a model that runs alone.
        member_operation: for each operation of a population, which goes through vmap.
        byte: for each byte read or written.
        flop: for each floating-point operation of a matrix product.
        large: weights times numbers in a batch whose arithmetic takes so long that all else is little beside it.
    """

    operation: float
    member_operation: float
    byte: float
    flop: float
    large: float


# fitted by benchmarks/population.py on two cores of an AMD EPYC; those of a GPU are not measured
RATES = {"cpu": Rates(6.7e-6, 8.3e-6, 5.4e-11, 1.5e-11, 3e9), "cuda": Rates(6e-6, 2e-5, 1e-12, 5e-14, 1e12)}


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
