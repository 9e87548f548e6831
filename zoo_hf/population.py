"""Many members in one forward pass: `torch.func.vmap` over the weights adds the member axis, never a model.

Parameters with full directions are stacked, one displaced copy a member. A matrix with low-rank directions stays one
for all members: it enters the model as a `DisplacedMatrix`, which linear and embedding layers multiply without ever
making the members' matrices.

Letters: P members, d weights.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from .autocast import LikeAutocast
from .displaced import RENORMED, DisplacedMatrix
from .low_rank import Kind, LowRank, full, is_low_rank
from .noise import Blocks, Direction, Distribution, unpacked
from .perturbation import Member, Objective, Parameters, by_device, scalar


def probe_population(
    objective: Objective,
    parameters: Parameters,
    members: Sequence[Member],
    smoothing_radius: float,
    *,
    model: nn.Module,
    members_per_forward: int,
    distribution: Kind = "rademacher",
) -> Tensor:
    """Losses of the members, (P,) float64 on the CPU, in their order, as `probe`; θ is never written.

    Args:
        objective: evaluates `model` at its present weights; returns a scalar.
        parameters: name in `model` → weight, those that are displaced.
        smoothing_radius: ε > 0, in units of the weights.
        members_per_forward: the memory of so many stacked copies of the parameters with full directions, and of so
            many times a forward pass' activations, is taken.

    Raises:
        Exception: what the objective raises, among others where an operation has no rule for `torch.func.vmap`.
    """
    losses = []
    with torch.no_grad():
        for first in range(0, len(members), members_per_forward):
            some = members[first : first + members_per_forward]
            weights = member_weights(parameters, some, smoothing_radius, distribution)
            losses.append(evaluate(objective, model, parameters, weights).cpu().double())
            del weights  # before the next are made
    return torch.cat(losses) if losses else torch.empty(0, dtype=torch.float64)


def evaluate(objective: Objective, model: nn.Module, parameters: Parameters, weights: dict[str, Any]) -> Tensor:
    """Losses (P,) of members whose weights, or factors of their displacements, are stacked."""
    within = Within(model, objective)

    def loss(own: dict[str, Any]) -> Tensor:
        named = {
            f"model.{name}": DisplacedMatrix(parameters[name], *weight) if isinstance(weight, tuple) else weight
            for name, weight in own.items()
        }
        return scalar(functional_call(within, named, ()))

    check_embeddings(model)
    # torch's attention kernel for a CPU has no rule for vmap: it would run member by member
    with unchanged(model), LikeAutocast(), sdpa_kernel(SDPBackend.MATH):
        return vmap(loss, randomness="same")(weights)


def check_embeddings(model: nn.Module) -> None:
    """Raises: ValueError where an embedding shortens its rows when it looks them up, which writes θ itself."""
    for name, module in model.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None:
            raise ValueError(RENORMED.format(f"{name}: max_norm={module.max_norm}"))


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Put back tensors that a forward pass sets in the model's modules: they would be all members', and dead.

    Raises:
        RuntimeError: after the block, when it did set some, or wrote into one: such a model is no function of its
            weights and its inputs.
    """
    before = [(path, place, dict(place)) for path, module in model.named_modules() for place in places(module)]
    named = [(path, name, value) for path, _, own in before for name, value in own.items() if type(value) in OFTEN]
    versions = [(path, name, value, version(value)) for path, name, value in named]
    changed = set()
    try:
        yield
    finally:
        for path, place, own in before:
            changed |= {f"{path}.{name}" for name in put_back_(place, own)}
        changed |= {f"{path}.{name}" for path, name, value, number in versions if version(value) != number}
    if changed:
        names = ", ".join(sorted(name.lstrip(".") for name in changed))
        raise RuntimeError(f"a forward pass sets {names} in the model")


OFTEN = (Tensor, nn.Parameter)  # `isinstance` would take ten times as long, for each attribute of each module


def places(module: nn.Module) -> tuple[dict[str, Any], ...]:
    """Where a module keeps tensors."""
    return vars(module), module._buffers, module._parameters


def put_back_(place: dict[str, Any], own: dict[str, Any]) -> list[str]:
    """Put back what is now another tensor; its names."""
    changed = [n for n, value in place.items() if own.get(n) is not value and isinstance(value, Tensor)]
    place.update({name: own.get(name) for name in changed})
    return changed


def version(tensor: Tensor) -> int:
    """How often it was written in place; those made in inference mode do not count it."""
    return 0 if tensor.is_inference() else tensor._version


class Within(nn.Module):
    """The objective as a module that contains the model, so that `functional_call` can replace the model's weights."""

    def __init__(self, model: nn.Module, objective: Objective):
        super().__init__()
        self.model = model
        self.objective = lambda: objective()  # not as a second name of the model, should it be one

    def forward(self) -> Tensor:
        return self.objective()


def member_weights(
    parameters: Parameters, members: Sequence[Member], smoothing_radius: float, kind: Kind
) -> dict[str, Any]:
    """For every parameter its members' weights, (P, …), or their displacements' factors, (P, R, r) and (P, C, r)."""
    directions = list(dict.fromkeys(member.direction for member in members))
    rows = [directions.index(member.direction) for member in members]
    scales = [member.sign * smoothing_radius for member in members]
    weights: dict[str, Any] = {}
    for device, here in by_device(parameters).items():
        own = torch.tensor(rows, device=device), torch.tensor(scales, dtype=torch.float32, device=device)
        matrices = {name: p for name, p in here.items() if is_low_rank(kind, name)}
        weights |= stacked({name: p for name, p in here.items() if name not in matrices}, directions, *own, full(kind))
        if matrices:
            assert isinstance(kind, LowRank)
            weights |= factors(matrices, directions, *own, kind)
    return weights


def stacked(
    parameters: Parameters, directions: Sequence[Direction], rows: Tensor, scales: Tensor, distribution: Distribution
) -> dict[str, Tensor]:
    """θ + s ε z of every member, (P, …), summed in float32 at least and rounded once, as serial members are.

    Args:
        rows: (P), each member's direction among `directions`.
        scales: (P), each member's s ε.
    """
    size = distribution.entries_per_block
    wanted = [(Blocks(name, 0, -(-p.numel() // size)), p.numel()) for name, p in parameters.items()]
    found = {}
    noise = unpacked(distribution, directions, wanted, rows.device) if wanted else []
    for (name, parameter), z in zip(parameters.items(), noise, strict=True):
        wide = torch.promote_types(parameter.dtype, torch.float32)
        own = z[rows].to(wide).mul_(scales[:, None]).add_(parameter.detach().view(-1))
        found[name] = own.to(parameter.dtype).view(len(rows), *parameter.shape)
    return found


def factors(
    parameters: Parameters, directions: Sequence[Direction], rows: Tensor, scales: Tensor, kind: LowRank
) -> dict[str, tuple[Tensor, Tensor]]:
    """s ε A/√r and B of every member, in their parameter's dtype; arguments as of `stacked`."""
    return {
        name: ((a[rows] * scales[:, None, None]).to(parameters[name].dtype), b[rows].to(parameters[name].dtype))
        for name, (a, b) in kind.factors(directions, parameters).items()
    }
