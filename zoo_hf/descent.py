"""Steps of SGD without a gradient: in one pass over a parameter on a GPU, and to bfloat16 weights rounded on average.

Everywhere else, an optimizer is given ĝ and makes its own step, see `update`.
"""

import torch
from torch import Tensor

from .estimators import Estimate
from .gradients import Used, names_on, used_by, wide_gradients
from .kernels.displace import one_pass
from .kernels.rule import Rule, sgd_plainly_
from .low_rank import entries_of, is_low_rank
from .perturbation import Parameters


def in_one_pass(optimizer: torch.optim.Optimizer, parameter: Tensor) -> bool:
    """Whether a step of this optimizer on this parameter is made here."""
    return type(optimizer) is torch.optim.SGD and (parameter.dtype is torch.bfloat16 or one_pass(parameter))


@torch.no_grad()
def descend_(optimizer: torch.optim.Optimizer, parameters: Parameters, estimate: Estimate, share: float) -> None:
    """Make the step of SGD on some of its parameters, by name; `share` is what clipping leaves of ĝ."""
    names, used = {p: name for name, p in parameters.items()}, used_by(estimate)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter in names:
                buffer, first = buffer_of(optimizer, group, parameter)
                rule = Rule(
                    lr=float(group["lr"]),
                    momentum=group["momentum"],
                    dampening=group["dampening"],
                    weight_decay=group["weight_decay"],
                    share=-share if group["maximize"] else share,
                    nesterov=group["nesterov"],
                    first=first,
                )
                apply_(parameter.view(-1), buffer, names[parameter], used, rule, parameter.shape)


def buffer_of(optimizer: torch.optim.Optimizer, group: dict, parameter: Tensor) -> tuple[Tensor | None, bool]:
    """The parameter's momentum, flat, where torch keeps it, and whether it is yet to be filled."""
    if not group["momentum"]:
        return None, False
    state = optimizer.state[parameter]
    first = state.get("momentum_buffer") is None
    if first:
        state["momentum_buffer"] = torch.empty_like(parameter)
    return state["momentum_buffer"].view(-1), first


def apply_(weights: Tensor, buffer: Tensor | None, name: str, used: Used, rule: Rule, shape: torch.Size) -> None:
    if not is_low_rank(used.kind, name):
        arguments = *names_on(used, weights.device), name, entries_of(used.kind), [float(value) for value in rule]
        torch.ops.zoo_hf.sgd_(weights, buffer, *arguments)
        return
    gradient = wide_gradients(used, {name: weights.view(shape)})[name]  # of a product
    seed, step, _ = used.directions[0]
    sgd_plainly_(weights, buffer, gradient, rule, name=name, seed=seed, step=step)
