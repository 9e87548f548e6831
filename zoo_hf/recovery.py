"""From where a run goes on, and its trajectory: steps that are recorded are repeated, new ones are recorded."""

import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from transformers import TrainerState

from .config import settings
from .distributed import broadcast_bytes
from .estimators import Estimate
from .objective import kind_of_run
from .origin import origin_of
from .procedure import versions
from .record import Header, Step, TrajectoryError, check_header, options
from .replay import estimate_of, header_of, options_of, rates_of
from .trajectory import FILE_NAME, Trajectory


logger = logging.getLogger(__name__)

CALLS = count(1)  # of `train` in this process
RUN_NAME = "run.txt"  # in a checkpoint: the run that it is of


class Start(NamedTuple):
    """From where a run goes on.

    Args:
        checkpoint: its folder; None: the weights that the model has.
        goes_on: whether the recorded steps after it count.
        fresh: whether it is another run than the one that is recorded.
        launch: see `launch_name`.
    """

    checkpoint: str | bool | None = None
    goes_on: bool = False
    fresh: bool = True
    launch: str = ""


def start_of(trainer: Any, resume: str | bool | None) -> Start:
    """What `resume_from_checkpoint` stands for, to all ranks what it is to the first.

    `True` is the newest whole checkpoint of the recorded run and all steps recorded since, or the recorded steps
    alone; so is a restart by torchrun. The path of an earlier checkpoint drops the steps recorded since.

    Raises:
        TrajectoryError: the trajectory is damaged.
    """
    launch = launch_name()
    found = find_start(str(trainer.args.output_dir), resume, launch) if trainer.is_world_process_zero() else Start()
    found = found._replace(launch=launch)
    if not trainer.ranks.several:
        return found
    return Start(*json.loads(broadcast_bytes(json.dumps(found).encode(), trainer.args.device)))


def find_start(output_dir: str, resume: str | bool | None, launch: str) -> Start:
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    if not resume and not restarted:
        return Start()
    path, resume = Path(output_dir, FILE_NAME), adopted(output_dir, resume)
    try:
        recorded = Trajectory.find(path)
    except TrajectoryError as error:
        raise TrajectoryError(f"{error} Move it away to go on from the newest checkpoint instead.") from error
    if not resume and (recorded is None or recorded.header.launch != launch):
        return Start()  # what is there was begun by another launch, and not by the one that restarts
    newest = newest_checkpoint(output_dir, recorded)
    if not resume or resume is True:
        return Start(True if newest is None and recorded is None else newest, goes_on=True, fresh=False)
    same = newest is not None and os.path.realpath(resume) == os.path.realpath(newest)
    return Start(resume, goes_on=same, fresh=False)


def adopted(output_dir: str, resume: str | bool | None) -> str | bool | None:
    """Name `last-checkpoint`, which came from the Hub, as others are named here: no push takes it back."""
    folder = Path(output_dir, "last-checkpoint")
    if not (folder / "trainer_state.json").exists():
        return resume
    named = folder.with_name(
        f"checkpoint-{TrainerState.load_from_json(str(folder / 'trainer_state.json')).global_step}"
    )
    meant = isinstance(resume, str) and os.path.realpath(resume) == os.path.realpath(folder)
    if not named.exists():
        folder.rename(named)
    return str(named) if meant else resume


def launch_name() -> str:
    """The present call of `train`, named as before when torchrun has restarted the process; empty without torchrun."""
    call = next(CALLS)
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ""
    return f"{os.environ['TORCHELASTIC_RUN_ID']}, launcher {os.getppid()}, run {call}"


def newest_checkpoint(output_dir: str, recorded: Trajectory | None = None, upto: int | None = None) -> str | None:
    """The newest folder `checkpoint-<step>` that was written to its end, of the recorded run if there is one.

    A checkpoint without the optimizer's state is none that a recorded run can go on from.

    Args:
        upto: a later one is not asked for.
    """
    for step, folder in sorted(checkpoints(output_dir).items(), reverse=True):
        if (upto is not None and step > upto) or not (recorded is None or belongs(folder, recorded)):
            continue
        try:  # it is written last
            if TrainerState.load_from_json(str(folder / "trainer_state.json")).global_step == step:
                return str(folder)
        except (OSError, ValueError, TypeError):
            logger.warning(f"{folder} was not written to its end, and is left aside.")
    return None


def checkpoints(output_dir: str) -> dict[int, Path]:
    """Folders of checkpoints by the step in their names."""
    return {int(m[1]): p for p in Path(output_dir).glob("*/") if (m := re.fullmatch(r"checkpoint-(\d+)", p.name))}


def disown(output_dir: str, after: int) -> None:
    """Checkpoints after a step, whose steps are dropped, are no longer of the recorded run."""
    for step, folder in checkpoints(output_dir).items():
        if step > after:
            (folder / RUN_NAME).unlink(missing_ok=True)


def belongs(folder: Path, recorded: Trajectory) -> bool:
    """Whether a checkpoint is of the recorded run, optimizer and all."""
    name = folder / RUN_NAME
    same = name.exists() and name.read_text(encoding="utf-8") == recorded.header.run
    return same and (folder / "optimizer.pt").exists()


