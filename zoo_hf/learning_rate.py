"""Which learning rate a run should have: some steps with each, from the same weights, which are put back exactly."""

import itertools
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .perturbation import kept, seeded


logger = logging.getLogger(__name__)

FACTORS = tuple(2.0**k for k in range(-6, 7))  # of the learning rate in the arguments
OWN = ("optimizer", "lr_scheduler", "update", "probes", "recorder", "losses", "_figures")  # of a run


class Found(NamedTuple):
    """What a search has found.

    Args:
        best: the rate with the least loss.
        rates: those that were tried, ascending.
        losses: the mean loss of the batches after the steps with each; infinite where they failed.
        start: the mean loss before any step.
    """

    best: float
    rates: list[float]
    losses: list[float]
    start: float


def find_learning_rate(trainer: Any, rates: Sequence[float] | None, steps: int) -> Found:
    """See `ZOOTrainerMixin.find_learning_rate`."""
    if trainer.given_optimizers[0] is not None:
        raise ValueError("`find_learning_rate` makes optimizers of its own: choose one by `optim`, and pass none.")
    rates = sorted(rates or [trainer.args.learning_rate * factor for factor in FACTORS])
    if steps < 1 or not rates[0] > 0:
        raise ValueError(f"`steps` must be at least 1 and `rates` positive, got {steps} and {rates}.")
    batches, losses = first_batches(trainer, steps), []
    start = mean_loss(trainer, batches)
    for rate in rates:
        losses.append(loss_after(trainer, batches, rate))
        logger.info(f"learning_rate={rate:g}: {start:.4f} → {losses[-1]:.4f} in {steps} steps")
        if not losses[-1] < start and len(losses) > 1 and not losses[-2] < start:
            break  # larger ones are worse
    rates = rates[: len(losses)]
    best = rates[min(range(len(rates)), key=losses.__getitem__)]
    if not min(losses) < start:
        logger.warning(
            f"No learning rate from {rates[0]:g} to {rates[-1]:g} lowered the loss in {steps} steps: try smaller "
            "ones, more directions, or another `smoothing_radius`."
        )
    return Found(best, rates, losses, start)


def first_batches(trainer: Any, steps: int) -> list[dict[str, Any]]:
    """The first batches of training, one a step and repeated if they are few; no generator is moved on."""
    with seeded(trainer.args.seed, trainer.args.device):
        batches = list(itertools.islice(trainer.get_train_dataloader(), steps))
    return [trainer._prepare_inputs(batch) for batch in itertools.islice(itertools.cycle(batches), steps)]


def loss_after(trainer: Any, batches: list[dict[str, Any]], rate: float) -> float:
    """The mean loss of the batches after a step on each; the weights and all else are as before."""
    with kept(dict(trainer.model.named_parameters())), anew(trainer, rate):
        try:
            for step, batch in enumerate(batches):
                trainer.state.global_step = step
                trainer.training_step(trainer.model, batch)
                trainer.optimizer.step()
            loss = mean_loss(trainer, batches)
        except FloatingPointError:  # most of the losses of a step were none
            return math.inf
    return loss if math.isfinite(loss) else math.inf


@contextmanager
def anew(trainer: Any, rate: float) -> Iterator[None]:
    """A run that begins, with another learning rate; what it leaves in the trainer is put back."""
    before = {name: vars(trainer)[name] for name in OWN}
    step, usual = trainer.state.global_step, trainer.args.learning_rate
    vars(trainer).update(optimizer=None, lr_scheduler=None, update=None, probes=None)
    trainer.args.learning_rate = rate
    try:
        trainer.create_optimizer()
        yield
    finally:
        vars(trainer).update(before)
        trainer.state.global_step, trainer.args.learning_rate = step, usual


def mean_loss(trainer: Any, batches: list[dict[str, Any]]) -> float:
    """Of the model at its present weights."""
    training, loss_of = trainer.model.training, trainer.own_objective or trainer.compute_loss
    trainer.model.eval()
    try:
        with torch.inference_mode(), trainer.compute_loss_context_manager():
            losses = [loss_of(trainer.model, dict(batch)) for batch in batches]
    finally:
        trainer.model.train(training)
    return torch.stack([loss.detach().double().cpu() for loss in losses]).mean().item()


def plot_rates(found: Found, path: Path) -> None:
    """Write a picture of the losses against the learning rates."""
    from matplotlib.figure import Figure  # here, as only this needs it

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    finite = [(rate, loss) for rate, loss in zip(found.rates, found.losses, strict=True) if math.isfinite(loss)]
    axes.plot(*zip(*finite, strict=True), marker="o", color="#1d4ed8")
    axes.axhline(found.start, color="0.45", linestyle="--", linewidth=1, label=f"before, {found.start:.3f}")
    axes.axvline(found.best, color="#c2410c", linewidth=1, label=f"best, {found.best:g}")
    axes.set_xscale("log", base=2)
    axes.set_ylim(top=found.start + 2 * (found.start - min(found.losses)) if min(found.losses) < found.start else None)
    axes.set_xlabel("learning rate")
    axes.set_ylabel("loss after the steps")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
