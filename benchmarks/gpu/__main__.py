"""Everything that is measured on one GPU, in parts of at most eight minutes.

    python benchmarks/gpu                      # all parts, one after the other
    python benchmarks/gpu --part linear        # one of them
    python benchmarks/gpu --try                # every part with tiny sizes, on any device and on the terminal alone

Times are medians by the GPU's own clock, of one run where a run takes more than ten seconds, after one that warms up.
Each part writes `benchmarks/results/gpu_<part>_<device>.json` and a plot.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path


sys.path.append(str(Path(__file__).parent.parent))

import context
import linear
import passes
import steps
import torch
from report import save_results, table

from zoo_hf import RNNConfig


PARTS: dict[str, Callable[[], list[dict]]] = {
    "passes": passes.measure,
    "linear": linear.measure,
    "small": lambda: [row for name in ("100k", "1M", "10M") for row in steps.measure(name)],
    "100M": lambda: steps.measure("100M", rounds=3),
    "1.1B": lambda: steps.measure("1.1B", rounds=3),
    "context": context.measure,
}


def tiny() -> dict[str, Callable[[], list[dict]]]:
    """The parts as they are, on sizes that a CPU can do."""
    config = RNNConfig(hidden_size=16, num_heads=4, chunk_length=8)
    return {
        "passes": lambda: passes.measure(1000, rounds=1),
        "linear": lambda: linear.measure(128, (16, 32), rounds=1),
        "small": lambda: [tiny_step(config, together=4)],
        "100M": lambda: [tiny_step(config, together=1)],
        "1.1B": lambda: [tiny_step(config, together=1)],
        "context": lambda: context.measure(config, (8, 32)),
    }


def tiny_step(config: RNNConfig, together: int) -> dict:
    run = steps.Steps(config, directions=2, together=together, batch=4, tokens=6)
    run.zoo()
    seconds, memory = steps.backpropagation(run, rounds=1)
    return {"floor flops": run.floor_flops, "bptt s": seconds, "bptt GB": memory}


def plot(axes, rows: list[dict]) -> None:
    """The columns that are shares, or else times, as bars."""
    names = [name for name in rows[0] if "share" in name or " / " in name or "rank" in name] or ["zoo s"]
    labels = [" ".join(str(value) for value in list(row.values())[:2]) for row in rows]
    for place, name in enumerate(names):
        positions = [number + place / (len(names) + 1) for number in range(len(rows))]
        axes.bar(positions, [row[name] for row in rows], width=1 / (len(names) + 1), label=name)
    axes.set_xticks(range(len(rows)), labels, rotation=45, ha="right", fontsize=7)
    axes.legend(fontsize=7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, help="All of them by default.")
    parser.add_argument("--try", action="store_true", dest="tiny", help="With tiny sizes; nothing is written.")
    options = parser.parse_args()
    if not options.tiny and not torch.cuda.is_available():
        parser.error("these are measurements of a GPU, and there is none here; --try shows that they run")
    parts = tiny() if options.tiny else PARTS
    for name in [options.part] if options.part else parts:
        rows = parts[name]()
        print(f"{name}\n{table(rows)}\n", flush=True)
        if not options.tiny:
            save_results(f"gpu_{name}", rows, plot)


if __name__ == "__main__":
    main()
