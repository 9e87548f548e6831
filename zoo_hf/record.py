"""What a trajectory says of a run: a header for all steps, and for each step its coefficients and learning rates.

Letters: n directions, g parameter groups of the optimizer.
"""

import json
import math
import struct
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .low_rank import ENTRIES, Kind, LowRank
from .noise import DISTRIBUTIONS, Direction, parameter_id


FORMAT = 2  # since SGD rounds bfloat16 weights stochastically
STEP = struct.Struct("<IddQI")  # step, ε, loss, key of the batch, members a forward pass
MOST_BYTES = 1 << 26  # of a header, and of a step


class TrajectoryError(ValueError):
    """A trajectory that cannot be read, continued or replayed; the message names file, record and reason."""


# errors that are not of what a trajectory says, and stay what they are
NOT_OF_CONTENT = (TrajectoryError, OSError, MemoryError, torch.OutOfMemoryError)


class Step(NamedTuple):
    """What a step adds to its run.

    Args:
        rates: learning rate of every parameter group, (g).
        coefficients: (n,) float32, NaN for a pair left out.
        key: of the shape of the last micro-batch, see `probes.Probes.key`.
        members: evaluated together in a forward pass, as was chosen for batches of that key; 0 for no choice.
    """

    step: int
    rates: tuple[float, ...]
    smoothing_radius: float
    loss: float
    coefficients: Tensor
    key: int = 0
    members: int = 0


@dataclass(frozen=True)
class Header:
    """What all steps of a run share.

    Args:
        settings: seed, num_directions, distribution, direction_rank, max_grad_norm, and how probes were run.
        optimizer: its class, as module and name.
        groups: names of the parameters of every group, as "params", and the group's options.
        parameters: name → shape, dtype and id of every trained parameter.
        matrices: names of the parameters with low-rank directions, if any have.
        run: 32 random hexadecimal digits, which its checkpoints have as well.
        start: SHA-256 of all weights before the first step, see `replay.weights_hash`.
        first_step: number of the first step; later steps follow without a gap.
        continued: whether the optimizer had a state before the first step.
        versions: of the packages that the run used; not compared.
        launch: by which launcher it was begun, see `recovery.launch_name`; not compared.
        origin: from what the starting weights are made again, see `origin.Origin`; empty where nobody knows.
    """

    settings: dict[str, Any]
    optimizer: str
    groups: list[dict[str, Any]]
    parameters: dict[str, dict[str, Any]]
    matrices: list[str]
    run: str
    start: str
    first_step: int
    continued: bool
    versions: dict[str, str]
    launch: str = ""
    origin: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT

    def pack_header(self) -> bytes:
        """The header itself as JSON."""
        return json.dumps(asdict(self)).encode()

    @property
    def started_from(self) -> str:
        """From what, in words."""
        origin = self.origin
        if not origin:
            return "what is not recorded"
        if not origin.get("base"):
            return f"new weights of seed {origin.get('seed')}"
        adapter = origin.get("adapter")
        parts = [f"{origin['base']} at {origin.get('revision')}"]
        if adapter is not None:
            parts.append("LoRA (" + ", ".join(f"{name} {value}" for name, value in adapter.items()) + ")")
        if origin.get("drawn"):
            parts.append(f"{len(origin['drawn']):,} tensors of noise")
        return ", with ".join(parts[:2]) + "".join(f", {part}" for part in parts[2:])

    @property
    def kind(self) -> Kind:
        """The distribution of the directions."""
        name = self.settings["distribution"]
        if name in DISTRIBUTIONS:
            return name
        return LowRank(frozenset(self.matrices), self.settings["direction_rank"], ENTRIES[name])

    @property
    def step_bytes(self) -> int:
        """Length of a step's body."""
        return STEP.size + 8 * len(self.groups) + 4 * self.settings["num_directions"]

    def directions(self, step: int) -> list[Direction]:
        """The directions of a step."""
        return [Direction(self.settings["seed"], step, i) for i in range(self.settings["num_directions"])]

    def differences(self, other: "Header") -> list[str]:
        """What has to be equal for one run to go on with another's steps and is not, each in words, this one first."""
        found = [
            f"`{name}` is {self.settings.get(name)!r} and was {other.settings.get(name)!r}"
            for name in sorted(self.settings | other.settings)
            if self.settings.get(name) != other.settings.get(name)
        ]
        found += differences_of_optimizers(self, other)
        if (self.parameters, self.matrices) != (other.parameters, other.matrices):
            found.append("the trained parameters are others")
        return found

    def pack(self, step: Step) -> bytes:
        """A step as the body of its frame."""
        rates = struct.pack(f"<{len(step.rates)}d", *step.rates)
        coefficients = step.coefficients.numpy().astype("<f4").tobytes()
        return STEP.pack(step.step, step.smoothing_radius, step.loss, step.key, step.members) + rates + coefficients

    def unpack(self, body: bytes) -> Step:
        """A step from the body of its frame.

        Raises:
            ValueError: says what makes no sense.
        """
        if len(body) != self.step_bytes:
            raise ValueError(f"it has {len(body)} bytes in place of {self.step_bytes}")
        step, radius, loss, key, members = STEP.unpack_from(body)
        rates = struct.unpack_from(f"<{len(self.groups)}d", body, STEP.size)
        coefficients = np.frombuffer(body, "<f4", offset=STEP.size + 8 * len(rates)).astype(np.float32)
        if not (0 < radius < math.inf and math.isfinite(loss)):
            raise ValueError(f"its smoothing radius is {radius}, and its loss {loss}")
        if np.isinf([*rates, *coefficients]).any() or 2 * np.isnan(coefficients).sum() > len(coefficients):
            raise ValueError("a learning rate or a coefficient is infinite, or most are not a number")
        return Step(step, rates, radius, loss, torch.from_numpy(coefficients), key, members)


