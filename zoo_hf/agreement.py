"""Are the ranks still equal? Hashes of what has to be, at the start, every so many steps, and before a checkpoint."""

from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .distributed import RankError
from .meter import tensors
from .recovery import Recorder, newest_checkpoint
from .replay import weights_hash


# arguments of which the number of steps, or what ranks do together in between, depends
AGREED = (
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "logging_strategy",
    "save_strategy",
    "eval_strategy",
    "warmup_steps",
    "logging_steps",
    "save_steps",
    "eval_steps",
    "rank_check_steps",
    "bf16",
)


class RanksCallback(TrainerCallback):
    """Compares the weights of all ranks, and lets ranks wait for a save or an evaluation.

    Raises:
        RankError: weights differ; the trajectory is cut back to where they were last seen to be equal.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        ranks, every = self.trainer.ranks, self.trainer.args.rank_check_steps
        if control.should_save or (every > 0 and state.global_step % every == 0):
            self._check(str(args.output_dir), state.global_step)
        elif ranks.several and (control.should_log or control.should_evaluate):
            ranks.meet()  # here a rank that does not come is noticed, and not where the Trainer gathers

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if control.should_save:
            self._check(str(args.output_dir), state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._check(str(args.output_dir), state.global_step)

    def _check(self, output_dir: str, step: int) -> None:
        ranks = self.trainer.ranks
        if not ranks.several or ranks.equal == step:
            return
        try:
            ranks.check({"weights": weights_hash(self.trainer.model).encode()}, step)
        except RankError as error:
            self.trainer.forget_after(ranks.equal)
            checkpoint = newest_checkpoint(output_dir, self.trainer.recorder.trajectory, ranks.equal) or "none"
            raise RankError(
                f"{error} The last good checkpoint is {checkpoint}, and the trajectory now ends after step "
                f"{ranks.equal}: `resume_from_checkpoint=True` goes on from there."
            ) from error

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer.ranks.unhurried()

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.trainer.is_in_train and not self.trainer.ranks.several:
            self.trainer.signals.check()

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.ranks.unhurried()


def check_start(trainer: Any, recorder: Recorder, inputs: dict[str, Any]) -> None:
    """Raises: RankError when ranks begin with other weights, settings or batches; it names what differs."""
    header = recorder.header
    if not trainer.ranks.several or header is None:
        return
    settings = header.settings | {name: vars(trainer.args)[name] for name in AGREED}
    values = {f"`{name}`": repr(value).encode() for name, value in settings.items()}
    values["the optimizer"] = repr((header.optimizer, header.groups)).encode()
    values["the weights"] = header.start.encode()
    values["the first batch"] = b"".join(
        f"{tensor.dtype} {tensor.shape}".encode() + bytes_of(tensor) for tensor in tensors(inputs)
    )
    trainer.ranks.check(values, header.first_step)
    trainer.ranks.take_bytes()  # those of the start are of no step


def bytes_of(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
