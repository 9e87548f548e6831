"""Many members in one forward pass: `torch.func.vmap` over the weights adds the member axis, never a model.

Parameters with full directions are stacked, one displaced copy a member. A matrix with low-rank directions stays one
for all members: it enters the model as a `DisplacedMatrix`, which linear and embedding layers multiply without ever
making the members' matrices. So does, where Triton's kernels run, a matrix whose full directions are of signs, as a
`NamedMatrix`.

Letters: P members, d weights.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from .autocast import LikeAutocast
from .displaced import RENORMED, DisplacedMatrix
from .kernels.displace import one_pass
from .kernels.linear import form_of
from .low_rank import Kind, LowRank, entries_of, is_low_rank, matrix_names
from .named import NamedMatrix
from .noise import DISTRIBUTIONS, Blocks, Direction, unpacked
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
    losses, forms = [], forms_of_names(model, parameters, members, smoothing_radius, distribution)
    with torch.no_grad():
        for first in range(0, len(members), members_per_forward):
            some = members[first : first + members_per_forward]
            weights = member_weights(parameters, some, smoothing_radius, distribution, forms)
            losses.append(evaluate(objective, model, weights).cpu().double())
            del weights  # before the next are made
    return torch.cat(losses) if losses else torch.empty(0, dtype=torch.float64)


class MemberWeights(NamedTuple):
    """The weights of a population's members.

    Args:
        own: name → tensors of which every member has a row, (P, …) each: its weights, or what names its displacement.
        stand_ins: name → what makes the weight that enters the model of a member's rows.
    """

    own: dict[str, tuple[Tensor, ...]]
    stand_ins: dict[str, Callable[..., Tensor]]


def evaluate(objective: Objective, model: nn.Module, weights: MemberWeights) -> Tensor:
    """Losses (P,) of members."""
    within = Within(model, objective)

    def loss(own: dict[str, tuple[Tensor, ...]]) -> Tensor:
        return scalar(functional_call(within, {f"model.{n}": weights.stand_ins[n](*o) for n, o in own.items()}, ()))

    check_embeddings(model)
    # torch's attention kernel for a CPU has no rule for vmap: it would run member by member
    with unchanged(model), LikeAutocast(), sdpa_kernel(SDPBackend.MATH):
        return vmap(loss, randomness="same")(weights.own)


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


def forms_of_names(
    model: nn.Module, parameters: Parameters, members: Sequence[Member], smoothing_radius: float, kind: Kind
) -> dict[str, str]:
    """The matrices whose displacements enter the model by name, and the form of products with each of them."""
    alike = len({member.direction[:2] for member in members}) == 1
    usable = {name: p for name, p in parameters.items() if alike and kind == "rademacher" and one_pass(p)}
    matrices = matrix_names(model) if usable else frozenset()
    return {name: form_of(p, smoothing_radius) for name, p in usable.items() if name in matrices}


def member_weights(
    parameters: Parameters,
    members: Sequence[Member],
    smoothing_radius: float,
    kind: Kind,
    forms: Mapping[str, str] | None = None,
) -> MemberWeights:
    """Every parameter's displaced copies, or factors or names of their displacements.

    Args:
        forms: of the matrices that enter by name, see `forms_of_names`.
    """
    directions = list(dict.fromkeys(member.direction for member in members))
    rows = [directions.index(member.direction) for member in members]
    scales = [member.sign * smoothing_radius for member in members]
    own: dict[str, tuple[Tensor, ...]] = {}
    made: dict[str, Callable[..., Tensor]] = {}
    for device, here in by_device(parameters).items():
        at = torch.tensor(rows, device=device), torch.tensor(scales, dtype=torch.float32, device=device)
        matrices = {name: p for name, p in here.items() if is_low_rank(kind, name)}
        named = {name: p for name, p in here.items() if name in (forms or {})}
        others = {name: p for name, p in here.items() if name not in matrices and name not in named}
        own |= {name: (weight,) for name, weight in stacked(others, directions, *at, entries_of(kind)).items()}
        made |= dict.fromkeys(others, itself)
        if isinstance(kind, LowRank):
            own |= factors(matrices, directions, *at, kind)
            made |= {name: partial(DisplacedMatrix, p) for name, p in matrices.items()}
        if forms:
            index = torch.tensor([member.direction.index for member in members], device=device)
            seed, step, _ = directions[0]
            own |= dict.fromkeys(named, (index, at[1]))
            for name, p in named.items():
                made[name] = partial(NamedMatrix, p, seed=seed, step=step, name=name, form=forms[name])
    return MemberWeights(own, made)


def itself(weight: Tensor) -> Tensor:
    return weight


def stacked(
    parameters: Parameters, directions: Sequence[Direction], rows: Tensor, scales: Tensor, distribution: str
) -> dict[str, Tensor]:
    """θ + s ε z of every member, (P, …), summed in float32 at least and rounded once, as serial members are.

    Args:
        rows: (P), each member's direction among `directions`.
        scales: (P), each member's s ε.
    """
    at_once = {name: p for name, p in parameters.items() if one_pass(p) and len({d[:2] for d in directions}) == 1}
    indices = torch.tensor([d.index for d in directions], device=rows.device)[rows] if at_once else rows
    found = {}
    for name, parameter in at_once.items():
        names = *directions[0][:2], name, distribution
        members = torch.ops.zoo_hf.displaced_members(parameter.detach().view(-1), indices, scales, *names)
        found[name] = members.view(len(rows), *parameter.shape)
    kind, others = DISTRIBUTIONS[distribution], {name: p for name, p in parameters.items() if name not in at_once}
    wanted = [(Blocks(n, 0, -(-p.numel() // kind.entries_per_block)), p.numel()) for n, p in others.items()]
    noise = unpacked(kind, directions, wanted, rows.device) if wanted else []
    for (name, parameter), z in zip(others.items(), noise, strict=True):
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
