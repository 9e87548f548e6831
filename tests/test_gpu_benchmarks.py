"""The GPU's benchmarks run, with tiny sizes and without a GPU; their figures need one."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch


ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
TABLES = ("passes", "linear", "crossing", "head_loss", "scans", "small", "100M", "1B", "context")


@pytest.fixture
def modules(monkeypatch):
    """The benchmark's own modules can be imported."""
    for folder in (ROOT / "benchmarks", ROOT / "benchmarks" / "gpu"):
        monkeypatch.syspath_prepend(folder)


def benchmarks(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "benchmarks/gpu", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_every_part_runs_with_tiny_sizes_and_its_tables_have_a_place_on_the_page():
    results = {path: path.read_bytes() for path in (ROOT / "benchmarks" / "results").iterdir()}
    done = benchmarks("--try")
    assert not done.returncode, done.stderr
    written = re.findall(r"^written: .*gpu_(\w+)\.json, \.png, kernels\.md$", done.stdout, flags=re.M)
    assert tuple(written) == TABLES
    shown = re.findall(r"^(\w+)\n\| device +\|", done.stdout, flags=re.M)
    assert tuple(shown) == TABLES
    for column in ("share of copy", "rank 1 and its noise", "EGGROLL's share", "floor / zoo", "bptt GB", "asked"):
        assert f"| {column} " in done.stdout
    assert {path: path.read_bytes() for path in (ROOT / "benchmarks" / "results").iterdir()} == results
    assert (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8") == PAGE


def test_without_a_gpu_nothing_is_measured():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = benchmarks("--part", "linear")
    assert done.returncode == 2
    assert "there is none here" in done.stderr


@pytest.mark.parametrize("name", TABLES)
def test_the_page_says_what_is_unmeasured(name):
    inside = re.search(rf"<!-- gpu_{name} -->\n(.*?)<!-- /gpu_{name} -->", PAGE, flags=re.S).group(1)
    measured = (ROOT / "benchmarks" / "results" / f"gpu_{name}.json").exists()
    assert (inside == "Unmeasured: no GPU was at hand.\n") != measured


def test_full_rank_overtakes_where_the_curves_meet(modules):
    from linear import APART, ONE_PRODUCT, RANK_1, overtaken

    def curve(*rank_1: float) -> list[dict]:
        rows = zip((16, 64, 1024), rank_1, strict=True)
        return [{"rows a member": k, ONE_PRODUCT: 0.5, APART: 0.4, RANK_1: share} for k, share in rows]

    assert overtaken(curve(0.9, 0.7, 0.3), RANK_1) == "from 256"  # halfway from 64 to 1024 in the logarithm
    assert overtaken(curve(0.9, 0.5, 0.3), RANK_1) == "from 64"
    assert overtaken(curve(0.9, 0.8, 0.6), RANK_1) == "not up to 1,024"
    assert overtaken(curve(0.4, 0.8, 0.6), RANK_1) == "from 16 or fewer"


class Clock:
    """A GPU's events: a run advances `now`, in milliseconds, by what it takes."""

    now = 0.0

    def __init__(self, enable_timing: bool):
        assert enable_timing
        self.at = None

    def record(self) -> None:
        self.at = Clock.now

    def synchronize(self) -> None:
        assert self.at is not None

    def elapsed_time(self, end: "Clock") -> float:
        return end.at - self.at


def test_times_are_medians_without_compiling_and_a_long_run_is_timed_once(modules, monkeypatch):
    import timing

    monkeypatch.setattr(timing, "DEVICE", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "Event", Clock)
    taken = {"short": iter([99e3, 5.0, 3.0, 4.0]), "long": iter([99e3, 20e3])}

    def run(name: str) -> None:
        Clock.now += next(taken[name])

    times = timing.milliseconds({name: lambda name=name: run(name) for name in taken}, rounds=3)
    assert times == {"short": 4.0, "long": 20e3}
    assert not any([*values] for values in taken.values()), "each was run as often as it should be"


def test_the_most_memory_is_that_of_the_run_alone(modules, monkeypatch):
    import timing

    held = {"now": 5, "most": 7}
    monkeypatch.setattr(timing, "DEVICE", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: held.update(most=held["now"]))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: held["most"] * 10**9)
    assert timing.with_peak(lambda: held.update(most=6)) == (None, 6.0)
    assert timing.with_peak(lambda: "done") == ("done", 5.0)


def test_what_does_not_fit_says_so_and_leaves_no_gradients(modules):
    from steps import DOES_NOT_FIT, Steps, backpropagation

    from zoo_hf import RNNConfig, RNNForCausalLM

    steps = Steps(RNNForCausalLM, RNNConfig(hidden_size=4), 1, batch=1, tokens=2)

    def torn() -> None:
        steps.loss().backward()
        raise torch.OutOfMemoryError("CUDA out of memory.")

    steps.bptt = torn
    assert backpropagation(steps, rounds=2) == (DOES_NOT_FIT, DOES_NOT_FIT)
    assert all(parameter.grad is None for parameter in steps.parameters.values())


def test_a_warm_up_has_a_pair_or_a_full_forward_pass_of_members(modules):
    from steps import Steps

    from zoo_hf import RNNConfig, RNNForCausalLM

    taken = []
    for together in (1, 2, 8):
        steps = Steps(RNNForCausalLM, RNNConfig(hidden_size=4), together, batch=1, tokens=2)
        steps.zoo = taken.append
        steps.warm_up(96)
        steps.warm_up(3)
    assert taken == [1, 1, 1, 1, 4, 3]


def test_a_table_is_written_with_its_machine_and_into_pages_that_have_a_place(modules, tmp_path):
    from report import write_results

    page, other = tmp_path / "page.md", tmp_path / "other.md"
    page.write_text("Text.\n\n<!-- gpu_x -->\nUnmeasured.\n<!-- /gpu_x -->\n")
    other.write_text("Text.\n")
    machine = {"device": "a GPU", "torch": "2.11"}
    write_results("gpu_x", [{"n": 1}], lambda axes, rows: None, machine, folder=tmp_path / "r", pages=[page, other])
    assert page.read_text() == "Text.\n\n<!-- gpu_x -->\n| n |\n|---|\n| 1 |\n<!-- /gpu_x -->\n"
    assert other.read_text() == "Text.\n"
    assert json.loads((tmp_path / "r" / "gpu_x.json").read_text()) == {"machine": machine, "rows": [{"n": 1}]}
    assert (tmp_path / "r" / "gpu_x.png").stat().st_size > 1000
