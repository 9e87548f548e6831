"""ZOOTrainer: `transformers.Trainer` whose steps run forward only.

A zero-order estimate is only another way to arrive at a gradient: `training_step` makes it, the optimizer's step
applies it, and all else is the Trainer's.
"""

import contextlib
import copy
import functools
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import transformers
from accelerate.optimizer import AcceleratedOptimizer
from packaging.version import Version
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import seed_worker

from .cards import model_card
from .carry import state_after, with_state
from .config import SHARDING, ZOOConfig, refuse_with_ranks, settings, settle_
from .distributed import alone, broadcast_, exchange, same_batches, share
from .estimators import ESTIMATORS, Estimate, Estimator
from .low_rank import kind_of
from .noise import Direction, dropout_seed
from .perturbation import Member, Objective, probing_mode, seeded
from .preparation import check_weights, prepare_
from .probes import Probes
from .update import Update, check_optimizer


logger = logging.getLogger(__name__)


if TYPE_CHECKING:
    Base = Trainer  # what the mixin is mixed into
else:
    Base = object


class ZOOTrainerMixin(Base):
    """Makes a subclass of `transformers.Trainer` zero-order: `class ZOOSFTTrainer(ZOOTrainerMixin, SFTTrainer)`.

    Its arguments are a `ZOOConfig`, another class with `ZOOArguments` mixed in, or plain training arguments, which
    then get the zero-order fields at their defaults.

    Attributes:
        booked: names of what `compute_loss` adds to in the trainer, as TRL's do; one probe of a batch counts.

    Raises:
        ValueError: at construction, for what a zero-order run cannot do; it says what to do instead.
    """

    args: ZOOConfig
    optimizer: Any  # an Update, within accelerate's wrapper while training
    booked: tuple[str, ...] = ("_metrics", "_total_train_tokens")

    def __init__(self, *args: Any, **kwargs: Any):
        self.update: Any = None  # an Update, once the optimizer is made
        self.current_gradient_accumulation_steps = 1  # until `train` counts them
        self._losses: list[Tensor] = []  # of the members, for each micro-batch so far
        self._figures = Figures()
        self._probes: Any = None  # Probes, from the first step on
        super().__init__(*args, **kwargs)
        self.given_optimizers = self.optimizer, self.lr_scheduler  # None for what the arguments choose
        if self.optimizer is not None:
            check_optimizer(type(self.optimizer).__name__)
        prepare_(self.model, self.args)
        check_weights(self)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """A new model, for every run of a trainer with `model_init`, prepared as the first one."""
        model = super().call_model_init(trial)
        prepare_(model, self.args)
        return model

    def create_accelerator_and_postprocess(self) -> None:
        """No DDP, whose buffers are as large as the weights, and no loss scaling: there is no backward pass."""
        settle_(self.args)
        super().create_accelerator_and_postprocess()
        accelerator = self.accelerator
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or accelerator.parallelism_config is not None:
            raise ValueError(SHARDING)
        if accelerator.num_processes > 1:
            refuse_with_ranks(self.args)
        accelerator.prepare_model = functools.partial(accelerator.prepare_model, evaluation_mode=True)
        accelerator.clip_grad_norm_ = self._clip_
        if accelerator.scaler is not None:
            accelerator.scaler = torch.amp.GradScaler(accelerator.device.type, enabled=False)

    def get_train_dataloader(self) -> DataLoader:
        """Every rank gets the same batches, as ranks share out the members and not the data."""
        with same_batches(self.accelerator, self.args.seed, seed_worker):
            return super().get_train_dataloader()

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Any torch optimizer, run by an `Update`; all ranks start from rank 0's weights."""
        super().create_optimizer(*args, **kwargs)
        self._losses, self._figures, self._probes = [], Figures(), None  # another run may have left some
        if not isinstance(self.optimizer, (Update, AcceleratedOptimizer)):
            model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
            names = {parameter: name for name, parameter in model.named_parameters()}
            self.update = self.optimizer = Update(self.optimizer, names)
            if self.accelerator.num_processes > 1:
                broadcast_([*model.parameters(), *model.buffers()])
        self.update.settings = settings(self.args)
        return self.optimizer

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Losses of this rank's members; after the last micro-batch, the estimate from the losses of all ranks.

        The directions are those of the update, the same for all its micro-batches, and coefficients are linear in the
        loss: accumulated losses give the coefficients of one large batch.
        """
        start = time.perf_counter()
        self._enter_training(model)
        args, inputs = self.args, with_state(self._prepare_inputs(inputs), self.update.carried_state)
        estimator, directions, members = plan(self)
        mine = members[share(len(members), self.accelerator.process_index, self.accelerator.num_processes)]
        with probing_mode(model, dropout=args.dropout), alone(self.accelerator), first_booking(self) as book:
            losses = self._probes.losses(
                objective_of(self, model, inputs, num_items_in_batch, after=book),
                self.update.parameters,
                mine,
                args.smoothing_radius,
                model=self.accelerator.unwrap_model(model, keep_torch_compile=False),
                distribution=estimator.distribution,
                of=(len(members), numbers_in(inputs)),
            )
            self.update.population = self._probes.chosen
            if args.carry_state:
                self.update.carried_state = state_after(self, model, inputs)
        # divided here and not in the objective: in float64
        scale = 1 if loss_is_scaled(self, num_items_in_batch) else self.current_gradient_accumulation_steps
        self._losses.append(losses / scale)
        passes = len(members) + args.carry_state
        self.update.forward_passes += passes
        self._figures.add(passes, time.perf_counter() - start)
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=args.device)
        losses = exchange(functools.reduce(torch.add, self._losses), len(members), self.accelerator)
        self._losses = []
        estimate = estimator.estimate(directions, losses)
        self._figures.estimates.append(estimate)
        self.update.hold(estimate)  # applied by the optimizer's step, one parameter at a time
        return torch.tensor(estimate.loss, device=args.device)

    def _enter_training(self, model: nn.Module) -> None:
        """As a step of the stock Trainer begins: after an evaluation, model and optimizer are in another mode."""
        if self.update is None:  # outside of `train`
            self.create_optimizer()
        self._probes = self._probes or probes_of(self)  # after a checkpoint was loaded, if there is one
        model.train()
        if isinstance(self.optimizer, AcceleratedOptimizer):
            self.optimizer.train()  # schedule-free optimizers keep two points; the estimate belongs to this one

    def _clip_(self, parameters: Any, max_norm: float, norm_type: float = 2.0) -> Tensor | None:
        """Norm of the estimate before clipping; none is computed, or logged, when nothing is clipped."""
        return None if max_norm == float("inf") else self.update.clip_(max_norm)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds forward passes to every entry, and to training losses their speed and what the estimates were like."""
        extra: dict[str, float] = {"forward_passes": self.update.forward_passes if self.update else 0}
        if "loss" in logs and self._figures.estimates:
            extra |= self._figures.entry()
            self._figures = Figures()
        entry = logs | extra
        super().log(entry, start_time)
        # evaluate() returns what the Trainer adds (the epoch), but not ours: a search would sum it into its objective
        logs.update({name: value for name, value in entry.items() if name not in extra})

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        with alone(self.accelerator):  # ranks see the same tokens
            super()._track_num_input_tokens(inputs)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """2 · tokens · weights for every forward pass; the Trainer counts 6, for one forward and one backward pass."""
        *_, members = plan(self)
        return super().floating_point_ops(inputs) * len(members) // 3

    def get_total_train_batch_size(self, args: Any) -> int:
        """Examples an update: ranks see the same batch, so their number does not count."""
        return super().get_total_train_batch_size(args) // self.accelerator.num_processes

    def create_model_card(self, **kwargs: Any) -> None:  # type: ignore[override]  # by name, as all callers do
        """Write `README.md` in the output directory: the model, the run and its figures."""
        if "dataset_name" in kwargs:  # TRL's word for it
            kwargs["dataset"] = kwargs.pop("dataset_name")
        if self.is_world_process_zero():
            model_card(self, **kwargs).save(f"{self.args.output_dir}/README.md")


