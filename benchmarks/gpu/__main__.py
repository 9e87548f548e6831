"""Everything that is measured on one GPU, in parts of at most eight minutes.

    python benchmarks/gpu                      # all parts, one after the other
    python benchmarks/gpu --part linear        # one of them
    python benchmarks/gpu --try                # every part with tiny sizes, on any device; nothing is kept

Times are medians by the GPU's own clock, of one run where a run takes more than ten seconds, after a run that compiles
and is not timed. Each table is printed, written to `benchmarks/results/gpu_<table>.json` with a plot, and put into
docs/kernels.md. Without a GPU `--try` runs the kernels in Triton's interpreter, where there is one.
"""

import argparse
import gc
import os
import platform
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch


sys.path.extend(str(folder) for folder in Path(__file__).resolve().parents[1:3])  # the benchmarks', and zoo_hf's
if "--try" in sys.argv and not torch.cuda.is_available() and find_spec("triton"):
    os.environ.update(TRITON_INTERPRET="1", ZOO_HF_KERNELS="triton")  # before kernels are defined

import context
import head_loss
import linear
import passes
import scans
import steps
from report import PAGES, RESULTS, ROOT, table, write_results

from zoo_hf import RNNConfig


Tables = dict[str, list[dict]]

PARTS: dict[str, Callable[[], Tables]] = {
    "passes": lambda: {"passes": passes.measure()},
    "linear": linear.measure,
    "head_loss": lambda: {"head_loss": head_loss.measure()},
    "scans": lambda: {"scans": scans.measure()},
    "small": lambda: {"small": steps.measure({name: steps.CASES[name] for name in ("100k", "1M", "10M")})},
    "100M": lambda: {"100M": steps.measure({"100M": steps.CASES["100M"]}, rounds=3)},
    "1B": lambda: {"1B": steps.measure({"1.1B": steps.CASES["1.1B"]}, rounds=3)},
    "context": lambda: {"context": context.measure()},
}


def tiny() -> dict[str, Callable[[], Tables]]:
    """The parts as they are, on sizes that a CPU can do."""
    config = RNNConfig(vocab_size=20, embedding_size=8, hidden_size=8, num_heads=2, chunk_length=4)
    one = steps.Case(config, 1, {1: 1.0, 2: 1.0}, "nothing", batch=2, tokens=3)
    together = one._replace(together=3, paper={2: 1.0})
    shape = scans.Shape(width=16, layers=1, head=8, members=2, batch=1, tokens=3, directions=1)
    return {
        "passes": lambda: {"passes": passes.measure(1000, rounds=1)},
        "linear": lambda: linear.measure(64, (16, 32), asked_at=32, rounds=1),
        "head_loss": lambda: {"head_loss": head_loss.measure((40,), 16, members=2, rows=3, rounds=2, size=64)},
        "scans": lambda: {"scans": scans.measure(shape, rounds=1, size=64)},
        "small": lambda: {"small": steps.measure({"tiny": together}, rounds=1, size=64)},
        "100M": lambda: {"100M": steps.measure({"tiny": one}, rounds=1, size=64)},
        "1B": lambda: {"1B": steps.measure({"tiny": one}, rounds=1, size=64)},
        "context": lambda: {"context": context.measure(config, (4, 6))},
    }


def plot(axes, rows: list[dict]) -> None:
    """The columns that are ratios as bars, or else all numbers."""
    numbers = [name for name, value in rows[0].items() if isinstance(value, float)]
    names = [name for name in numbers if "share" in name or " / " in name] or numbers
    labels = [" ".join(str(value) for value in list(row.values())[1:3]) for row in rows]
    for place, name in enumerate(names):
        positions = [number + place / (len(names) + 1) for number in range(len(rows))]
        heights = [row[name] if isinstance(row[name], float) else 0.0 for row in rows]  # what did not fit has no bar
        axes.bar(positions, heights, width=1 / (len(names) + 1), label=name)
    axes.set_xticks(range(len(rows)), labels, rotation=45, ha="right", fontsize=7)
    axes.legend(fontsize=7)


def about() -> dict[str, str]:
    """The device, and versions of what its times depend on."""
    names = [name for name in ("torch", "triton", "transformers") if find_spec(name)]
    packages = {name: import_module(name).__version__ for name in names}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {"device": device, "Python": platform.python_version(), "CUDA": str(torch.version.cuda)} | packages


def run(part: Callable[[], Tables], folder: Path, pages: list[Path]) -> None:
    """Measure a part, and print and keep its tables."""
    machine = about()
    for kind, rows in part().items():
        named = [{"device": machine["device"]} | row for row in rows]
        print(f"{kind}\n{table(named)}", flush=True)
        shown = linear.plot if kind == "linear" else plot
        write_results(f"gpu_{kind}", named, shown, machine, folder=folder, pages=pages)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, help="All of them by default.")
    parser.add_argument("--try", action="store_true", dest="tiny", help="With tiny sizes; nothing is kept.")
    options = parser.parse_args()
    if not options.tiny and not torch.cuda.is_available():
        parser.error("these are measurements of a GPU, and there is none here; --try shows that they run")
    parts = tiny() if options.tiny else PARTS
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        place = (Path(folder), copies(Path(folder))) if options.tiny else (RESULTS, PAGES)
        for name in [options.part] if options.part else parts:
            try:
                run(parts[name], *place)
            except Exception:  # whatever it is, the other parts are measured
                traceback.print_exc()
                failed.append(name)
            gc.collect()
            torch.cuda.empty_cache()
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def copies(folder: Path) -> list[Path]:
    """Of the page that has places for the tables."""
    return [Path(shutil.copy(ROOT / "docs" / "kernels.md", folder))]


if __name__ == "__main__":
    main()
