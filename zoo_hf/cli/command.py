"""The command line: which command runs, and what is said of a mistake."""

import argparse
import sys
from collections.abc import Sequence

from huggingface_hub.errors import HFValidationError

from ..callbacks import DrawingError
from ..clm.mistake import Mistake
from ..kernels.choice import BackendError
from ..pushing import UNREACHED, PushError
from ..record import TrajectoryError
from .card import add_card
from .env import add_env
from .evaluate import add_evaluate
from .generate import add_generate
from .plot import add_plot
from .replay import add_replay
from .train import add_train, add_tune
from .trajectory import add_trajectory


MISTAKES: tuple[type[BaseException], ...] = (
    *(BackendError, DrawingError, Mistake, PushError, TrajectoryError),
    *(OSError, HFValidationError, *UNREACHED),
)
COMMANDS = (
    *(add_train, add_tune, add_evaluate, add_generate),
    *(add_plot, add_card, add_replay, add_trajectory, add_env),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with `arguments`, by default those of the command line; 0 when it went well, 2 for a mistake."""
    parser = argparse.ArgumentParser(
        prog="zoo-hf", description="Trains Hugging Face models, recurrent ones above all, without backpropagation."
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    for add in COMMANDS:
        add(commands)
    options, others = parser.parse_known_args(arguments)
    if "others" in options:  # of a command that parses its arguments itself
        options.others = others
    elif others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    try:
        options.run(options)
    except MISTAKES as error:
        print(f"zoo-hf: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0
