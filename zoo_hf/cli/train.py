"""`zoo-hf train` and `zoo-hf tune`, which have the same arguments."""

import argparse
from typing import Any


TRAIN = """Trains a causal language model on text without backpropagation, and evaluates it.

    zoo-hf train

trains a small LSTM on CPython's own documentation in two minutes; on text and a model of your choice:

    zoo-hf train --train_file notes.txt --do_train --do_eval --output_dir outputs/notes

All arguments may stand in a JSON file instead: `zoo-hf train job.json`.
"""
TUNE = """Looks for the learning rate of a run with the arguments of `zoo-hf train`: makes ten steps with each of some
rates from the same weights, prints the losses, draws them in `learning_rate.png` in the output directory, and says
which rate to set. Nothing is trained.
"""


def add_train(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """`zoo-hf train`."""
    parser = commands.add_parser("train", help="train a language model on text, and evaluate it", add_help=False)
    parser.set_defaults(run=run_train, others=[])


def add_tune(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """`zoo-hf tune`."""
    parser = commands.add_parser("tune", help="find the learning rate of such a run", add_help=False)
    parser.set_defaults(run=run_tune, others=[])


def run_train(options: argparse.Namespace) -> None:
    """As `examples/run_clm.py`."""
    from ..clm.run import run  # here, as `evaluate` takes a second to import, which other commands need not wait for

    run(*parsed(options, TRAIN, "train"))


def run_tune(options: argparse.Namespace) -> None:
    """Search."""
    from ..clm.tuning import tune

    tune(*parsed(options, TUNE, "tune"))


def parsed(options: argparse.Namespace, description: str, command: str) -> Any:
    """The arguments, of the model, of the text and of the run; `--help` ends here."""
    from ..clm.command_line import parse_arguments

    return parse_arguments(options.others, description, f"zoo-hf {command}")
