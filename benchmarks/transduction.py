"""Copying, reversing, sorting and adding, learned by central differences and by backpropagation through time.

    python benchmarks/transduction.py            # about an hour on one core
    python benchmarks/transduction.py --tasks copy --steps 200

The questions and evaluation of `examples/run_transduction.py`, and its model in the size of the paper's smallest. The
zero-order run's learning rate falls to zero, for its noise undoes what it learns; backpropagation's is constant.
Backpropagation is the stock Trainer with AdamW: for as many steps as the zero-order run with each learning rate, and
with the best of them (by held-out loss) until it has made as many forward passes, three a step. That run is shown
where it had made as many steps, as many forward passes, and run for as many seconds.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from report import save_results, table
from transformers import TrainingArguments

from zoo_hf import ZOOConfig


sys.path.append(str(Path(__file__).parent.parent / "examples"))
from run_transduction import CHECKS, JOB, Arguments, make_trainer  # after the path to it is known


SHOWN = ("copy", "reverse", "sort", "add")
SIZE = {"hidden_size": 240, "num_heads": 12}  # 129,800 weights
RATES = (1e-3, 3e-3, 1e-2)
EVALUATIONS = 20
RUNTIMES = [f"eval_{name}_runtime" for name in CHECKS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=SHOWN, default=SHOWN)
    parser.add_argument("--steps", type=int, default=1000, help="Updates of the zero-order run.")
    parser.add_argument("--num_directions", type=int, default=JOB["num_directions"])
    parser.add_argument("--learning_rate", type=float, default=6e-3, help="Of the zero-order run.")
    parser.add_argument("--backprop_rates", nargs="+", type=float, default=RATES, help="Of backpropagation.")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for task in options.tasks:
        rows += compared(task, options)
        print(table([without_curve(row) for row in rows]), flush=True)
    save_results("transduction", [without_curve(row) for row in rows], lambda axes, _: plot(axes, rows))


def compared(task: str, options: argparse.Namespace) -> list[dict]:
    """A row for the zero-order run, and one for backpropagation after as many steps, forward passes and seconds."""
    passes = 2 * options.num_directions
    own = {"smoothing_radius": JOB["smoothing_radius"], "num_directions": options.num_directions}
    own |= {"learning_rate": options.learning_rate, "lr_scheduler_type": "linear"}
    zero_order = curve(task, options.steps, passes, ZOOConfig, **own)
    trials = {rate: backprop(task, options.steps, rate)[-1]["held_out loss"] for rate in options.backprop_rates}
    rate = min(trials, key=trials.__getitem__)
    theirs = backprop(task, passes * options.steps // 3, rate)
    last, told = zero_order[-1], {"task": task, "training": "BPTT", "learning rate": rate, "curve": theirs}
    rows = [told | {"training": "CD-RGE", "learning rate": options.learning_rate, "curve": zero_order} | last]
    for unit in ("steps", "forward passes", "seconds"):
        point = next((point for point in theirs if point[unit] >= last[unit]), theirs[-1])
        rows.append(told | {"training": f"BPTT, as many {unit}"} | point)
    return rows


def without_curve(row: dict) -> dict:
    return {name: value for name, value in row.items() if name != "curve"}


def backprop(task: str, steps: int, rate: float) -> list[dict[str, float]]:
    constant = {"learning_rate": rate, "lr_scheduler_type": "constant"}  # a point along it is the end of a shorter run
    return curve(task, steps, 3, TrainingArguments, **constant)


def curve(task: str, steps: int, passes: int, kind: type, **changes: object) -> list[dict[str, float]]:
    """What the model could do along a run, after so many steps, forward passes and seconds of training."""
    args = kind(
        tempfile.mkdtemp(),
        max_steps=steps,
        per_device_train_batch_size=JOB["per_device_train_batch_size"],
        per_device_eval_batch_size=JOB["per_device_eval_batch_size"],
        logging_steps=steps,
        eval_strategy="steps",
        eval_steps=max(1, steps // EVALUATIONS),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        **changes,
    )
    trainer = make_trainer(Arguments(task=task, backprop=kind is TrainingArguments, **SIZE), args)
    runtime = trainer.train().metrics["train_runtime"]
    evaluations = [
        entry for entry in trainer.state.log_history if any(f"eval_{name}_loss" in entry for name in CHECKS)
    ]
    training = runtime - sum(value for entry in evaluations for name, value in entry.items() if name in RUNTIMES)
    points: dict[int, dict[str, float]] = {}
    for entry in evaluations:
        step = entry["step"]
        units = {"steps": step, "forward passes": passes * step, "seconds": training * step / steps}
        for name in CHECKS:
            if f"eval_{name}_loss" in entry:
                units |= {f"{name} loss": entry[f"eval_{name}_loss"]}
                units |= {f"{name} exact match": entry[f"eval_{name}_exact_match"]}
        points[step] = points.get(step, {}) | units
    return list(points.values())


def plot(axes, rows: list[dict]) -> None:
    colours = dict(zip(dict.fromkeys(row["task"] for row in rows), ("C0", "C1", "C2", "C3"), strict=False))
    for row in rows:
        if row["training"] in ("CD-RGE", "BPTT, as many seconds"):
            line = "-" if row["training"] == "CD-RGE" else ":"
            seconds = [point["seconds"] for point in row["curve"]]
            losses = [point["held_out loss"] for point in row["curve"]]
            label = f"{row['task']}, {row['training'].partition(',')[0]}"
            axes.plot(seconds, losses, line, color=colours[row["task"]], label=label)
    axes.set(xlabel="seconds of training on one core", ylabel="held-out loss, nats a token", xscale="log")
    axes.legend(fontsize=8)


if __name__ == "__main__":
    main()
