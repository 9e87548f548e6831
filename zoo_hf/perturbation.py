"""One member at a time: the weights become θ + s ε z, the objective is evaluated, θ is put back bit for bit.

Letters: P members, n directions.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from .noise import CHUNK, DISTRIBUTIONS, Direction, Distribution, spans


Objective = Callable[[], Tensor]
Parameters = dict[str, Tensor]

HELD_BYTES = 2 << 20  # packed noise that may be kept between the two members of a pair, or a share of the weights:
HELD_SHARE = 1 / 20


class Member(NamedTuple):
    """One displaced copy of the model, θ + sign · ε z; sign 0 is θ itself."""

    direction: Direction
    sign: int


def probe(
    objective: Objective,
    parameters: Parameters,
    members: Sequence[Member],
    smoothing_radius: float,
    *,
    distribution: str = "rademacher",
) -> Tensor:
    """Losses of the members, (P,) float64 on the CPU, in their order; θ is bit for bit as before.

    Member (z, s) is evaluated at round(θ + s ε z), rounded once, to each weight's dtype.

    Arguments:
        objective: evaluates the model at its present weights; returns a scalar.
        parameters: name → weight, contiguous; the names are those of the unwrapped model.
        smoothing_radius: ε > 0, in units of the weights.

    Raises:
        ValueError: a weight is not contiguous, or the objective's value is no scalar.
        Exception: whatever the objective raises; θ is put back first.
    """
    noise = HeldNoise(parameters, DISTRIBUTIONS[distribution], [member.direction for member in members])
    losses = []
    with kept(parameters) as saved:
        for direction, sign in members:
            noise.displace_(parameters, saved, direction, sign * smoothing_radius)
            losses.append(_scalar(objective()))
    return torch.stack(losses).cpu().double() if losses else torch.empty(0, dtype=torch.float64)


@contextmanager
def perturbed(
    parameters: Parameters, direction: Direction, scale: float, *, distribution: str = "rademacher"
) -> Iterator[None]:
    """Hold θ + scale · z inside the block; on exit θ is bit-identical to before, even after an error."""
    with kept(parameters) as saved:
        HeldNoise(parameters, DISTRIBUTIONS[distribution], [direction]).displace_(parameters, saved, direction, scale)
        yield


@contextmanager
def kept(parameters: Parameters) -> Iterator[Parameters]:
    """Copies of θ; whatever is written to the weights inside the block, they hold θ again after it."""
    for name, parameter in parameters.items():
        if not parameter.is_contiguous():
            raise ValueError(f"Parameter {name!r} is not contiguous: replace it by a copy made with `.contiguous()`.")
    with torch.no_grad():
        saved = {name: parameter.clone() for name, parameter in parameters.items()}
        try:
            yield saved
        finally:
            for name, parameter in parameters.items():
                parameter.copy_(saved[name])


class HeldNoise:
    """Packed noise of the next few directions, made in one call a parameter and used by both members of a pair.

    It holds as many directions as fit into 2 MiB or a twentieth of the weights; where not even one fits, every chunk
    is made when it is used.
    """

    def __init__(self, parameters: Parameters, distribution: Distribution, directions: Sequence[Direction]):
        self.distribution = distribution
        self.order = list(dict.fromkeys(directions))
        self.numels = {name: parameter.numel() for name, parameter in parameters.items()}
        room = max(HELD_BYTES, HELD_SHARE * sum(p.numel() * p.element_size() for p in parameters.values()))
        self.capacity = int(room / max(1, sum(self.numels.values()) * distribution.packed_bytes_per_entry))
        self.held: dict[Direction, int] = {}  # direction → its row in every packed tensor
        self.packed: Parameters = {}

    def displace_(self, parameters: Parameters, saved: Parameters, direction: Direction, scale: float) -> None:
        """Write θ + scale · z into the weights; `saved` holds θ."""
        for name, parameter in parameters.items():
            weights, start_weights = parameter.view(-1), saved[name].view(-1)
            # summed in float32 at least, then rounded once to the weight's dtype
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            for start, stop in spans(parameter.numel(), CHUNK):
                packed = self._chunk(direction, name, start, stop, parameter.device)
                noise = self.distribution.unpack(packed, scale, dtype)[: stop - start]
                torch.add(start_weights[start:stop], noise, out=weights[start:stop])

    def _chunk(self, direction: Direction, name: str, start: int, stop: int, device: torch.device) -> Tensor:
        size = self.distribution.entries_per_block
        first, last = start // size, -(-stop // size)
        if not self.capacity:
            return self.distribution.pack([direction], name, first, last, device)[0]
        if direction not in self.held:
            at = self.order.index(direction)
            self.held = {held: row for row, held in enumerate(self.order[at : at + self.capacity])}
            self.packed = {}
        if name not in self.packed:
            self.packed[name] = self.distribution.pack(list(self.held), name, 0, -(-self.numels[name] // size), device)
        length = self.distribution.packed_per_block
        return self.packed[name][self.held[direction], first * length : last * length]


def _scalar(loss: Tensor) -> Tensor:
    if loss.numel() != 1:
        raise ValueError(f"The objective must return a scalar, got a tensor of shape {tuple(loss.shape)}.")
    return loss.detach().reshape(())


@contextmanager
def probing_mode(model: torch.nn.Module, *, dropout: bool) -> Iterator[None]:
    """Inference inside the block: no graph is kept and dropout is off, or on when asked for; put back afterwards."""
    training = {module: module.training for module in model.modules()}
    model.train(dropout)
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, was in training.items():
            module.training = was


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Global generators start from `seed` inside the block, and are as before after it."""
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        torch.manual_seed(seed)
        yield


def share_moved(parameters: Parameters, smoothing_radius: float, dtype: torch.dtype | None = None) -> float:
    """Share of the weights that θ + ε changes in the dtype they are computed in (their own when None), in [0, 1]."""
    moved = 0
    for parameter in parameters.values():
        for start, stop in spans(parameter.numel(), CHUNK):
            weights = parameter.detach().view(-1)[start:stop]
            displaced = (weights.double() + smoothing_radius).to(weights.dtype).to(dtype or weights.dtype)
            moved += int((displaced != weights.to(displaced.dtype)).sum())
    return moved / sum(parameter.numel() for parameter in parameters.values())
