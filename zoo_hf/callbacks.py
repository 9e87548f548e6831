"""Callbacks of a training run."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .trajectory import Trajectory


PLOT_NAME = "loss.png"  # in the output directory of a run
Curve = tuple[list[float], list[float]]  # forward passes, losses


class DrawingError(ImportError):
    """matplotlib, with which pictures are drawn, is not installed."""


def check_drawing() -> None:
    """Raises: DrawingError when there is no matplotlib."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise DrawingError('Pictures are drawn with matplotlib: pip install "zoo_hf[plot]".') from error


class LossPlotCallback(TrainerCallback):
    """Draws `loss.png` in the output directory: training and validation loss against forward passes.

    The first process draws it when a checkpoint is saved, at the end of training and at evaluations after that.

    Raises:
        DrawingError: at construction, when matplotlib is not installed.
    """

    def __init__(self) -> None:
        check_drawing()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.on_train_end(args, state, control, **kwargs)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if 0 < state.max_steps <= state.global_step:
            self.on_train_end(args, state, control, **kwargs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        curves = loss_curves(state.log_history)
        if curves and state.is_world_process_zero:
            plot_losses(curves, kwargs["model"], Path(str(args.output_dir), PLOT_NAME))


def loss_curves(log_history: list[dict[str, Any]]) -> dict[str, Curve]:
    """The losses that a run has logged, by name: "training", then "validation", or one for each evaluation set.

    An evaluation that was logged without `forward_passes` gets those of its step, interpolated in the training log.
    """
    training = [entry for entry in log_history if "loss" in entry and "forward_passes" in entry]
    steps = [0, *(entry["step"] for entry in training)]
    passes = [0, *(entry["forward_passes"] for entry in training)]
    curves = {"training": (passes[1:], [entry["loss"] for entry in training])} if training else {}
    for entry in log_history:
        for key in entry:
            if key.startswith("eval_") and key.endswith("loss"):
                name = " ".join(["validation", *key.split("_")[1:-1]])
                interpolated = float(np.interp(entry["step"], steps, passes))
                xs, ys = curves.setdefault(name, ([], []))
                xs.append(entry.get("forward_passes", interpolated))
                ys.append(entry[key])
    return curves


def plot_losses(curves: dict[str, Curve], model: PreTrainedModel, path: Path) -> None:
    """Write a picture of `curves` to `path`; a language model's uniform guess, ln(vocabulary), is marked if near."""
    # here, as only this needs matplotlib; Figure without pyplot leaves the reader's backend alone
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    for (name, (passes, losses)), color in zip(curves.items(), COLORS * len(curves), strict=False):
        style = {"linewidth": 1.2, "alpha": 0.75} if name == "training" else {"marker": "o", "markersize": 4.5}
        axes.plot(passes, losses, label=name, color=color, **style)
    is_language_model = type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))
    if is_language_model:
        uniform = math.log(model.config.get_text_config().vocab_size)
        if 0.8 * uniform < max(max(losses) for _, losses in curves.values()):
            axes.axhline(uniform, color="0.45", linestyle="--", linewidth=1, label=f"uniform guess, {uniform:.2f}")
    axes.set_xlabel("forward passes")
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.set_xlim(left=0)
    axes.set_ylabel("loss (nats a token)" if is_language_model else "loss")
    axes.set_title(_title(curves, model), fontsize=11)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def plot_trajectory(trajectory: Trajectory, path: Path) -> None:
    """Write a picture of a run to `path`: loss, spread of the coefficients, and learning rates against steps."""
    from matplotlib.figure import Figure

    found = list(trajectory)
    steps = [step.step for step in found]
    rates = zip(*(step.rates for step in found), strict=True)
    spread = [step.coefficients[step.coefficients.isfinite()].std(correction=0).item() for step in found]
    figure = Figure(figsize=(8, 7), layout="constrained")
    losses, coefficients, learning = figure.subplots(3, sharex=True)
    losses.plot(steps, [step.loss for step in found], color=COLORS[2], linewidth=1)
    coefficients.plot(steps, spread, color=COLORS[1], linewidth=1)
    for color, rate in zip(COLORS[2:], rates, strict=False):
        learning.plot(steps, rate, color=color, linewidth=1)
    labels = "loss", "standard deviation\nof the coefficients", "learning rate"
    for axes, label in zip((losses, coefficients, learning), labels, strict=True):
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    learning.set_xlabel("steps")
    figure.savefig(path, dpi=150)


COLORS = ["#9aa5b1", "#c2410c", "#1d4ed8", "#047857", "#7e22ce"]  # the first is training's


def _title(curves: dict[str, Curve], model: PreTrainedModel) -> str:
    from matplotlib.ticker import EngFormatter

    name, (passes, losses) = list(curves.items())[min(1, len(curves) - 1)]
    short = EngFormatter(places=1)
    network = f"{type(model).__name__}, {EngFormatter(places=0)(model.num_parameters())} weights"
    return f"{network}: {name} loss {losses[-1]:.3f} after {short(passes[-1])} forward passes"
