"""Which form of a scan runs: one of those beside the plain scan, or a faster one that a package has added.

This file goes along with the weights of a model and needs no package: without zoo_hf nothing is added. Where it is
installed, `zoo_hf.models` adds its forms, and chooses by what can run on a device and by what the user asked for.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor


Form = Callable[..., tuple[Tensor, Tensor]]  # with the plain scan's arguments
ON_CHIP, UNITS_ON_CHIP = 1 << 17, 128  # most bytes of R of a head, and its units, that Triton's kernel keeps there


def first(names: Sequence[str], device: torch.device) -> str:
    return names[0]


class Kernel(NamedTuple):
    """A faster way to do something, and whether it suits arguments: what they are, where they are, and gradients."""

    suits: Callable[..., bool]
    run: Callable[..., Any]


@dataclass
class Added:
    """What a package has added.

    Args:
        forms: cell → name → form.
        choose: one of several names, the best one first, for a device.
        kernels: what they are for ("head_loss", "rwkv7", "mamba2") → kernel.
    """

    forms: dict[str, dict[str, Form]] = field(default_factory=dict)
    choose: Callable[[Sequence[str], torch.device], str] = first
    kernels: dict[str, Kernel] = field(default_factory=dict)


ADDED = Added()


def kernel(name: str, *arguments: Any) -> Callable[..., Any] | None:
    """The kernel of this name, if there is one and it suits arguments like these."""
    added = ADDED.kernels.get(name)
    return added.run if added is not None and added.suits(*arguments) else None


def chosen(cell: str, own: Mapping[str, Form], names: Sequence[str], device: torch.device) -> Form:
    """The form that runs.

    Args:
        own: those beside the cell's plain scan, by name.
        names: of all that suit, see `preferred`; those that are not there are passed over.
    """
    forms = {**ADDED.forms.get(cell, {}), **own}
    return forms[ADDED.choose([name for name in names if name in forms], device)]


def preferred(own: Sequence[str], inputs: Tensor, recurrent_weight: Tensor) -> list[str]:
    """Names of the forms that suit a layer's inputs (B, T, input_size) and R (G, N, D, D), the best first.

    "plain" and "torch" are a cell's own, "triton" and "flashrnn" are added. Those after "plain" run only where the
    user asks for them.

    Args:
        own: the names of a cell's own forms, the better first.
    """
    members = torch._C._are_functorch_transforms_active()
    if members:
        own = [name for name in own if name != "torch"]  # its kernels have no rule for torch.func.vmap
    if torch.is_grad_enabled() or inputs.dtype == torch.float64:
        return [*own]  # the others have no derivative, and sum in float32
    gates, _, units, _ = recurrent_weight.shape
    if own[0] == "torch" and (units > UNITS_ON_CHIP or gates * units**2 * recurrent_weight.dtype.itemsize > ON_CHIP):
        names = ["torch", "triton", *own[1:]]  # cuDNN has several multiprocessors work on one large head
    else:
        names = ["triton", *own]
    return names if members else [*names, "flashrnn"]
