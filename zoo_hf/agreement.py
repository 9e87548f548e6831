"""Are the ranks still equal? Hashes of what has to be, at the start, every so many steps, and before a checkpoint."""

from typing import Any

from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .distributed import RankError
from .recovery import Recorder, newest_checkpoint
from .replay import weights_hash


# arguments of which the number of steps, or what ranks do together in between, depends
AGREED = (
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "lr_scheduler_type",
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
        due = control.should_save or (every > 0 and state.global_step % every == 0)
        if not (ranks.several and due):
            return
        try:
            ranks.check({"weights": weights_hash(self.trainer.model).encode()}, state.global_step)
        except RankError as error:
            self.trainer.forget_after(ranks.equal)
            checkpoint = newest_checkpoint(str(args.output_dir)) or "none"
            raise RankError(
                f"{error} The last good checkpoint is {checkpoint}, and the trajectory now ends after step "
                f"{ranks.equal}: `resume_from_checkpoint=True` goes on from there."
            ) from error

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer.ranks.unhurried()

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
        name.encode() + value.detach().cpu().contiguous().numpy().tobytes()
        for name, value in inputs.items()
        if isinstance(value, Tensor)
    )
    trainer.ranks.check(values, header.first_step)
    trainer.ranks.take_bytes()  # those of the start are of no step
