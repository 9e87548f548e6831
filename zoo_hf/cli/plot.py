"""`zoo-hf plot`: what runs have logged, in one picture."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..callbacks import check_drawing
from ..clm.mistake import Mistake


STATE = "trainer_state.json"
COLORS = ("#1d4ed8", "#c2410c", "#047857", "#7e22ce", "#0e7490", "#a16207", "#be185d", "#4d7c0f")
Entry = dict[str, Any]  # of a log
Points = list[tuple[float, float]]


def add_plot(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """`zoo-hf plot`."""
    parser = commands.add_parser(
        "plot",
        help="draw what runs have logged: loss, spread of the coefficients, time of a step",
        description=f"Draws, from the {STATE} of one run or several, the training loss (thin) and the validation loss "
        "(with points) against forward passes, seconds and tokens, the spread of the coefficients and the time of a "
        "step. Seconds count from the start of training, evaluations included.",
    )
    parser.add_argument("runs", nargs="+", metavar="run", help=f"folder with a {STATE}: a run's, or its checkpoint's")
    parser.add_argument("--output", type=Path, default=Path("runs.png"), help="the picture (runs.png)")
    parser.set_defaults(run=run_plot)


def run_plot(options: argparse.Namespace) -> None:
    """Read and draw."""
    check_drawing()
    draw({name: log_of(name) for name in options.runs}, options.output)
    print(f"The picture is {options.output}")


def log_of(folder: str) -> list[Entry]:
    """The log of a run, with `seconds` that go on where the run was resumed.

    Raises:
        Mistake: there is none.
    """
    path = Path(folder, STATE)
    if not path.is_file():
        raise Mistake(f"{folder}: there is no {STATE}, which every checkpoint has and `trainer.save_state()` writes.")
    try:
        history = json.loads(path.read_text(encoding="utf-8"))["log_history"]
        training = [entry for entry in history if "loss" in entry and "forward_passes" in entry]
    except (ValueError, KeyError, TypeError) as error:
        raise Mistake(f"{path} is not what a trainer has written: {error!r}") from error
    if not training:
        raise Mistake(f"{path}: no training loss of a ZOOTrainer is logged there; see --logging_steps.")
    before = latest = 0.0
    for entry in training:
        if "seconds" in entry:
            if entry["seconds"] < latest:
                before += latest
            latest = entry["seconds"]
            entry["seconds"] = before + latest
    return history


def training_loss(history: list[Entry], axis: str) -> Points:
    """(what stands on the axis, training loss)."""
    return [(entry[axis], entry["loss"]) for entry in history if "loss" in entry and axis in entry]


def validation_loss(history: list[Entry], axis: str) -> Points:
    """(what stands on the axis, validation loss); where an evaluation has it not, interpolated by its step."""
    training = [entry for entry in history if "loss" in entry and axis in entry]
    if not training:
        return []
    steps, values = [0, *(entry["step"] for entry in training)], [0.0, *(entry[axis] for entry in training)]
    found = [entry for entry in history if "eval_loss" in entry]
    return [(float(np.interp(entry["step"], steps, values)), entry["eval_loss"]) for entry in found]


def spreads(history: list[Entry]) -> Points:
    """(forward passes, standard deviation of the coefficients)."""
    found = [entry for entry in history if "coefficient_spread" in entry]
    return [(entry["forward_passes"], entry["coefficient_spread"]) for entry in found]


def step_times(history: list[Entry]) -> Points:
    """(forward passes, milliseconds a step since the entry before, evaluations in between left out)."""
    found, last = [], {"step": 0, "seconds": 0.0}
    evaluating = 0.0
    for entry in history:
        evaluating += entry.get("eval_runtime", 0.0)
        if "loss" in entry and "seconds" in entry:
            seconds = entry["seconds"] - last["seconds"] - evaluating
            found.append((entry["forward_passes"], 1000 * seconds / (entry["step"] - last["step"])))
            last, evaluating = entry, 0.0
    return found


def draw(logs: dict[str, list[Entry]], path: Path) -> None:
    """Five panels, and in the place of a sixth which line is which run's."""
    from matplotlib.figure import Figure  # here, as only this needs it
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(12, 6.5), layout="constrained")
    panels = figure.subplots(2, 3).flatten()
    axes_of_loss = ("forward_passes", "seconds", "tokens")
    others: tuple[Callable[[list[Entry]], Points], ...] = (spreads, step_times)
    for (name, history), color in zip(logs.items(), COLORS * len(logs), strict=False):
        panels[5].plot([], [], color=color, label=name)
        for panel, axis in zip(panels, axes_of_loss, strict=False):
            plot(panel, training_loss(history, axis), color=color, linewidth=0.9, alpha=0.55)
            plot(panel, validation_loss(history, axis), color=color, linewidth=1.6, marker="o", markersize=3.5)
        for panel, points in zip(panels[3:], others, strict=False):
            plot(panel, points(history), color=color, linewidth=1)
    x_labels = ("forward passes", "seconds", "tokens", "forward passes", "forward passes")
    y_labels = ("loss", "loss", "loss", "spread of the coefficients", "milliseconds a step")
    for panel, x, y in zip(panels, x_labels, y_labels, strict=False):
        panel.set(xlabel=x, ylabel=y)
        panel.xaxis.set_major_formatter(EngFormatter())
        panel.set_xlim(left=0)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
        if not panel.lines:
            panel.text(0.5, 0.5, "not in the log", transform=panel.transAxes, ha="center", color="0.45")
    panels[4].set_ylim(bottom=0)
    panels[5].axis("off")
    panels[5].legend(frameon=False, loc="center left", title="thin: training, points: validation")
    figure.savefig(path, dpi=150)


def plot(panel: Any, points: Points, **style: Any) -> None:
    """A line, where there is one."""
    if points:
        panel.plot(*zip(*points, strict=True), **style)
