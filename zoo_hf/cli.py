"""The `zoo-hf` command."""

import argparse
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from transformers import AutoModelForCausalLM

from .callbacks import plot_trajectory
from .hub import load_from_trajectory, trajectory_of
from .kernels.choice import BackendError
from .models.choices import choices
from .procedure import hardware, versions
from .pushing import UNREACHED
from .record import TrajectoryError
from .trajectory import FILE_NAME, Trajectory


MISTAKES: tuple[type[BaseException], ...] = (BackendError, TrajectoryError, OSError, HFValidationError, *UNREACHED)
SETTINGS = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "WORLD_SIZE", "HF_HUB_OFFLINE")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with `arguments`, by default those of the command line; 0 when it went well, 2 for a mistake."""
    parser = argparse.ArgumentParser(
        prog="zoo-hf", description="Trains Hugging Face models, recurrent ones above all, without backpropagation."
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    env = commands.add_parser(
        "env",
        help="print versions, devices and threads, as a table for a bug report",
        description="Prints versions, devices and threads, as a Markdown table to paste into a bug report.",
    )
    env.set_defaults(run=lambda _: print(markdown_table(environment())))
    add_replay(commands)
    add_trajectory(commands)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except MISTAKES as error:
        print(f"zoo-hf: {error}", file=sys.stderr)
        return 2
    return 0


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


def add_trajectory(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """`zoo-hf trajectory info` and `zoo-hf trajectory plot`."""
    parser = commands.add_parser(
        "trajectory", help="what a trajectory says", description="Reads a trajectory, which has to be whole."
    )
    actions = parser.add_subparsers(required=True, metavar="action")
    info = actions.add_parser("info", help="print what run it is, as a table")
    info.set_defaults(run=lambda options: print(markdown_table(facts(trajectory_of(options.trajectory)))))
    plot = actions.add_parser("plot", help="draw loss, coefficients and learning rate against steps")
    plot.add_argument("--output", type=Path, default=Path("trajectory.png"), help="the picture (trajectory.png)")
    plot.set_defaults(run=lambda options: plot_trajectory(trajectory_of(options.trajectory), options.output))
    for action in (info, plot):
        action.add_argument("trajectory", help=f"a run's {FILE_NAME}, its folder, or a repository of the Hub")


def facts(found: Trajectory) -> dict[str, str]:
    """What a trajectory says of its run."""
    header, steps = found.header, list(found)
    sizes = [torch.Size(described["shape"]).numel() for described in header.parameters.values()]
    rows = {
        "file": f"{found.path}, {found.end:,} bytes",
        "steps": f"{len(found):,}, from {header.first_step:,}",
        "trained": f"{sum(sizes):,} weights in {len(sizes):,} parameters",
        "optimizer": header.optimizer,
        "starting weights": f"{header.started_from}; SHA-256 {header.start}",
        **{name: str(value) for name, value in header.settings.items()},
        "versions": ", ".join(f"{name} {number}" for name, number in header.versions.items()),
    }
    if steps:
        rates = ", ".join(f"{rate:.3g}" for rate in steps[-1].rates)
        left_out = sum(int(step.coefficients.isnan().sum()) for step in steps)
        rows["loss"] = f"{steps[0].loss:.4f} at first, {steps[-1].loss:.4f} at last"
        rows["last learning rates"] = rates
        rows["pairs left out"] = f"{left_out:,} of {len(steps) * header.settings['num_directions']:,}"
    return rows


def environment() -> dict[str, str]:
    """What a bug report needs to know of this machine: versions, devices, threads, settings."""
    return {
        **versions(),
        "platform": platform.platform(),
        "CUDA": torch.version.cuda or "not in this build of torch",
        "hardware": hardware(),
        "cores": str(os.cpu_count()),
        **{f"kernels of {name}": choice for name, choice in choices().items()},
        "threads": f"{torch.get_num_threads()}, between operations {torch.get_num_interop_threads()}",
        **{name: os.environ[name] for name in SETTINGS if name in os.environ},
    }


def markdown_table(rows: dict[str, str]) -> str:
    """Names and values as a Markdown table, its columns aligned."""
    width = max(map(len, rows))
    lines = [f"| {name:<{width}} | {value} |" for name, value in rows.items()]
    return "\n".join([f"| {'':<{width}} | |", f"| {'-' * width} | --- |", *lines])
