"""`zoo-hf replay`."""

import argparse
from typing import Any

from transformers import AutoModelForCausalLM

from ..hub import load_from_trajectory
from ..trajectory import FILE_NAME


def add_replay(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """`zoo-hf replay`."""
    parser = commands.add_parser(
        "replay",
        help="make the trained weights from the starting ones and a trajectory",
        description="Makes the updates of a run again, without data and without a forward pass, and saves the model.",
    )
    parser.add_argument("trajectory", help=f"a run's {FILE_NAME}, the folder it is in, or a repository of the Hub")
    parser.add_argument("output", help="folder to save the model in")
    parser.add_argument(
        "--model",
        help="folder or name on the Hub of the causal language model the run started from; by default what the "
        "trajectory says",
    )
    parser.add_argument("--revision", help="branch, tag or commit of the repository with the trajectory")
    parser.add_argument("--upto", type=int, help="stop after this number of steps; all by default")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the base model")
    parser.set_defaults(run=run_replay)


def run_replay(options: argparse.Namespace) -> None:
    """Replay and save."""
    trust = options.trust_remote_code
    given = options.model and AutoModelForCausalLM.from_pretrained(options.model, trust_remote_code=trust)
    model: Any = load_from_trajectory(
        options.trajectory, model=given, upto=options.upto, revision=options.revision, trust_remote_code=trust
    )
    model.save_pretrained(options.output)
    print(f"The run is made again: {options.output}")
