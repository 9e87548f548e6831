"""ZOOTrainer: `transformers.Trainer` whose steps run forward only.

A zero-order estimate is only another way to arrive at a gradient: `training_step` makes it, the optimizer's step
applies it, and all else is the Trainer's.
"""

import contextlib
import functools
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import transformers
from accelerate.optimizer import AcceleratedOptimizer
from packaging.version import Version
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import seed_worker

from .cards import model_card
from .config import FLOAT16, SHARDING, ZOOConfig, check, complete_, refuse, refuse_with_ranks, turn_off_
from .distributed import alone, broadcast_, exchange, same_batches, share
from .estimators import ESTIMATORS, Estimate, Estimator
from .noise import Direction, check_names, dropout_seed
from .perturbation import Objective, check_contiguous, probe, probing_mode, seeded, share_moved
from .update import Update, check_optimizer


logger = logging.getLogger(__name__)

COMPUTE_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": None}


if TYPE_CHECKING:
    Base = Trainer  # what the mixin is mixed into
else:
    Base = object


class ZOOTrainerMixin(Base):
    """Makes a subclass of `transformers.Trainer` zero-order: `class ZOOSFTTrainer(ZOOTrainerMixin, SFTTrainer)`.

    Its arguments are a `ZOOConfig`, another class with `ZOOArguments` mixed in, or plain training arguments, which
    then get the zero-order fields at their defaults.

    Raises:
        ValueError: at construction, for what a zero-order run cannot do; it says what to do instead.
    """

    args: ZOOConfig
    optimizer: Any  # an Update, within accelerate's wrapper while training

    def __init__(self, *args: Any, **kwargs: Any):
        self.update: Any = None  # an Update, once the optimizer is made
        self._losses: Tensor | float = 0.0  # of the members, over the micro-batches so far
        self._estimates: deque[Estimate] = deque(maxlen=1000)  # since the last log, as are the next two
        self._probes, self._seconds = 0, 0.0
        super().__init__(*args, **kwargs)
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
        complete_(self.args)
        check(self.args)
        refuse(self.args)
        turn_off_(self.args)
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
        self._losses, self._probes, self._seconds = 0.0, 0, 0.0  # another run may have left some
        self._estimates.clear()
        if not isinstance(self.optimizer, (Update, AcceleratedOptimizer)):
            model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
            names = {parameter: name for name, parameter in model.named_parameters()}
            self.update = self.optimizer = Update(self.optimizer, names)
            if self.accelerator.num_processes > 1:
                broadcast_([*model.parameters(), *model.buffers()])
        return self.optimizer

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Losses of this rank's members; after the last micro-batch, the estimate from the losses of all ranks.

        The directions are those of the update, the same for all its micro-batches, and coefficients are linear in the
        loss: accumulated losses give the coefficients of one large batch.
        """
        start = time.perf_counter()
        args, inputs = self.args, self._prepare_inputs(inputs)
        estimator = self._estimator()
        directions = [Direction(args.seed, self.state.global_step, i) for i in range(args.num_directions)]
        members = estimator.members(directions)
        mine = members[share(len(members), self.accelerator.process_index, self.accelerator.num_processes)]
        self.optimizer.train()  # schedule-free optimizers keep two points; the estimate belongs to this one
        with probing_mode(model, dropout=args.dropout), alone(self.accelerator):
            losses = probe(
                self._objective(model, inputs, num_items_in_batch),
                self.update.parameters,
                mine,
                args.smoothing_radius,
                distribution=args.distribution,
            )
        # divided here and not in the objective: in float64
        scale = 1 if self._loss_is_scaled(num_items_in_batch) else self.current_gradient_accumulation_steps
        self._losses = self._losses + losses / scale
        self.update.forward_passes += len(members)
        self._probes, self._seconds = self._probes + len(members), self._seconds + time.perf_counter() - start
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=args.device)
        losses, self._losses = exchange(self._losses, len(members), self.accelerator), 0.0
        estimate = estimator.estimate(directions, losses)
        self._estimates.append(estimate)
        self.update.hold(estimate)  # applied by the optimizer's step, one parameter at a time
        return torch.tensor(estimate.loss, device=args.device)

    def _estimator(self) -> Estimator:
        return ESTIMATORS[self.args.estimator](self.args.smoothing_radius, self.args.distribution)

    def _objective(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any) -> Objective:
        masks: Callable[[], Any] = contextlib.nullcontext
        if self.args.dropout:
            seed = dropout_seed(self.args.seed, self.state.global_step)
            masks = functools.partial(seeded, seed, self.args.device)

        def objective() -> Tensor:
            # a fresh dict, as compute_loss may pop keys; a fresh autocast region, as its cached casts would outlive θ
            with masks(), self.compute_loss_context_manager():
                loss = self.compute_loss(model, dict(inputs), num_items_in_batch=num_items_in_batch)
            return loss  # type: ignore[return-value]  # outputs come along only where they are asked for

        return objective

    def _loss_is_scaled(self, num_items_in_batch: Any) -> bool:
        """Whether the loss is a share of all micro-batches' loss; else it is the mean of one micro-batch."""
        # goes when transformers >= 5.19, which lets a trainer say so, is required
        if Version(transformers.__version__) >= Version("5.19.0") and self.loss_is_scaled_for_ga is not None:
            return self.loss_is_scaled_for_ga
        summed = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return summed or self.compute_loss_func is not None

    def _clip_(self, parameters: Any, max_norm: float, norm_type: float = 2.0) -> Tensor | None:
        """Norm of the estimate before clipping; none is computed, or logged, when nothing is clipped."""
        return None if max_norm == float("inf") else self.update.clip_(max_norm)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds forward passes to every entry, and to training losses their speed and what the estimates were like."""
        extra: dict[str, float] = {"forward_passes": self.update.forward_passes if self.update else 0}
        if "loss" in logs and self._estimates:
            finite = [e.coefficients[e.coefficients.isfinite()] for e in self._estimates]
            extra |= {
                "forward_passes_per_second": round(self._probes / self._seconds, 3),
                "coefficient_spread": torch.cat(finite).std(correction=0).item(),
                "left_out": sum(e.left_out for e in self._estimates) / len(self._estimates),
            }
            self._probes, self._seconds = 0, 0.0
            self._estimates.clear()
        entry = logs | extra
        super().log(entry, start_time)
        # evaluate() returns what the Trainer adds (the epoch), but not ours: a search would sum it into its objective
        logs.update({name: value for name, value in entry.items() if name not in extra})

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """2 · tokens · weights for every forward pass; the Trainer counts 6, for one forward and one backward pass."""
        members = self._estimator().members([Direction(self.args.seed, 0, i) for i in range(self.args.num_directions)])
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
    own state.

    References:
        Chaubard, Kochenderfer: Scaling Recurrent Neural Networks to a Billion Parameters with Zero-Order Optimization.
        2025. arXiv:2505.17852.
    """


