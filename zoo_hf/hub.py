"""Trajectories on the Hub: published in place of weights, and loaded as the model that they give."""

import tempfile
from pathlib import Path
from shutil import copy
from typing import Any

from huggingface_hub import CommitInfo, HfApi, hf_hub_download
from huggingface_hub.errors import RemoteEntryNotFoundError
from torch import nn

from .callbacks import PLOT_NAME
from .cards import model_card
from .origin import made_again
from .procedure import unwrapped
from .pushing import UNREACHED, WEIGHTS, pushing
from .record import NOT_OF_CONTENT, TrajectoryError
from .replay import replay, weights_hash
from .trajectory import FILE_NAME, Trajectory


AS_THEY_ARE: tuple[type[BaseException], ...] = (*NOT_OF_CONTENT, *UNREACHED)


def trajectory_of(place: str | Path, *, revision: str | None = None, token: str | None = None) -> Trajectory:
    """The trajectory in a file, a folder or a repository of the Hub.

    Raises:
        TrajectoryError: there is none, or it is damaged.
        OSError: the repository cannot be read.
    """
    path = Path(place)
    if path.is_dir():
        path /= FILE_NAME
        if not path.exists():
            raise TrajectoryError(f"{place}: in this folder is no {FILE_NAME}.")
    if path.exists() or path.suffix == Path(FILE_NAME).suffix:
        return Trajectory.open(path)
    if path.is_absolute() or len(path.parts) > 2:
        raise TrajectoryError(f"{place}: there is no such file or folder, and no repository has such a name.")
    try:
        return Trajectory.open(hf_hub_download(str(place), FILE_NAME, revision=revision, token=token))
    except RemoteEntryNotFoundError as error:
        raise TrajectoryError(f"{place}: this repository has no {FILE_NAME}.") from error


def load_from_trajectory(
    place: str | Path,
    *,
    model: nn.Module | None = None,
    upto: int | None = None,
    device: str = "cpu",
    revision: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """The trained model, from what the run started from and its trajectory; no weights of it are downloaded.

    Args:
        place: repository on the Hub, folder or file with the trajectory.
        model: as it was before the run; by default it is made from what the trajectory says of its origin: a base
            model of the Hub, an adapter and noise, or a configuration and a seed.
        upto: number of steps after which to stop; all by default.
        device: where to make the updates; the bits are those of the run on the same kind of device.
        revision: of the repository with the trajectory.

    Raises:
        TrajectoryError: it is not there, is damaged, names no origin, or one whose weights are not those that the run
            started from.
        OSError: the trajectory or the base cannot be read.
    """
    found = trajectory_of(place, revision=revision, token=token)
    start = starting_model(found, token=token, trust_remote_code=trust_remote_code) if model is None else model
    return replay(start.to(device), found, upto).eval()


def starting_model(found: Trajectory, *, token: str | None = None, trust_remote_code: bool = False) -> nn.Module:
    """The model before the first step.

    Raises:
        TrajectoryError: the trajectory does not say what it is, or what it says makes no sense.
    """
    if not found.header.origin:
        raise TrajectoryError(
            f"{found.path}: it does not say from what the run started (a folder, an adapter added by hand, or a "
            "checkpoint): pass `model`, as it was then. `zoo_hf.from_base` makes models whose origin is recorded."
        )
    try:
        return made_again(found.header.origin, token=token, trust_remote_code=trust_remote_code)
    except AS_THEY_ARE:
        raise
    except Exception as error:  # anything, of an origin that was forged
        raise TrajectoryError(f"{found.path}: what it started from cannot be made: {error}") from error


def push_trajectory(
    trainer: Any,
    repository: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Trajectory",
    trust_remote_code: bool = False,
    **card: Any,
) -> CommitInfo:
    """Publish a run as its trajectory, card and plot, without weights; see `ZOOTrainer.push_trajectory_to_hub`."""
    folder, args = str(trainer.args.output_dir), trainer.args
    found, token, revision = trajectory_of(folder), token or args.hub_token, revision or args.hub_revision
    check_rebuilt(trainer, starting_model(found, token=token, trust_remote_code=trust_remote_code), found)
    api = HfApi(token=token)
    with pushing(repository, folder), tempfile.TemporaryDirectory() as made:
        private = args.hub_private_repo if private is None else private
        name = api.create_repo(repository, private=private, exist_ok=True).repo_id
        if any(file.endswith(WEIGHTS) for file in api.list_repo_files(name, revision=revision)):
            raise ValueError(f"{name} has weights, beside which a trajectory would not be alone: choose another name.")
        trainer.branch = revision
        copy(found.path, made)
        if trainer.processing_class is not None and not found.header.origin["base"]:
            trainer.processing_class.save_pretrained(made)  # else it is that of the base
        plot = Path(folder, PLOT_NAME)
        if plot.exists():
            copy(plot, made)
        model_card(trainer, trajectory_of=name, **card).save(f"{made}/README.md")
        return api.upload_folder(repo_id=name, folder_path=made, revision=revision, commit_message=commit_message)


def check_rebuilt(trainer: Any, start: nn.Module, found: Trajectory) -> None:
    """Raises: TrajectoryError when what others would load is not what was trained, bit for bit."""
    rebuilt = replay(start.to(trainer.args.device), found)
    if weights_hash(rebuilt) != weights_hash(unwrapped(trainer)):
        raise TrajectoryError(
            f"{found.path}: it does not give the model's present weights ({len(found)} steps): they were changed "
            "after the run, or another checkpoint was loaded. Push the weights with `push_to_hub`."
        )
