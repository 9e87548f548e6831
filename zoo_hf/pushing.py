"""A trainer on its way to the Hub: its token stays its own, and what goes wrong is said, by when nothing is lost."""

import logging
import re
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitInfo
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled
from transformers import Trainer
from transformers.trainer_utils import HubStrategy


logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    Base = Trainer  # what the mixin is mixed into
else:
    Base = object

# how the client fails, and its library, httpx or httpx2; xet, and a server that is not there; without a token; offline
UNREACHED = (HfHubHTTPError.__mro__[1], ConnectionError, LocalTokenNotFoundError, OfflineModeIsEnabled)
REMEDIES = {  # by the status of the Hub's answer, 0 where there is none
    0: "The Hub was not reached, or has broken off.",
    401: "The token is missing or wrong: `hf auth login`, or set HF_TOKEN or `hub_token`.",
    403: "The token may not write there: take one with the role `write`, or another `hub_model_id`.",
    404: "There is no such repository or branch, or the token may not see it: check `hub_model_id` and `revision`.",
    409: "Somebody else has written at the same time.",
    412: "Somebody else has written at the same time.",
}


class Token(str):
    """A token of the Hub that is itself alone where it is used: in a pickle it is None, in a log a placeholder."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return type(None), ()

    def __copy__(self) -> "Token":
        return self

    def __deepcopy__(self, memo: Any) -> "Token":
        return self

    def __repr__(self) -> str:
        return "<HUB_TOKEN>"


class PushError(RuntimeError):
    """Something was not pushed; the message says why, where it still is, and what to do."""


@contextmanager
def pushing(repository: str, folder: str) -> Iterator[None]:
    """Say what has gone wrong between this machine and the Hub.

    Raises:
        PushError: in place of the client's own errors.
    """
    try:
        yield
    except Exception as error:
        if not of_the_hub(error):
            raise
        raise PushError(told(error, repository, folder)) from error


def of_the_hub(error: BaseException | None) -> bool:
    """Whether an error comes from the way to the Hub; that of an LFS upload is the cause of a RuntimeError."""
    return isinstance(error, UNREACHED) or (type(error) is RuntimeError and of_the_hub(error.__cause__))


def told(error: BaseException, repository: str, folder: str) -> str:
    """What was not pushed, why, where it is, and what to do."""
    status = 0 if of_the_hub(error) else -1
    if isinstance(error, (HfHubHTTPError, LocalTokenNotFoundError)):
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else 401
    why = SECRET.sub("…", " ".join(str(error).split())).rstrip(".") or type(error).__name__
    sentences = [f"{repository} was not pushed: {why}.", REMEDIES.get(status, ""), KEPT.format(folder)]
    return " ".join(filter(None, sentences))


SECRET = re.compile(r"\bhf_\w+|(?<=Bearer )\S+")
KEPT = "Nothing is lost: what was saved is in {}, and a second push completes what the first has begun."


def watch(jobs: list[Any], repository: str, folder: str) -> None:
    """Warn of pushes in the background that fail, as they do."""

    def ended(job: Any) -> None:
        error = None if job.cancelled() else job.exception()
        if error is not None:
            logger.warning(told(error, repository, folder))

    for job in jobs:
        job.add_done_callback(ended)


def copy_files(source: Path, target: Path, checkpoint: Path) -> None:
    """The files of a run's folder but for its weights, and the code that a checkpoint has."""
    for file in [*source.iterdir(), *checkpoint.glob("*.py")]:
        if file.is_file() and not file.name.startswith("_") and file.suffix not in WEIGHTS:
            shutil.copy(file, target)


WEIGHTS = (".safetensors", ".bin", ".pt")


class PushMixin(Base):
    """What a trainer pushes as the stock one does, with errors that say what to do.

    Attributes:
        branch: of the repository that the last push went to; None for the main one.
    """

    branch: str | None = None

    def hide_token(self) -> None:
        """Keep the token out of `training_args.bin`, which is pushed, and out of logs."""
        if self.args.hub_token is not None:
            self.args.hub_token = Token(self.args.hub_token.strip())

    @property
    def _pushed_to(self) -> tuple[str, str]:
        """The repository, and the folder that goes there."""
        folder = str(self.args.output_dir)
        return self.hub_model_id or self.args.hub_model_id or folder, folder

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """Make sure that the repository exists, before any work is lost."""
        with pushing(*self._pushed_to):
            super().init_hf_repo(*args, **kwargs)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> CommitInfo:
        """As the Trainer's: model, tokenizer, card, plot and trajectory.

        Raises:
            PushError: something did not arrive. Nothing is lost, and a second push completes it.
        """
        if self.hub_model_id is None:  # the repository comes first there, and there may be none
            self.save_model(_internal_call=True)
        self.branch = kwargs.get("revision") or self.args.hub_revision
        with pushing(*self._pushed_to):
            pushed = super().push_to_hub(*args, **kwargs)
        if isinstance(pushed, Future):
            watch([pushed], *self._pushed_to)
        return pushed

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """As the Trainer's, of a copy: the run goes on in its folder while what is there is on its way."""
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        before, pushed_to, folder = self._jobs(), self._pushed_to, self.args.output_dir
        staged = tempfile.mkdtemp()
        copy_files(Path(str(folder)), Path(staged), Path(checkpoint_folder))
        try:
            self.args.output_dir = staged
            self.create_model_card()
            super()._push_from_checkpoint(checkpoint_folder)
        finally:
            self.args.output_dir = folder
            jobs = [job for job in self._jobs() if job not in before]
            watch(jobs, *pushed_to)
            if jobs:  # the first is of the copy, and the other of the checkpoint itself
                jobs[0].add_done_callback(lambda _: shutil.rmtree(staged, ignore_errors=True))
            else:
                shutil.rmtree(staged)

    def _jobs(self) -> list[Any]:
        """Pushes in the background, which only the first process has."""
        progress = vars(self).get("push_in_progress")
        return [] if progress is None else list(progress.jobs)
