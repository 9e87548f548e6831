"""Many members in one forward pass: `torch.func.vmap` over the weights adds the member axis, never a model.

Parameters with full directions are stacked, one displaced copy a member. A matrix with low-rank directions stays one
for all members: it enters the model as a `DisplacedMatrix`, which linear and embedding layers multiply without ever
making the members' matrices.

Letters: P members, d weights.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

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


RENORMED = "{} makes an embedding write its weight, which members of a population share: set `max_norm=None`"


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


class LikeAutocast(TorchFunctionMode):
    """Layers that vmap takes apart before autocast sees them get the dtypes that autocast would give them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return REPLACED.get(func, func)(*args, **(kwargs or {}))


def norm(of: Callable[..., Tensor], input: Tensor, *sizes: Any, **weights: Any) -> Tensor:
    """torch's layer or group norm, whose weights may be wider than the input; then all is computed in their dtype."""
    wide = [value.dtype for value in (*sizes, *weights.values()) if isinstance(value, Tensor)]
    if not wide or wide[0] == input.dtype:
        return of(input, *sizes, **weights)
    found = of(input.to(wide[0]), *sizes, **weights)
    return found.to(input.dtype) if input.device.type == "cpu" else found  # autocast leaves it wide on a GPU


def narrow(of: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """A product in autocast's dtype."""
    return of(*cast(args, None), **cast(kwargs, None))


def wide(of: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """A loss in float32 under autocast."""
    return of(*cast(args, torch.float32), **cast(kwargs, torch.float32))


def cast(values: Any, dtype: torch.dtype | None) -> Any:
    """Under autocast the tensors in another dtype, None for autocast's own; a displaced matrix casts its products."""

    def one(value: Any) -> Any:
        if not isinstance(value, Tensor) or isinstance(value, DisplacedMatrix) or not value.is_floating_point():
            return value
        own = autocast_dtype(value)
        return value if own is None else value.to(dtype or own)

    return {name: one(v) for name, v in values.items()} if isinstance(values, dict) else [one(v) for v in values]


def autocast_dtype(of: Tensor) -> torch.dtype | None:
    """What autocast computes products in on a tensor's device; None while it is off, and for doubles."""
    device = of.device.type
    on = torch.is_autocast_enabled(device) and of.dtype is not torch.float64
    return torch.get_autocast_dtype(device) if on else None


PRODUCTS = (
    F.linear,
    F.scaled_dot_product_attention,
    torch.addmm,
    torch.baddbmm,
    torch.conv1d,
    torch.conv2d,
    torch.conv3d,
)
LOSSES = (F.cross_entropy, F.nll_loss, F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.kl_div)
REPLACED: dict[Any, Callable[..., Tensor]] = {
    **{of: partial(norm, of) for of in (F.layer_norm, F.group_norm)},
    **{of: partial(narrow, of) for of in PRODUCTS},
    **{of: partial(wide, of) for of in LOSSES},
}


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


class DisplacedMatrix(torch.Tensor):
    """A weight that stands for W + A Bᵀ: layers that multiply by it never make it, everything else does.

    Args:
        base: W, shared by all members.
        left: A, (R, r), of one member; stacked by vmap.
        right: B, (C, r).
    """

    base: Tensor
    left: Tensor
    right: Tensor

    @staticmethod
    def __new__(cls, base: Tensor, left: Tensor, right: Tensor) -> "DisplacedMatrix":
        matrix = base.detach().as_subclass(cls)
        matrix.base, matrix.left, matrix.right = base.detach(), left, right
        return matrix

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func in MULTIPLY:
                return MULTIPLY[func](*args, **kwargs)
            convert = plain if func in READ else dense
            return func(*torch.utils._pytree.tree_map(convert, args), **torch.utils._pytree.tree_map(convert, kwargs))


def plain(value: Any) -> Any:
    return value.base if isinstance(value, DisplacedMatrix) else value


def dense(value: Any) -> Any:
    """W + A Bᵀ itself, (P, …) under vmap, where something else than a layer asks for the weight."""
    if not isinstance(value, DisplacedMatrix):
        return value
    return value.base + (value.left @ value.right.mT).view(value.base.shape)


def linear(input: Any, weight: Any, bias: Any = None) -> Tensor:
    """torch's; arguments have its names, as they may come by name."""
    input, bias = dense(input), dense(bias)
    if not isinstance(weight, DisplacedMatrix):  # it is multiplied by another weight
        return F.linear(input, weight, bias)
    return multiplied(input, weight.base, bias, weight.left, weight.right)


def addmm(input: Any, mat1: Any, mat2: Any, **scales: Any) -> Tensor:
    """torch's; as gpt2's Conv1D calls it, input is a bias and mat2 a weight, (I, O)."""
    input, mat1 = dense(input), dense(mat1)
    if not isinstance(mat2, DisplacedMatrix) or scales or input.dim() != 1:
        return torch.addmm(input, mat1, dense(mat2), **scales)
    return multiplied(mat1, mat2.base.mT, input, mat2.right, mat2.left)


def multiplied(x: Tensor, weight: Tensor, bias: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """x (W + A Bᵀ)ᵀ + b, (…, O): the product with W is one for all members, and each adds its own outer products.

    Args:
        x: (…, I).
        weight: W, (O, I).
        left: A, (O, r), of one member; stacked by vmap, as are B and x.
        right: B, (I, r).
    """
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])  # (K, I)
    y = shared = F.linear(rows, weight, bias)  # (K, O)
    projected = (right.mT @ rows.mT).mT  # (K, r); x @ right would take four times as long
    for column in range(left.shape[1]):
        y = torch.addcmul(y, projected[:, column, None], left[:, column])
    return y.to(shared.dtype).view(*x.shape[:-1], y.shape[-1])  # wide factors widen it under autocast


def embedding(
    input: Tensor, weight: Any, padding_idx: int | None = None, max_norm: float | None = None, *others: Any, **by: Any
) -> Tensor:
    """torch's: rows of W and of A, the latter times Bᵀ."""
    if max_norm is not None:
        raise ValueError(RENORMED.format(f"max_norm={max_norm}"))
    found = F.embedding(input, weight.base, padding_idx, None, *others, **by)
    return found + F.embedding(input, weight.left) @ weight.right.mT


MULTIPLY: dict[Any, Callable[..., Tensor]] = {F.linear: linear, torch.addmm: addmm, F.embedding: embedding}
PROPERTIES = ("shape", "dtype", "device", "ndim", "requires_grad", "layout", "is_sparse", "is_cuda", "is_quantized")
READ = {  # what asks about a weight and not for it
    *(vars(torch.Tensor).get(name, vars(torch._C.TensorBase).get(name)).__get__ for name in PROPERTIES),
    torch.Tensor.size,
    torch.Tensor.dim,
    torch.Tensor.numel,
    torch.Tensor.is_floating_point,
    torch.Tensor.__len__,
}
