"""`zoo-hf trajectory info` and `zoo-hf trajectory plot`."""

import argparse
from pathlib import Path

import torch

from ..callbacks import check_drawing, plot_trajectory
from ..hub import trajectory_of
from ..trajectory import FILE_NAME, Trajectory
from .table import markdown_table


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
    plot.set_defaults(run=run_plot)
    for action in (info, plot):
        action.add_argument("trajectory", help=f"a run's {FILE_NAME}, its folder, or a repository of the Hub")


def run_plot(options: argparse.Namespace) -> None:
    """Draw."""
    check_drawing()
    plot_trajectory(trajectory_of(options.trajectory), options.output)


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
