"""A trainer's loss of a batch as the objective of a step: its members, their directions and their losses."""

import contextlib
import copy
import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from .batches import split
from .distributed import STOP, alone, share
from .estimators import ESTIMATORS, Estimator
from .interrupt import Interrupted
from .loading import bare_model
from .low_rank import Kind, kind_of
from .noise import Direction, dropout_seed
from .perturbation import Member, Objective, probing_mode, seeded
from .probes import Probes


def plan(trainer: Any) -> tuple[Estimator, list[Direction], list[Member]]:
    """The present step's estimator, directions and members."""
    args = trainer.args
    estimator = ESTIMATORS[args.estimator](args.smoothing_radius, kind_of_run(trainer), args.normalize)
    directions = [Direction(args.seed, trainer.state.global_step, i) for i in range(args.num_directions)]
    return estimator, directions, estimator.members(directions)


def tokens_in(trainer: Any, inputs: dict[str, Any]) -> int:
    """Entries of a batch's main input, padding included; 0 where a model of its own names none."""
    model = bare_model(trainer)
    main = inputs.get(model.main_input_name) if isinstance(model, PreTrainedModel) else None
    return main.shape[:2].numel() if isinstance(main, Tensor) else 0


def kind_of_run(trainer: Any) -> Kind:
    """How the directions are distributed."""
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    return kind_of(trainer.args.distribution, model, trainer.args.direction_rank)


def member_losses(
    trainer: Any,
    model: nn.Module,
    inputs: dict[str, Any],
    num_items_in_batch: Any,
    *,
    members: list[Member],
    kind: Kind,
) -> Tensor:
    """Losses of this rank's share of the members, float64 on the CPU; `STOP` for all when it was asked to stop."""
    args, ranks = trainer.args, trainer.ranks
    mine = members[share(len(members), ranks.rank, ranks.world_size)]
    watched = not may_be_a_population(trainer)  # before `probing_mode` puts hooks of its own
    with probing_mode(model, dropout=args.dropout), alone(trainer.accelerator), first_booking(trainer) as book:
        try:
            losses = trainer.probes.losses(
                objective_of(trainer, model, inputs, num_items_in_batch, members=mine, after=book),
                trainer.update.parameters,
                mine,
                args.smoothing_radius,
                model=trainer.accelerator.unwrap_model(model, keep_torch_compile=False),
                distribution=kind,
                total=len(members) // ranks.world_size,
                batch=inputs,
                watched=watched,
            )
        except Interrupted:
            return torch.full((len(mine),), STOP).view(torch.float64)
    # divided here and not in the objective: in float64
    scaled = loss_is_scaled(trainer, num_items_in_batch) if args.data == "shared" else num_items_in_batch is not None
    return losses / (1 if scaled else trainer.current_gradient_accumulation_steps)


def objective_of(
    trainer: Any,
    model: nn.Module,
    inputs: dict[str, Any],
    num_items_in_batch: Any,
    *,
    members: list[Member],
    after: Callable[[], None],
) -> Objective:
    """The trainer's loss of a batch at the model's present weights; `after` is called when it is computed.

    Where pairs have shares of the batch, the first call is for the first member, the second for the second one.
    """
    args = trainer.args
    masks: Callable[[], Any] = contextlib.nullcontext
    if args.dropout:
        seed = dropout_seed(args.seed, trainer.state.global_step, len(trainer.losses))
        masks = functools.partial(seeded, seed, args.device)
    parts: Iterator[tuple[dict[str, Any], float]] = itertools.repeat((inputs, 1.0))
    if args.data == "split":
        count, total = items_of(trainer, inputs, None if trainer.own_objective else num_items_in_batch)
        parts = iter(split(inputs, members, args.num_directions, count=count, total=total))
        num_items_in_batch = None  # a share's loss is its own mean: not all models that take the number heed it

    extra = {"skip_logits": True} if skips_logits(trainer) else {}

    def objective() -> Tensor:
        trainer.signals.check()
        batch, weight = next(parts)
        if weight == 0.0:  # no label counts, and the mean of none is no number
            return torch.zeros((), device=args.device)
        # a fresh dict, as compute_loss may pop keys; a fresh autocast region, as its cached casts would outlive θ
        with masks(), trainer.compute_loss_context_manager():
            if trainer.own_objective is not None:
                loss = trainer.own_objective(model, dict(batch))
            else:
                loss = trainer.compute_loss(model, {**batch, **extra}, num_items_in_batch=num_items_in_batch)
        after()
        return loss if weight == 1.0 else loss * weight

    return objective


