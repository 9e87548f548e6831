"""Times on a GPU, by its own clock, and what they are measured against."""

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LONG = 10.0  # seconds: of what takes longer, one run is timed


def once(run: Callable[[], object]) -> float:
    """Milliseconds of one run."""
    if DEVICE.type != "cuda":
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def milliseconds(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Medians of the runs' times, interleaved; every run once before, to compile and to warm up."""
    first = {name: once(run) for name, run in runs.items()}
    first = {name: ms if ms > LONG * 1e3 else once(runs[name]) for name, ms in first.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            if first[name] <= LONG * 1e3:
                times[name].append(once(run))
    return {name: statistics.median(values) if values else first[name] for name, values in times.items()}


def copy_bandwidth(numel: int = 1 << 29, rounds: int = 20) -> float:
    """Bytes read and written a second by torch's copy of 2 · numel bytes."""
    source = torch.zeros(numel, dtype=torch.bfloat16, device=DEVICE)
    target = torch.empty_like(source)
    ms = milliseconds({"copy": lambda: target.copy_(source)}, rounds)["copy"]
    return 2 * source.nbytes / ms * 1e3


def product_rate(size: int = 8192, dtype: torch.dtype = torch.bfloat16, rounds: int = 20) -> float:
    """Floating-point operations a second of torch's product of two square matrices."""
    a, b = (torch.randn(size, size, device=DEVICE, dtype=dtype) for _ in range(2))
    ms = milliseconds({"product": lambda: F.linear(a, b)}, rounds)["product"]
    return 2 * size**3 / ms * 1e3


def peak_bytes(run: Callable[[], object]) -> int:
    """The most that torch held on the GPU during a run; 0 without a GPU."""
    if DEVICE.type != "cuda":
        run()
        return 0
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()