def parse_header(body: bytes, path: Path) -> Header:
    """The header from its JSON.

    Raises:
        TrajectoryError: it is of another format, or makes no sense.
    """
    try:
        loaded = json.loads(body)
        if loaded["format"] != FORMAT:
            raise TrajectoryError(f"{path}: its format is {loaded['format']!r}; this zoo_hf reads format {FORMAT}.")
        if set(loaded) != {each.name for each in fields(Header)}:
            raise ValueError("a field is missing, or one is unknown")
        header = Header(**loaded)
        check_header(header)
    except TrajectoryError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise TrajectoryError(f"{path}: its header makes no sense: {type(error).__name__}: {error}.") from error
    return header


def check_header(header: Header) -> None:
    """Raises: ValueError, TypeError, KeyError or AttributeError when a field is not what it should be."""
    settings, names = header.settings, [name for group in header.groups for name in group["params"]]
    for each in fields(Header):
        if type(vars(header)[each.name]) is not KINDS[each.name]:
            raise TypeError(f"`{each.name}` is {type(vars(header)[each.name]).__name__}")
    for name, least, most in (
        ("seed", 0, 2**32),
        ("num_directions", 1, MOST_BYTES // 8),
        ("direction_rank", 1, 2**20),
    ):
        if type(settings[name]) is not int or not least <= settings[name] < most:
            raise ValueError(f"`{name}` is {settings[name]!r}")
    if settings["distribution"] not in {*DISTRIBUTIONS, *ENTRIES}:
        raise ValueError(f"`distribution` is {settings['distribution']!r}")
    if not 0 <= header.first_step < 2**32:
        raise ValueError(f"`first_step` is {header.first_step!r}")
    if type(settings["max_grad_norm"]) not in (int, float) or not settings["max_grad_norm"] >= 0:
        raise ValueError(f"`max_grad_norm` is {settings['max_grad_norm']!r}")
    if not all(type(text) is str for text in (*header.versions.values(), *header.matrices, *names)):
        raise ValueError("a name is none")
    sides = [side for name in header.matrices for side in header.parameters[name]["shape"]]
    if settings["direction_rank"] > max(sides, default=2**20):
        raise ValueError(
            f"`direction_rank` is {settings['direction_rank']}, and no matrix is larger than {max(sides)}"
        )
    if sorted(names) != sorted(header.parameters) or not set(header.matrices) <= set(names):
        raise ValueError("the groups hold other parameters than are listed")
    for name, described in header.parameters.items():
        shape, least = described["shape"], 2 if name in header.matrices else 0  # dimensions
        whole = all(type(size) is int and 0 <= size < 2**48 for size in shape) and len(shape) >= least
        if described["id"] != parameter_id(name) or type(described["dtype"]) is not str or not whole:
            raise ValueError(f"parameter {name!r} is {described}")


KINDS = {
    "settings": dict,
    "optimizer": str,
    "groups": list,
    "parameters": dict,
    "matrices": list,
    "run": str,
    "start": str,
    "first_step": int,
    "continued": bool,
    "versions": dict,
    "launch": str,
    "origin": dict,
    "format": int,
}


def differences_of_optimizers(now: Header, then: Header) -> list[str]:
    """In what one run's optimizer differs from another's, as both were before their first step."""
    if now.optimizer != then.optimizer:
        return [f"the optimizer is {now.optimizer} and was {then.optimizer}"]
    if [group["params"] for group in now.groups] != [group["params"] for group in then.groups]:
        return ["the parameters are grouped otherwise"]
    if not now.optimizer.startswith("torch.optim.") and now.first_step != then.first_step:
        return []  # they may have counters among them
    return [
        f"`{name}` of parameter group {place} is {mine.get(name)!r} and was {other.get(name)!r}"
        for place, (mine, other) in enumerate(zip(options(now), options(then), strict=True))
        for name in sorted(mine | other)
        if mine.get(name) != other.get(name)
    ]


def options(header: Header) -> list[dict[str, Any]]:
    """Options of every parameter group."""
    return [{name: value for name, value in group.items() if name != "params"} for group in header.groups]
