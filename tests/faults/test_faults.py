"""A run that is killed at any moment, and goes on, ends with the bits of one that was left alone."""

import os
import random
import signal
import time

import pytest
import torch
from conftest import weights
from faults import victims

from zoo_hf import Trajectory


pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Weights, records and seconds of a run that was left alone."""
    folder = tmp_path_factory.mktemp("undisturbed")
    start = time.perf_counter()
    assert victims.ended(victims.forked(lambda: victims.run(folder))) == 0
    return folder, time.perf_counter() - start


def final(folder):
    """The weights after the last step, and every record's bytes."""
    saved = torch.load(folder / f"checkpoint-{victims.STEPS}" / "optimizer.pt", weights_only=True)
    from safetensors.torch import load_file

    model = load_file(folder / f"checkpoint-{victims.STEPS}" / "model.safetensors")
    header = Trajectory.open(folder / "trajectory.zoo").header
    return model, saved["state"], [header.pack(step) for step in Trajectory.open(folder / "trajectory.zoo")]


MOMENTS = ("probe", "update", "append", "save", "any")


def kill(folder, moment, draw, seconds):
    """Start or go on with a run and kill it; how it ended."""
    match moment:
        case "any":
            return victims.killed_at_any_time(folder, draw, seconds)
        case "save":
            return victims.killed_in_a_save(folder, draw)
        case "probe":
            return victims.ended(victims.forked(lambda: victims.in_a_probe(folder, draw)))
        case "update":
            return victims.ended(victims.forked(lambda: victims.in_an_update(folder, draw)))
        case "append":
            return victims.ended(victims.forked(lambda: victims.in_an_append(folder, draw)))


@pytest.mark.parametrize(
    "number", [*range(8), *(pytest.param(number, marks=pytest.mark.slow) for number in range(8, 50))]
)
def test_killed_and_resumed_ends_with_the_bits_of_an_undisturbed_run(undisturbed, tmp_path, number):
    folder, seconds = undisturbed
    draw = random.Random(number)
    ends = [kill(tmp_path, MOMENTS[number % 5], draw, seconds)]
    ends += [kill(tmp_path, draw.choice(MOMENTS), draw, seconds) for _ in range(2)]  # and again while it recovers
    assert set(ends) <= {0, -signal.SIGKILL}
    assert victims.ended(victims.forked(lambda: victims.run(tmp_path))) == 0
    (model, optimizer, records), (model_, optimizer_, records_) = final(folder), final(tmp_path)
    assert len(records) == victims.STEPS
    assert records_ == records
    assert all(torch.equal(model_[name], weight) for name, weight in model.items())
    for place, state in optimizer.items():
        assert all(torch.equal(optimizer_[place][name], value) for name, value in state.items())
