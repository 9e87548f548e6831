"""ZOOTrainer: `transformers.Trainer` whose steps run forward only.

A zero-order estimate is only another way to arrive at a gradient: `training_step` makes it, the optimizer's step
applies it, and all else is the Trainer's.
"""

import functools
import logging
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from huggingface_hub import CommitInfo
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput, TrainOutput, seed_worker

from .agreement import RanksCallback, check_start
from .batches import same_batches
from .cards import RunCallback, model_card
from .carry import state_after, with_state
from .config import SHARDING, ZOOConfig, refuse_with_ranks, settings, settle_
from .distributed import Ranks, alone, broadcast_
from .figures import LEAST, NOISE, Figures
from .hub import push_trajectory
from .interrupt import Interrupted, Signals
from .learning_rate import Found, find_learning_rate, plot_rates
from .objective import member_losses, plan, probes_of, tokens_in
from .own_objective import OwnObjective
from .preparation import check_weights, prepare_
from .procedure import peak_memory
from .pushing import PushMixin
from .recovery import Recorder, Start, disown, recorder_of, start_of
from .update import Update, check_optimizer


logger = logging.getLogger(__name__)


class ZOOTrainerMixin(PushMixin):
    """Makes a subclass of `transformers.Trainer` zero-order: `class ZOOSFTTrainer(ZOOTrainerMixin, SFTTrainer)`.

    Its arguments are a `ZOOConfig`, another class with `ZOOArguments` mixed in, or plain training arguments, which
    then get the zero-order fields at their defaults.

    Args:
        compute_objective: f(model, inputs) or f(model, inputs, outputs), in place of the model's loss: a number to be
            minimised, which needs no gradient; see `OwnObjective`. An evaluation tells its mean as `eval_objective`.
        args, kwargs: the Trainer's.

    Attributes:
        booked: names of what `compute_loss` adds to in the trainer, as TRL's do; one probe of a batch counts.

    Raises:
        ValueError: at construction, for what a zero-order run cannot do; it says what to do instead.
    """

    args: ZOOConfig
    optimizer: Any  # an Update, within accelerate's wrapper while training
    booked: tuple[str, ...] = ("_metrics", "_total_train_tokens")

    def __init__(self, *args: Any, compute_objective: Callable[..., Any] | None = None, **kwargs: Any):
        self.own_objective = None if compute_objective is None else OwnObjective(compute_objective)
        self.update: Any = None  # an Update, once the optimizer is made
        self.current_gradient_accumulation_steps = 1  # until `train` counts them
        self.losses: list[Tensor] = []  # of the members, for each micro-batch so far
        self.probes: Any = None  # Probes, from the first step on
        self.signals = Signals()
        self._figures, self._start = Figures(), Start()
        self.recorder = Recorder()  # of a run, from the first step of `train` on
        super().__init__(*args, **kwargs)
        self.add_callback(RanksCallback(self))
        self.add_callback(RunCallback(self))
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
        self.hide_token()
        super().create_accelerator_and_postprocess()
        accelerator = self.accelerator
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or accelerator.parallelism_config is not None:
            raise ValueError(SHARDING)
        if accelerator.num_processes > 1:
            refuse_with_ranks(self.args)
        self.ranks = Ranks(accelerator, self.args.ddp_timeout)
        accelerator.prepare_model = functools.partial(accelerator.prepare_model, evaluation_mode=True)
        accelerator.clip_grad_norm_ = self._clip_
        if accelerator.scaler is not None:
            accelerator.scaler = torch.amp.GradScaler(accelerator.device.type, enabled=False)

    def get_train_dataloader(self) -> DataLoader:
        """Every rank gets the same batches, as ranks share out the members and not the data."""
        with same_batches(self.accelerator, self.args.seed, seed_worker, epoch=lambda: int(self.state.epoch or 0)):
            return super().get_train_dataloader()

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Any torch optimizer, run by an `Update`; all ranks start from rank 0's weights."""
        super().create_optimizer(*args, **kwargs)
        self.losses, self._figures, self.probes, self.recorder = [], Figures(), None, Recorder()  # of no other run
        self._warned = False  # of noise
        if not isinstance(self.optimizer, (Update, AcceleratedOptimizer)):
            model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
            names = {parameter: name for name, parameter in model.named_parameters()}
            self.update = self.optimizer = Update(self.optimizer, names)
            if self.accelerator.num_processes > 1:
                broadcast_([*model.parameters(), *model.buffers()])
        self.update.settings = settings(self.args)
        return self.optimizer

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As the Trainer's, but a run that is resumed goes on from its last *step*, bit for bit.

        Args:
            resume_from_checkpoint: True for the newest checkpoint and all steps that the trajectory has since then, or
                the trajectory alone; the path of an earlier checkpoint drops what came after it.

        Raises:
            TrajectoryError: the trajectory is damaged, or of another run and there is no checkpoint.
        """
        self._start = start_of(self, resume_from_checkpoint)
        with Signals() as self.signals:
            try:
                ended = super().train(self._start.checkpoint, *args, **kwargs)
            except Finished:
                ended = self._finish()
            except Interrupted:
                if self.state.global_step > 0:
                    self._save_checkpoint(self.model_wrapped, trial=None)
                    self.callback_handler.on_save(self.args, self.state, self.control)
                raise
            finally:
                self.recorder = Recorder()
        self.ranks.close()
        return ended

    def _finish(self) -> TrainOutput:
        """What is left of a run that has made all its steps: its best model, and the end that callbacks wait for."""
        logger.warning(f"The run has made its {self.state.max_steps} steps, and none was left to do.")
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            self._load_best_model()
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        self.is_in_train = False
        return TrainOutput(self.state.global_step, 0.0, {})

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Losses of this rank's members; after the last micro-batch, the estimate from the losses of all ranks.

        The directions are those of the update, the same for all its micro-batches, and coefficients are linear in the
        loss: accumulated losses give the coefficients of one large batch. A step that is recorded is not evaluated.
        """
        start = time.perf_counter()
        if self.is_in_train and self.state.global_step >= self.state.max_steps:
            raise Finished  # the stock Trainer makes one more step when a finished run is resumed
        self._enter_training(model, inputs)
        inputs = with_state(self._prepare_inputs(inputs), self.update.carried_state)
        estimator, directions, members = plan(self)
        known = self.recorder.recorded.get(self.state.global_step)
        if known and not self.ranks.several:
            self.signals.check()
        if not known:
            kind = estimator.distribution
            self.losses.append(member_losses(self, model, inputs, num_items_in_batch, members=members, kind=kind))
        if self.args.carry_state:
            self.update.carried_state = state_after(self, model, inputs)
        passes = len(members) + self.args.carry_state
        self.update.forward_passes += passes
        self.update.tokens += tokens_in(self, inputs)
        self._figures.add(0 if known else passes, time.perf_counter() - start)
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        if known:
            estimate = self.recorder.repeat(self, known)
        else:
            losses = self.ranks.exchange(functools.reduce(torch.add, self.losses), len(members))
            estimate = estimator.estimate(directions, losses)
            self.recorder.append(self, estimate, self.probes.key(inputs))
        self.losses, self.update.population = [], self.probes.chosen
        self._figures.estimates.append(estimate)
        self.update.hold(estimate)  # applied by the optimizer's step, one parameter at a time
        return torch.tensor(estimate.loss, device=self.args.device)

    def _enter_training(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        """As a step of the stock Trainer begins: after an evaluation, model and optimizer are in another mode."""
        if self.update is None:  # outside of `train`
            self.create_optimizer()
        model.train()
        if isinstance(self.optimizer, AcceleratedOptimizer):
            self.optimizer.train()  # schedule-free optimizers keep two points; the estimate belongs to this one
        if self.probes is None:  # after a checkpoint was loaded, if there is one
            self.probes = probes_of(self)
            if self.is_in_train:
                self.recorder = recorder_of(self, self._start)
                check_start(self, self.recorder, inputs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        self.recorder.sign(output_dir)

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The Trainer's, and the objective of the batch, if it is another than the model's loss."""
        if self.own_objective is not None:
            with self.compute_loss_context_manager():
                self.own_objective.add(model, self._prepare_inputs(inputs))
        return super().prediction_step(model, inputs, *args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """The Trainer's, and the mean objective of all rows."""
        output = super().evaluation_loop(*args, **kwargs)
        if self.own_objective is not None:
            mean = self.own_objective.mean(lambda sums: self.accelerator.reduce(sums.to(self.args.device), "sum"))
            output.metrics[f"{kwargs['metric_key_prefix']}_objective"] = mean  # type: ignore[index]  # there are some
        return output

    def forget_after(self, step: int) -> None:
        """Drop what is recorded after a number of steps."""
        if self.recorder.trajectory is not None:
            self.recorder.trajectory.cut(step)
            disown(str(self.args.output_dir), after=step)

    def _clip_(self, parameters: Any, max_norm: float, norm_type: float = 2.0) -> Tensor | None:
        """Norm of the estimate before clipping; none is computed, or logged, when nothing is clipped."""
        return None if max_norm == float("inf") else self.update.clip_(max_norm)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds forward passes and tokens to every entry, to training losses their speed and what the estimates were
        like, and seconds since their beginning, and to the last one the memory that this process has held at most."""
        extra: dict[str, float] = {"forward_passes": self.update.forward_passes if self.update else 0}
        if self.update and self.update.tokens:
            extra["tokens"] = self.update.tokens
        if "train_runtime" in logs:
            extra["peak_memory_bytes"] = peak_memory()
        if start_time is not None:
            extra["seconds"] = round(time.time() - start_time, 3)
        if "loss" in logs and self._figures.estimates:
            extra |= self._figures.entry(self.ranks)
            self._figures = Figures()
            self._warn_of_noise(extra.get("signal_to_noise", LEAST))
        entry = logs | extra
        super().log(entry, start_time)
        # evaluate() returns what the Trainer adds (the epoch), but not ours: a search would sum it into its objective
        logs.update({name: value for name, value in entry.items() if name not in extra})

    def _warn_of_noise(self, signal: float) -> None:
        """Once a run, where pairs see the same batch and there are enough of them to tell."""
        if signal < LEAST and self.args.data == "shared" and self.args.num_directions >= 4 and not self._warned:
            logger.warning(NOISE.format(signal, self.args.smoothing_radius))
            self._warned = True

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

    def find_learning_rate(self, rates: Sequence[float] | None = None, steps: int = 10) -> Found:
        """The learning rate with which the first steps of a run lower the loss most; nothing is changed.

        Every rate gets `steps` steps, of one batch each, from the present weights, which are restored bit for bit. It
        costs the forward passes of `steps` updates and as many more, for every rate, and stops where rates are too
        large. The losses are drawn in `learning_rate.png` in the output directory, where matplotlib is installed.

        Args:
            rates: to be tried; `learning_rate` of the arguments times 1/64 to 64 by default.
            steps: with each.

        Raises:
            ValueError: `steps` or `rates` make no sense, or the trainer was given an optimizer.
        """
        found = find_learning_rate(self, rates, steps)
        if self.is_world_process_zero() and find_spec("matplotlib"):
            folder = Path(str(self.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            plot_rates(found, folder / "learning_rate.png")
        return found

    def create_model_card(self, **kwargs: Any) -> None:  # type: ignore[override]  # by name, as all callers do
        """Write `README.md` in the output directory: the model, the run and its figures."""
        if "dataset_name" in kwargs:  # TRL's word for it
            kwargs["dataset"] = kwargs.pop("dataset_name")
        if self.is_world_process_zero():
            model_card(self, **kwargs).save(f"{self.args.output_dir}/README.md")

    def push_trajectory_to_hub(self, repository: str, **kwargs: Any) -> CommitInfo | None:
        """Publish the run as its trajectory alone: kilobytes, from which `load_from_trajectory` makes the weights.

        The run is replayed first, and only what gives the present weights bit for bit is pushed.

        Args:
            repository: on the Hub; made if there is none.
            kwargs: `private`, `token`, `revision`, `commit_message`, `trust_remote_code` for the base, and what
                `create_model_card` takes.

        Raises:
            TrajectoryError: the trajectory does not say from what it started, or does not give these weights.
            PushError: something did not arrive.
        """
        return push_trajectory(self, repository, **kwargs) if self.is_world_process_zero() else None


class ZOOTrainer(ZOOTrainerMixin, Trainer):
    """`transformers.Trainer` that trains without backpropagation: `ZOOTrainer(model, args, …).train()`.

    A step evaluates the loss at displaced weights, makes ĝ = 1/n Σᵢ cᵢ zᵢ from the losses, and gives ĝ to the
    optimizer in place of a gradient. Memory is that of inference, plus one copy of the weights and the optimizer's
    own state; a small model whose members are evaluated together may take max(weights, 64 MB) instead of the copy.

    References:
        Chaubard, Kochenderfer: Scaling Recurrent Neural Networks to a Billion Parameters with Zero-Order Optimization.
        2025. arXiv:2505.17852.
    """


class Finished(Exception):  # what ends the Trainer's loop, and no error
    """A run that is resumed has nothing left to do."""
