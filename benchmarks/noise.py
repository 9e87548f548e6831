"""Speed of the noise: expanded float32 signs and normals a second on one thread, with and without a compiler.

    python benchmarks/noise.py

The plain and the compiled path alternate in one process; beside them `torch.randn` and `Tensor.bernoulli_`, which are
neither sliceable nor the same on every device.
"""

import statistics
import time
from collections.abc import Callable

import torch
from report import save_results, table

from zoo_hf.kernels import use_compiler
from zoo_hf.noise import Direction, entries


COUNT = 1 << 20
ROUNDS = 15


def main() -> None:
    torch.set_num_threads(1)
    direction, buffer = Direction(seed=0, step=0, index=0), torch.empty(COUNT)
    ways: dict[str, Callable[[], object]] = {
        "signs": lambda: entries(direction, "weight", 0, COUNT),
        "signs, compiled": lambda: compiled(lambda: entries(direction, "weight", 0, COUNT)),
        "normals": lambda: entries(direction, "weight", 0, COUNT // 8, distribution="gaussian"),
        "torch.randn": lambda: torch.randn(COUNT, out=buffer),
        "Tensor.bernoulli_": lambda: buffer.bernoulli_(),
    }
    counts = {name: COUNT // 8 if name == "normals" else COUNT for name in ways}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(ROUNDS + 1):  # the first is a warm-up
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if round_:
                seconds[name].append(time.perf_counter() - start)
    rows = [
        {
            "noise": name,
            "10⁹ entries/s a thread": counts[name] / statistics.median(times) / 1e9,
            "slowest round": counts[name] / max(times) / 1e9,
            "fastest round": counts[name] / min(times) / 1e9,
        }
        for name, times in seconds.items()
    ]
    print(table(rows))
    save_results("noise", rows, plot)


def compiled(way: Callable[[], object]) -> None:
    use_compiler()
    way()
    use_compiler(False)


def plot(axes, rows: list[dict]) -> None:
    axes.barh([row["noise"] for row in rows], [row["10⁹ entries/s a thread"] for row in rows])
    axes.set_xlabel("10⁹ float32 entries a second on one thread")
    axes.invert_yaxis()


if __name__ == "__main__":
    main()