def skips_logits(trainer: Any) -> bool:
    """Whether the model can leave out its logits, and nobody looks at them."""
    return (
        not (has_own_loss(trainer) or trainer.own_objective)
        and "skip_logits" in inspect.signature(bare_model(trainer).forward).parameters
    )


def items_of(
    trainer: Any, inputs: dict[str, Any], num_items_in_batch: Any
) -> tuple[Callable[[dict[str, Any]], float], float]:
    """What counts the items of a share's mean loss, as the Trainer counts them, and how many there are in all.

    Labels of −100 do not count; without labels, or where the Trainer does not count them, rows do.
    """

    def counted(batch: dict[str, Any]) -> Any:
        return trainer.get_batch_samples(iter([batch]), 1, args.device)[1]

    args = trainer.args
    if num_items_in_batch is not None:
        return lambda batch: float(counted(batch)), float(num_items_in_batch)
    labels = None if trainer.own_objective else inputs.get("labels")
    if isinstance(labels, Tensor) and not labels.is_floating_point():
        return lambda batch: float((batch["labels"] != -100).sum()), float((labels != -100).sum())
    rows = next(len(value) for value in inputs.values() if isinstance(value, Tensor) and value.ndim)
    return lambda batch: float(next(len(value) for value in batch.values() if isinstance(value, Tensor))), float(rows)


def probes_of(trainer: Any) -> Probes:
    """How members are evaluated in this run; what was chosen before it was resumed is kept."""
    return Probes(trainer.args.probes, trainer.args.members_per_forward, trainer.update.population)


def may_be_a_population(trainer: Any) -> bool:
    """Whether nobody minds that a forward pass is of many members, who did not ask for it.

    A trainer's own `compute_loss`, a `compute_loss_func`, and hooks, which may come and go from step to step, may keep
    what they see; compiled code would be compiled anew; and members of a population have one batch.
    """
    args = trainer.args
    hooks = any(module._forward_hooks or module._forward_pre_hooks for module in trainer.model.modules())
    return not (has_own_loss(trainer) or hooks or args.torch_compile or args.data == "split")


def has_own_loss(trainer: Any) -> bool:
    """Whether the loss is another than that of the model, or looks at more of its outputs."""
    return type(trainer).compute_loss is not Trainer.compute_loss or trainer.compute_loss_func is not None


def loss_is_scaled(trainer: Any, num_items_in_batch: Any) -> bool:
    """Whether the loss is a share of all micro-batches' loss; else it is the mean of one micro-batch."""
    if trainer.own_objective is not None:
        return False
    # goes when transformers >= 5.19, which lets a trainer say so, is required
    if Version(transformers.__version__) >= Version("5.19.0") and trainer.loss_is_scaled_for_ga is not None:
        return trainer.loss_is_scaled_for_ga
    summed = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
    return summed or trainer.compute_loss_func is not None


@contextlib.contextmanager
def first_booking(trainer: Any) -> Iterator[Callable[[], None]]:
    """Call what is yielded after every probe: of what they add to the trainer's books, the first one's is kept."""
    kept: dict[str, Any] = {}

    def book() -> None:
        if not kept:
            kept.update({name: copy.deepcopy(vars(trainer)[name]) for name in trainer.booked if name in vars(trainer)})

    try:
        yield book
    finally:
        vars(trainer).update(kept)
