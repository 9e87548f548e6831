"""Times on a GPU by its own clock, the most memory held, and the ceilings that they are measured against."""

import statistics
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
import torch.nn.functional as F


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LONG = 10.0  # seconds: of what takes longer, one run is timed

T = TypeVar("T")


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


def milliseconds(
    runs: dict[str, Callable[[], object]], rounds: int, warm_ups: Iterable[Callable[[], object]] | None = None
) -> dict[str, float]:
    """Medians of the runs' times, interleaved; of a run that takes longer than `LONG`, its one time.

    Args:
        warm_ups: run before and not timed, to compile what the runs need; by default the runs themselves.
    """
    for warm_up in runs.values() if warm_ups is None else warm_ups:
        warm_up()
    times = {name: [once(run)] for name, run in runs.items()}
    for _ in range(rounds - 1):
        for name, run in runs.items():
            if times[name][0] <= LONG * 1e3:
                times[name].append(once(run))
    medians = {name: statistics.median(values) for name, values in times.items()}
    told = ", ".join(f"{name} {ms:.4g} ms" for name, ms in medians.items())
    print(f"  {told}", flush=True)  # should a part be cut off
    return medians


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


def with_peak(run: Callable[[], T]) -> tuple[T, float]:
    """What a run returns, and the most that torch held on the GPU meanwhile, in GB; 0 without a GPU."""
    if DEVICE.type != "cuda":
        return run(), 0.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    returned = run()
    torch.cuda.synchronize()
    return returned, torch.cuda.max_memory_allocated() / 1e9


def if_it_fits(run: Callable[[], T]) -> T | None:
    """What a run returns; None where the GPU's memory does not suffice."""
    try:
        return run()
    except torch.OutOfMemoryError:
        return None