def prepare_(model: Any, args: Any) -> None:
    """Tag the model, and switch off, with a log line each, what is of no use or harm to probes."""
    # the flag that transformers sets on each module it checkpoints; its methods change names with the version
    checkpointed = [module for module in model.modules() if vars(module).get("gradient_checkpointing")]
    for module in checkpointed:
        module.gradient_checkpointing = False
    if checkpointed or args.gradient_checkpointing:
        args.gradient_checkpointing = args.activation_checkpointing = False
        logger.warning("Gradient checkpointing is switched off: no activations are kept for a backward pass.")
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.add_model_tags(["zoo_hf", "zeroth-order"])
        if type(module).__name__ == "RwkvModel" and module.config.rescale_every:
            # it would rewrite its weights in the midst of a probe, where the mode changes from training to inference
            module.train()._rescale_layers()
            module.config.rescale_every = 0
            logger.warning("RWKV: `rescale_every` is set to 0, as it rewrites the weights. Set it again for float16.")


def check_weights(trainer: Any) -> None:
    """Raises: ValueError when no weight is trainable, one cannot be displaced, or most would not feel it."""
    weights = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    if not weights:
        raise ValueError("No parameter has `requires_grad=True`: unfreeze some, or add a PEFT adapter.")
    check_names(list(weights))
    if trainer.args.device.type == "cpu" and any(p.dtype == torch.float16 for p in trainer.model.parameters()):
        raise ValueError(FLOAT16)
    check_contiguous(weights)
    radius, precision = trainer.args.smoothing_radius, COMPUTE_DTYPES[trainer.accelerator.mixed_precision]
    moved = share_moved(weights, radius, precision)
    dtypes = ", ".join(sorted({str(precision or p.dtype) for p in weights.values()}))
    if moved < 0.5:
        raise ValueError(
            f"`smoothing_radius`={radius} moves only {moved:.0%} of the weights in {dtypes}: "
            "raise it, or compute in a wider dtype."
        )
    if moved < 0.95:
        logger.warning(
            f"smoothing_radius={radius} leaves {1 - moved:.0%} of the weights in {dtypes} where they are: raise it."
        )