class ZOOTrainer(ZOOTrainerMixin, Trainer):
    """`transformers.Trainer` that trains without backpropagation: `ZOOTrainer(model, args, …).train()`.

    A step evaluates the loss at displaced weights, makes ĝ = 1/n Σᵢ cᵢ zᵢ from the losses, and gives ĝ to the
    optimizer in place of a gradient. Memory is that of inference, plus one copy of the weights and the optimizer's
    own state; a small model whose members are evaluated together may take max(weights, 64 MB) instead of the copy.

    References:
        Chaubard, Kochenderfer: Scaling Recurrent Neural Networks to a Billion Parameters with Zero-Order Optimization.
        2025. arXiv:2505.17852.
    """


class Figures:
    """What the log says of the steps since its last entry."""

    def __init__(self) -> None:
        self.estimates: deque[Estimate] = deque(maxlen=1000)
        self.probes, self.seconds = 0, 0.0

    def add(self, probes: int, seconds: float) -> None:
        """Count the probes of a micro-batch, of all ranks."""
        self.probes, self.seconds = self.probes + probes, self.seconds + seconds

    def entry(self) -> dict[str, float]:
        """The speed, and what the estimates were like."""
        finite = [e.coefficients[e.coefficients.isfinite()] for e in self.estimates]
        return {
            "forward_passes_per_second": round(self.probes / self.seconds, 3),
            "coefficient_spread": torch.cat(finite).std(correction=0).item(),
            "left_out": sum(e.left_out for e in self.estimates) / len(self.estimates),
        }