class Recorder:
    """The trajectory of the present run, written by the first process; nothing is recorded without a header.

    Args:
        header: of the run.
        recorded: steps that are there already, to be repeated.
        trajectory: the file, on the first process.
    """

    def __init__(
        self,
        header: Header | None = None,
        recorded: Mapping[int, Step] = MappingProxyType({}),
        trajectory: Trajectory | None = None,
    ):
        self.header, self.recorded, self.trajectory = header, recorded, trajectory

    def repeat(self, trainer: Any, step: Step) -> Estimate:
        """What a recorded step estimated; the run goes on with its learning rates and its way to evaluate members."""
        assert self.header is not None, "A step is recorded under a header."
        if step.members:
            trainer.probes.chosen[step.key] = step.members
        return estimate_of(trainer.update, self.header, step)

    def sign(self, checkpoint: str) -> None:
        """Write the run's name into a checkpoint that the first process saves."""
        if self.trajectory is not None:
            Path(checkpoint, RUN_NAME).write_text(self.trajectory.header.run, encoding="utf-8")

    def append(self, trainer: Any, estimate: Estimate, key: int) -> None:
        """Record a step that is about to be made.

        Args:
            key: of the last micro-batch's shape.

        Raises:
            OSError: it could not be written.
            ValueError: a scheduler has changed more than the learning rate.
        """
        update = trainer.update
        if self.header is None:
            return
        if self.header.optimizer.startswith("torch.optim.") and options_of(update) != options(self.header):
            raise ValueError(
                f"The optimizer's options are {options_of(update)} at step {trainer.state.global_step} and were "
                f"{options(self.header)}: only learning rates may change in a run (`cycle_momentum=False`)."
            )
        if self.trajectory is not None:
            step = Step(
                trainer.state.global_step,
                rates_of(update),
                trainer.args.smoothing_radius,
                estimate.loss,
                estimate.coefficients,
                key,
                trainer.probes.chosen.get(key, 0),
            )
            self.trajectory.append(step)


def recorder_of(trainer: Any, start: Start) -> Recorder:
    """The recorder of a run that is about to make its first step; all ranks get the recorded steps of the first."""
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    header = header_of(
        model,
        trainer.update,
        settings(trainer.args),
        kind_of_run(trainer),
        first_step=trainer.state.global_step,
        versions=versions(),
        launch=start.launch,
        origin={} if trainer.state.global_step else origin_of(model, trainer.args.seed),
    )
    check_header(header)  # what could not be read again is not begun
    trajectory = open_trajectory(trainer, header, start) if trainer.is_world_process_zero() else None
    steps = [step for step in ([] if trajectory is None else trajectory) if step.step >= header.first_step]
    if trainer.ranks.several:
        bodies = broadcast_bytes(b"".join(map(header.pack, steps)), trainer.args.device)
        length = header.step_bytes
        steps = [header.unpack(bodies[first : first + length]) for first in range(0, len(bodies), length)]
    if steps:
        logger.info(f"Steps {steps[0].step} to {steps[-1].step} are repeated from the trajectory.")
    if trajectory is not None:
        header = replace(header, run=trajectory.header.run)  # the rest is what ranks compare now
    return Recorder(header, {step.step: step for step in steps}, trajectory)


def open_trajectory(trainer: Any, header: Header, start: Start) -> Trajectory:
    """The run's file: gone on with where it fits, else a new one.

    Raises:
        TrajectoryError: there is no checkpoint, and what is recorded is of another run.
    """
    path, now = Path(trainer.args.output_dir, FILE_NAME), header.first_step
    path.parent.mkdir(parents=True, exist_ok=True)
    found = None if start.fresh else Trajectory.find(path)
    if found is not None:
        wrong = mismatch(trainer, header, found, start)
        if wrong and start.checkpoint is None:
            raise TrajectoryError(f"{path}: the run cannot go on, as it has no checkpoint and {wrong}.")
        if not wrong:
            # a run that is made shorter ends there
            stop = min(trainer.state.max_steps, found.stop if start.goes_on else now)
            disown(str(path.parent), after=stop)
            if stop < found.stop:
                found.cut(stop)
            trainer.update.trajectory = found.header.run
            return found
        logger.warning(f"{path} cannot be gone on with, as {wrong}: a new one begins at step {now}.")
    made = Trajectory.create(path, header)
    trainer.update.trajectory = header.run
    return made


def mismatch(trainer: Any, header: Header, found: Trajectory, start: Start) -> str:
    """Why a trajectory cannot be gone on with from the present step, in words; empty when it can."""
    differences = header.differences(found.header)
    if differences:
        return "; ".join(differences)
    if start.checkpoint is not None and trainer.update.trajectory != found.header.run:
        return "it is not that of the checkpoint's run"
    if not found.header.first_step <= header.first_step <= found.stop:
        return f"it has steps {found.header.first_step} to {found.stop - 1}"
    if header.first_step == found.header.first_step and header.start != found.header.start:
        return "the model's weights are not those it started from"
    return ""
