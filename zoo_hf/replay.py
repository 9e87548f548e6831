"""Weights from a trajectory: the updates of a run made again, without data and without a forward pass."""

import hashlib
import logging
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from secrets import token_hex
from typing import Any

import torch
from torch import Tensor, nn

from .estimators import Estimate
from .low_rank import Kind, LowRank
from .noise import CHUNK, parameter_id, spans
from .record import NOT_OF_CONTENT, Header, Step, TrajectoryError, differences_of_optimizers
from .trajectory import Trajectory
from .update import Update


logger = logging.getLogger(__name__)

PLAIN = (bool, int, float, str, type(None))


def replay(
    model: nn.Module,
    trajectory: str | os.PathLike | Trajectory,
    upto: int | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> nn.Module:
    """The model with the trained weights, in place: every step's ĝ = 1/m Σᵢ cᵢ zᵢ is made again and applied.

    Bit for bit those of the run, on the same kind of device with the same versions and number of threads.

    Args:
        model: as it was when the run started, adapters included.
        trajectory: a file's path, or an open one.
        upto: number of steps after which to stop; all by default.
        optimizer: of the model's parameters, in place of one made from the header; needed for other than torch's own,
            for learning rates that are tensors, and where the optimizer had a state when the trajectory began.

    Raises:
        TrajectoryError: the file is corrupt, belongs to another model, or needs an `optimizer`.
    """
    found = trajectory if isinstance(trajectory, Trajectory) else Trajectory.open(trajectory)
    header, stop = found.header, found.stop if upto is None else upto
    if not header.first_step <= stop <= found.stop:
        raise TrajectoryError(
            f"{found.path}: `upto` must be between {header.first_step} and {found.stop}, the steps it has; got {upto}."
        )
    check_model(model, header, str(found.path))
    with trained(model, header) as parameters:
        made = optimizer or optimizer_of(header, parameters, str(found.path))
        update = Update(made, {parameter: name for name, parameter in parameters.items()})
        check_optimizer_of(update, header, str(found.path))
        try:
            for step in found:
                if step.step == stop:
                    break
                repeat_(update, header, step)
        except NOT_OF_CONTENT:
            raise
        except Exception as error:  # what an optimizer does with the options of a header that was forged
            raise TrajectoryError(f"{found.path}: the optimizer cannot make these steps: {error}.") from error
    return model


@contextmanager
def trained(model: nn.Module, header: Header) -> Iterator[dict[str, nn.Parameter]]:
    """All parameters by name; inside the block those of the run, and no others, are to be trained."""
    parameters = dict(model.named_parameters())
    flags = {name: parameter.requires_grad for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in header.parameters)
        yield parameters
    finally:
        for name, parameter in parameters.items():
            parameter.requires_grad_(flags[name])


def check_optimizer_of(update: Update, header: Header, path: str) -> None:
    """Raises: TrajectoryError when the optimizer is not of the run's kind, or groups its parameters otherwise."""
    groups, kept = groups_of(update), type(update.optimizer)
    now = replace(header, optimizer=f"{kept.__module__}.{kept.__qualname__}", groups=groups)
    differences = differences_of_optimizers(now, header)
    if has_state(update.optimizer) and not header.continued:
        differences.append(f"{kept.__name__} has a state, and had none when the run began")
    if differences:
        raise TrajectoryError(f"{path}: {'; '.join(differences)}: pass an `optimizer` like that of the run.")


def repeat_(update: Update, header: Header, step: Step) -> None:
    """Make a recorded step's update."""
    update.hold(estimate_of(update, header, step))
    if header.settings["max_grad_norm"] > 0:
        update.clip_(header.settings["max_grad_norm"])
    update.step()


def estimate_of(update: Update, header: Header, step: Step) -> Estimate:
    """What a recorded step estimated; the update gets the step's learning rates."""
    for group, rate in zip(update.param_groups, step.rates, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        elif not math.isnan(rate):
            group["lr"] = rate
    return Estimate(header.directions(step.step), step.coefficients, step.loss, header.kind)


def header_of(
    model: nn.Module,
    update: Update,
    settings: dict[str, Any],
    kind: Kind,
    *,
    first_step: int,
    versions: dict[str, str],
    launch: str,
    origin: dict[str, Any],
) -> Header:
    """The header of a run that begins with the model's present weights."""
    kept = type(update.optimizer)
    return Header(
        settings,
        f"{kept.__module__}.{kept.__qualname__}",
        groups_of(update),
        {name: described(name, parameter) for name, parameter in update.parameters.items()},
        sorted(kind.matrices & update.parameters.keys()) if isinstance(kind, LowRank) else [],
        token_hex(16),
        weights_hash(model),
        first_step,
        has_state(update.optimizer),
        versions,
        launch,
        origin,
    )


def has_state(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it has made a step that later ones depend on."""
    return any(float(own["step"]) > 0 if "step" in own else bool(own) for own in optimizer.state.values())


def groups_of(update: Update) -> list[dict[str, Any]]:
    """Names of the parameters of every group, as "params", and the group's options but the learning rate."""
    names = {parameter: name for name, parameter in update.parameters.items()}
    return [
        {"params": [names[p] for p in group["params"] if p in names]} | options
        for group, options in zip(update.param_groups, options_of(update), strict=True)
    ]


def options_of(update: Update) -> list[dict[str, Any]]:
    """Options of every parameter group but the learning rate."""
    left_out = ("params", "initial_lr")
    return [
        # a rate that is a tensor is added otherwise than one that is a float
        {
            name: plain(value)
            for name, value in group.items()
            if name not in left_out and (name != "lr" or isinstance(value, Tensor))
        }
        for group in update.param_groups
    ]


def plain(value: Any) -> Any:
    """A value of an optimizer's options as JSON gives it back; text stands for what JSON has no word for."""
    if isinstance(value, (tuple, list)):
        return [plain(each) for each in value]
    if isinstance(value, Tensor):
        return f"{value.dtype}"
    return value if isinstance(value, PLAIN) else repr(value)


def rates_of(update: Update) -> tuple[float, ...]:
    """Learning rate of every parameter group; NaN where the optimizer chooses its own."""
    return tuple(math.nan if group["lr"] is None else float(group["lr"]) for group in update.param_groups)


def described(name: str, parameter: Tensor) -> dict[str, Any]:
    """What a header says of a parameter."""
    return {
        "shape": list(parameter.shape),
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "id": parameter_id(name),
    }


def weights_hash(model: nn.Module) -> str:
    """SHA-256 of names, shapes, dtypes and bytes of all parameters, trained or not, in their order; hexadecimal."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {described(name, parameter)}\n".encode())
        flat = parameter.detach().contiguous().view(-1)
        for first, last in spans(flat.numel(), CHUNK):
            digest.update(flat[first:last].view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()


def check_model(model: nn.Module, header: Header, path: str) -> None:
    """Raises: TrajectoryError when the model is not as it was at the start of the run; it says in what."""
    parameters = dict(model.named_parameters())
    for name, then in header.parameters.items():
        if name not in parameters:
            raise TrajectoryError(
                f"{path}: the model has no parameter {name!r}, which the run trained: build it as it was then, "
                "adapters included."
            )
        now = described(name, parameters[name])
        if now != then:
            raise TrajectoryError(f"{path}: parameter {name!r} was {then} when the run started, and is {now}.")
    if weights_hash(model) != header.start:
        raise TrajectoryError(
            f"{path}: the model's weights are not those that the run started from: load the same revision "
            "(`zoo_hf.from_base` records it), or initialise it with the same seed and versions."
        )


def optimizer_of(header: Header, parameters: Mapping[str, Tensor], path: str) -> torch.optim.Optimizer:
    """The run's optimizer, new.

    Raises:
        TrajectoryError: it is none of torch's, or had a state when the trajectory began.
    """
    name = header.optimizer.rpartition(".")[2]
    kind = vars(torch.optim).get(name)
    if not isinstance(kind, type) or f"{kind.__module__}.{kind.__qualname__}" != header.optimizer:
        raise TrajectoryError(
            f"{path}: the run used {header.optimizer}: pass `optimizer` to `zoo_hf.replay`, one of that kind."
        )
    groups = [group | {"params": [parameters[name] for name in group["params"]]} for group in header.groups]
    try:
        made = kind(groups)
    except Exception as error:  # anything, of options that were forged
        raise TrajectoryError(f"{path}: {name} cannot be made from the header ({error}): pass `optimizer`.") from error
    if header.continued:
        raise TrajectoryError(
            f"{path}: it begins at step {header.first_step}, when {name} had a state: pass `optimizer` with it."
        )
    return made