def objective_of(
    trainer: Any, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any, *, after: Callable[[], None]
) -> Objective:
    """The trainer's loss of a batch at the model's present weights; `after` is called when it is computed."""
    masks: Callable[[], Any] = contextlib.nullcontext
    if trainer.args.dropout:
        seed = dropout_seed(trainer.args.seed, trainer.state.global_step, len(trainer._losses))
        masks = functools.partial(seeded, seed, trainer.args.device)

    def objective() -> Tensor:
        # a fresh dict, as compute_loss may pop keys; a fresh autocast region, as its cached casts would outlive θ
        with masks(), trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(model, dict(inputs), num_items_in_batch=num_items_in_batch)
        after()
        return loss

    return objective


def plan(trainer: Any) -> tuple[Estimator, list[Direction], list[Member]]:
    """The present step's estimator, directions and members."""
    args, model = trainer.args, trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    kind = kind_of(args.distribution, model, args.direction_rank)
    estimator = ESTIMATORS[args.estimator](args.smoothing_radius, kind)
    directions = [Direction(args.seed, trainer.state.global_step, i) for i in range(args.num_directions)]
    return estimator, directions, estimator.members(directions)


def probes_of(trainer: Any) -> Probes:
    """How members are evaluated in this run; what `auto` chose before it was resumed is kept."""
    args = trainer.args
    choice = "serial" if args.probes == "auto" and not may_be_a_population(trainer) else args.probes
    return Probes(choice, args.members_per_forward, trainer.update.population if choice == "auto" else {})


def may_be_a_population(trainer: Any) -> bool:
    """Whether nobody minds that a forward pass is of many members, who did not ask for it.

    A trainer's own `compute_loss`, and hooks, may keep what they see; compiled code would be compiled anew.
    """
    hooks = any(module._forward_hooks or module._forward_pre_hooks for module in trainer.model.modules())
    return type(trainer).compute_loss is Trainer.compute_loss and not hooks and not trainer.args.torch_compile


def numbers_in(inputs: dict[str, Any]) -> int:
    """Entries of all tensors of a batch: what its forward pass takes grows with them."""
    return sum(value.numel() for value in inputs.values() if isinstance(value, Tensor))


def loss_is_scaled(trainer: Any, num_items_in_batch: Any) -> bool:
    """Whether the loss is a share of all micro-batches' loss; else it is the mean of one micro-batch."""
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
