"""Ctrl-C and SIGTERM: the forward pass that runs is finished, no step is half made, and the signal is passed on."""

import logging
import signal
import threading
from types import FrameType, TracebackType
from typing import Any


logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A rank of this run was asked to stop; θ is what it was before the step."""


class Signals:
    """Inside the block a first Ctrl-C or SIGTERM is only noted; a second one acts at once; after it, it is passed on.

    Attributes:
        received: the signal, or None.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.originals: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():  # only there may handlers be set
            # one that is ignored stays so, and one whose handler is not Python's could not be put back
            heard = [number for number in SIGNALS if signal.getsignal(number) not in (signal.SIG_IGN, None)]
            self.originals = {number: signal.signal(number, self._note) for number in heard}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._put_back()
        if self.received is not None and kind in (None, Interrupted):  # what has failed before it is said instead
            signal.raise_signal(self.received)  # so that the process ends as it would have without us

    def check(self) -> None:
        """Raises: Interrupted when a signal was received."""
        if self.received is not None:
            raise Interrupted

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._put_back()
        logger.warning(
            f"{signal.Signals(number).name}: the run stops after this forward pass, and saves a checkpoint if no "
            "other rank has failed. A second signal stops it at once."
        )

    def _put_back(self) -> None:
        for number, original in self.originals.items():
            signal.signal(number, original)
        self.originals = {}
