"""One member at a time: the weights become θ + s ε z, the objective is evaluated, θ is put back bit for bit.

Letters: P members, n directions.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from .kernels.displace import one_pass
from .low_rank import Kind, LowRank, entries_of, factor_bytes, full, is_low_rank
from .noise import CHUNK, PACKED_BYTES, Blocks, Direction, packed_noise, spans


Objective = Callable[[], Tensor]
Parameters = dict[str, Tensor]

HELD_SHARE = 1 / 20  # of the weights' memory that packed noise may take between the two members of a pair


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
    distribution: Kind = "rademacher",
) -> Tensor:
    """Losses of the members, (P,) float64 on the CPU, in their order; θ is bit for bit as before.

    Member (z, s) is evaluated at round(θ + s ε z), rounded once, to each weight's dtype.

    Args:
        objective: evaluates the model at its present weights; returns a scalar.
        parameters: name → weight, contiguous; the names are those of the unwrapped model.
        smoothing_radius: ε > 0, in units of the weights.

    Raises:
        ValueError: a weight is not contiguous, or the objective's value is no scalar.
        Exception: whatever the objective raises; θ is put back first.
    """
    losses = []
    with torch.no_grad(), kept(parameters) as saved:
        directions = [member.direction for member in members]
        displacement = Displacement(parameters, saved, distribution, directions)
        for direction, sign in members:
            displacement.write_(direction, sign * smoothing_radius)
            losses.append(scalar(objective()))
    return torch.stack(losses).cpu().double() if losses else torch.empty(0, dtype=torch.float64)


@contextmanager
def perturbed(
    parameters: Parameters, direction: Direction, scale: float, *, distribution: Kind = "rademacher"
) -> Iterator[None]:
    """Hold θ + scale · z inside the block; on exit θ is bit-identical to before, even after an error.

    Gradients can be computed inside, at the displaced weights.
    """
    with kept(parameters) as saved:
        with torch.no_grad():
            Displacement(parameters, saved, distribution, [direction]).write_(direction, scale)
        yield


@contextmanager
def kept(parameters: Parameters) -> Iterator[Parameters]:
    """Copies of θ; whatever is written to the weights inside the block, they hold θ again after it."""
    check_contiguous(parameters)
    saved = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        yield saved
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(saved[name])


def check_contiguous(parameters: Parameters) -> None:
    """Raises: ValueError when a weight is not contiguous, as displacements are written to flat views."""
    for name, parameter in parameters.items():
        if not parameter.is_contiguous():
            raise ValueError(f"Parameter {name!r} is not contiguous: replace it by a copy made with `.contiguous()`.")


class Piece(NamedTuple):
    """Neighbouring entries of one parameter."""

    weights: Tensor  # (M,), a view of the parameter
    saved: Tensor  # (M,), the same entries of θ
    name: str
    start: int  # place of the first entry in its parameter, a multiple of the block


class Displacement:
    """Writes θ + s z into the weights, for one direction after another.

    On a GPU a parameter is written in one pass, its noise made on the way. Elsewhere weights are written in groups of
    pieces whose noise is unpacked in one call. Matrices with low-rank directions are written by themselves. Packed
    noise and factors of the next few directions are held, as many as fit into 1 MiB or a twentieth of the weights, so
    that the two members of a pair share them; where not even one fits, they are made again.

    Args:
        parameters: name → weight, contiguous, to be written.
        saved: θ, not modified.
        directions: those that will be asked for, in that order.
    """

    def __init__(self, parameters: Parameters, saved: Parameters, kind: Kind, directions: Sequence[Direction]):
        self.kind, self.distribution, self.saved = kind, full(kind), saved
        self.matrices = {name: p for name, p in parameters.items() if is_low_rank(kind, name)}
        whole = {name: p for name, p in parameters.items() if name not in self.matrices}
        self.at_once = {name: p for name, p in whole.items() if one_pass(p)}
        self.others = {name: p for name, p in whole.items() if name not in self.at_once}
        self.groups = list(_groups(self.others, saved))
        self.order = list(dict.fromkeys(directions))
        room = max(PACKED_BYTES, HELD_SHARE * sum(p.numel() * p.element_size() for p in saved.values()))
        self.capacity = int(room / max(1, self._bytes()))
        self.held: dict[Direction, int] = {}  # direction → its row in what is held
        self.packed: list[Tensor] = []  # of each group, (G, …)
        self.pair: tuple[Direction, float, Tensor] | None = None  # scale · z as it was last written, 2 MiB at most
        self.factors: dict[str, tuple[Tensor, Tensor]] = {}  # of each matrix, (G, R, r) and (G, C, r)

    def _bytes(self) -> float:
        """What is held of one direction."""
        packed = sum(p.numel() for p in self.others.values()) * self.distribution.packed_bytes_per_entry
        return packed + sum(factor_bytes(self.kind, p.shape) for p in self.matrices.values())

    def _factors(self, directions: Sequence[Direction], matrices: Parameters) -> dict[str, tuple[Tensor, Tensor]]:
        return self.kind.factors(directions, matrices) if isinstance(self.kind, LowRank) else {}

    def write_(self, direction: Direction, scale: float) -> None:
        """Write θ + scale · z, summed in float32 at least and rounded once to each weight's dtype."""
        if self.capacity and direction not in self.held:
            at = self.order.index(direction)
            self._hold(self.order[at : at + self.capacity])
        self._write_matrices_(direction, scale)
        for name, parameter in self.at_once.items():
            flat, saved = parameter.view(-1), self.saved[name].view(-1)
            torch.ops.zoo_hf.displace_(flat, saved, list(direction), name, 0, scale, entries_of(self.kind))
        for number, group in enumerate(self.groups):
            noise, place = self._noise(number, direction, scale), 0
            for weights, saved, _, _ in group:
                torch.add(saved, noise[place : place + len(weights)], out=weights)
                place += self._blocks(len(weights)) * self.distribution.entries_per_block

    def _noise(self, number: int, direction: Direction, scale: float) -> Tensor:
        """scale · z on a group; where there is one group alone, −scale · z comes from what was made for its pair."""
        if self.pair is not None and self.pair[:2] == (direction, -scale):
            noise, self.pair = self.pair[2].neg_(), None
            return noise
        group = self.groups[number]
        packed = self.packed[number][self.held[direction]] if self.capacity else self._pack(direction, group)
        entries = len(packed) // self.distribution.packed_per_block * self.distribution.entries_per_block
        dtype = torch.promote_types(group[0].weights.dtype, torch.float32)
        noise = torch.empty(entries, dtype=dtype, device=packed.device)
        self.distribution.unpack_(noise, packed, scale)
        self.pair = (direction, scale, noise) if len(self.groups) == 1 else None
        return noise

    def _write_matrices_(self, direction: Direction, scale: float) -> None:
        for name, parameter in self.matrices.items():
            a, b = self.factors[name] if self.capacity else self._factors([direction], {name: parameter})[name]
            row = self.held[direction] if self.capacity else 0
            wide = torch.promote_types(parameter.dtype, torch.float32)
            left, right = a[row].to(wide), b[row].to(wide).mT  # (R, r), (r, C)
            weights, saved = (t.view(len(left), -1) for t in (parameter, self.saved[name]))
            for first, last in spans(len(left), max(1, CHUNK // right.shape[1])):
                weights[first:last] = torch.addmm(saved[first:last].to(wide), left[first:last], right, alpha=scale)

    def _hold(self, directions: Sequence[Direction]) -> None:
        """Make the noise of these directions, one parameter after the other, packed as its groups will want it."""
        self.packed, self.factors = [], {}  # freed before the next are made
        self.factors = self._factors(directions, self.matrices)
        whole: dict[str, Tensor] = {}
        for device, here in by_device(self.others).items():
            parts = [Blocks(name, 0, self._blocks(p.numel())) for name, p in here.items()]
            whole |= zip(here, packed_noise(self.distribution, directions, parts, device), strict=True)
        self.held = {direction: row for row, direction in enumerate(directions)}
        length = self.distribution.packed_per_block
        for group in self.groups:
            rows = [whole[p.name][:, p.start * length : p.stop * length] for p in map(self._part, group)]
            self.packed.append(rows[0] if len(rows) == 1 else torch.cat(rows, dim=1))

    def _pack(self, direction: Direction, group: list[Piece]) -> Tensor:
        return self.distribution.pack([direction], [*map(self._part, group)], group[0].weights.device)[0]

    def _part(self, piece: Piece) -> Blocks:
        first = piece.start // self.distribution.entries_per_block
        return Blocks(piece.name, first, first + self._blocks(len(piece.weights)))

    def _blocks(self, numel: int) -> int:
        return -(-numel // self.distribution.entries_per_block)


def by_device(parameters: Parameters) -> dict[torch.device, Parameters]:
    """The parameters on each device."""
    devices = dict.fromkeys(p.device for p in parameters.values())
    return {device: {name: p for name, p in parameters.items() if p.device == device} for device in devices}


def _groups(parameters: Parameters, saved: Parameters) -> Iterator[list[Piece]]:
    """All entries of all parameters, in groups of about CHUNK entries of one dtype and device."""
    group: list[Piece] = []
    filled = 0
    for name, parameter in parameters.items():
        weights, start_weights = parameter.view(-1), saved[name].view(-1)
        for start, stop in spans(parameter.numel(), CHUNK):
            alike = group and (group[0].weights.dtype, group[0].weights.device) == (weights.dtype, weights.device)
            if group and (not alike or filled + stop - start > CHUNK):
                yield group
                group, filled = [], 0
            group.append(Piece(weights[start:stop], start_weights[start:stop], name, start))
            filled += stop - start
    if group:
        yield group


def scalar(loss: Tensor) -> Tensor:
    if loss.numel() != 1:
        raise ValueError(f"The objective must return a scalar, got a tensor of shape {tuple(loss.shape)}.")
    return loss.detach().reshape(())


@contextmanager
def probing_mode(model: torch.nn.Module, *, dropout: bool) -> Iterator[None]:
    """Inference inside the block: no graph is kept and dropout is off, or on when asked for; put back afterwards.

    Batch normalisation uses its running statistics either way, as it would change them with every probe. Only while
    the model is not running does `model.training` say True: by it trainers tell what they measure in training.
    """
    training = {module: module.training for module in model.modules()}
    model.train(dropout)
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()
    running = model.training
    hooks = (
        model.register_forward_pre_hook(lambda *_: setattr(model, "training", running), prepend=True),
        model.register_forward_hook(lambda *_: setattr(model, "training", True), always_call=True),
    )
    model.training = True
    try:
        with torch.inference_mode():
            yield
    finally:
        for hook in hooks:
            hook.remove()
        for module, was in training.items():
            module.training = was


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """The CPU's global generator and those of all devices of this kind start from `seed` inside the block.

    After it they are as before. On the CPU, those of GPUs are not touched.
    """
    if device.type == "cpu":
        devices, start = range(0), torch.default_generator.manual_seed
    else:
        devices, start = range(torch.get_device_module(device).device_count()), torch.manual_seed
    with torch.random.fork_rng(devices, device_type=device.type):
        start(seed)
        yield


def share_moved(parameters: Parameters, smoothing_radius: float, dtype: torch.dtype | None = None) -> float:
    """Share of the weights that θ + ε changes in the dtype they are computed in (their own when None), in [0, 1]."""
    moved = 0
    for parameter in parameters.values():
        for start, stop in spans(parameter.numel(), CHUNK):
            weights = parameter.detach().view(-1)[start:stop]
            displaced = (weights + smoothing_radius).to(dtype or weights.dtype)
            moved += int((displaced != weights.to(displaced.dtype)).sum())
    return moved / sum(parameter.numel() for parameter in parameters.values())
