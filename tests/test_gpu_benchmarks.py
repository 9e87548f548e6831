"""The GPU's benchmarks run, with tiny sizes and without a GPU; their figures need one."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch


ROOT = Path(__file__).parent.parent


def benchmarks(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "benchmarks/gpu", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_every_part_runs_with_tiny_sizes_and_writes_nothing():
    results = set((ROOT / "benchmarks" / "results").iterdir())
    done = benchmarks("--try")
    assert not done.returncode, done.stderr
    for part in ("passes", "linear", "small", "100M", "1.1B", "context"):
        assert f"\n{part}\n|" in f"\n{done.stdout}"
    for column in ("share of copy bandwidth", "full rank, one product", "rank 1", "floor flops", "zoo GB", "bptt GB"):
        assert column in done.stdout
    assert set((ROOT / "benchmarks" / "results").iterdir()) == results


def test_without_a_gpu_nothing_is_measured():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = benchmarks("--part", "linear")
    assert done.returncode == 2
    assert "there is none here" in done.stderr
