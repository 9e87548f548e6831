"""A run that is killed at any moment, and goes on, ends with the bits of one that was left alone."""

import errno
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from faults import victims
from zoo_hf import Trajectory, replay


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


@pytest.mark.parametrize("number", range(8))
def test_killed_and_resumed_it_ends_with_the_bits_of_an_undisturbed_run(undisturbed, tmp_path, number):
    check_a_killed_run(undisturbed, tmp_path, number)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(50))
def test_killed_at_more_moments(undisturbed, tmp_path, number):
    check_a_killed_run(undisturbed, tmp_path, number)


def check_a_killed_run(undisturbed, tmp_path, number):
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


def said_by(folder, code, *arguments):
    """Exit code and error output of a process that runs some Python after `from faults.victims import *`."""
    program = "import sys; sys.path[:0] = [sys.argv[1]]\nfrom faults.victims import *\n" + code
    command = [victims.PYTHON, "-W", "ignore", "-c", program, str(Path(__file__).parents[1]), str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stderr


def test_a_full_disk_ends_the_run_with_a_clear_error_and_no_finished_step_is_lost(undisturbed, tmp_path):
    folder, _ = undisturbed
    room = Trajectory.open(folder / "trajectory.zoo").end - 200  # in the midst of a step's record
    limit = "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); import resource\n"
    limit += f"resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, -1))\n"
    code, said = said_by(tmp_path, limit + "run(Path(sys.argv[2]), save_strategy='no')")
    assert code == 1
    steps = len(Trajectory.open(tmp_path / "trajectory.zoo"))
    assert 0 < steps < victims.STEPS
    assert f"step {steps} could not be recorded and was not made (File too large)" in said
    assert victims.ended(victims.forked(lambda: victims.run(tmp_path))) == 0
    assert final(tmp_path)[2] == final(folder)[2]


@pytest.fixture
def mounted(tmp_path):
    """`mounted(options)`: a file system in memory, with these options from now on."""
    folder = tmp_path / "mounted"
    folder.mkdir()

    def mount(options):
        how = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
        if subprocess.run(how, capture_output=True).returncode:
            pytest.skip("nothing can be mounted here")
        return folder

    yield mount
    subprocess.run(["umount", str(folder)], capture_output=True)


def test_a_disk_that_is_full_loses_no_finished_step(tmp_path, mounted):
    folder = mounted("size=8k")  # the folder's records would be eleven
    code, said = said_by(folder, "run(Path(sys.argv[2]), save_strategy='no', num_directions=256)")
    assert code == 1
    steps = len(Trajectory.open(folder / "trajectory.zoo"))
    assert 0 < steps < victims.STEPS
    assert f"step {steps} could not be recorded and was not made ({os.strerror(errno.ENOSPC)})" in said
    mounted("remount,size=10m")
    for place in (folder, tmp_path / "whole"):
        assert victims.ended(victims.forked(lambda place=place: victims.run(place, num_directions=256))) == 0
    assert final(folder)[2] == final(tmp_path / "whole")[2]


def test_a_read_only_folder_refuses_the_run_before_its_first_step(mounted):
    code, said = said_by(mounted("ro"), "run(Path(sys.argv[2]))")
    assert code == 1
    assert "trajectory.zoo" in said
    assert os.strerror(errno.EROFS) in said


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, -signal.SIGINT)])
def test_a_signal_leaves_a_checkpoint_of_the_last_step_and_the_usual_exit_code(tmp_path, number, code):
    waits = "import threading\nthreading.Thread(target=lambda: print_when_there(sys.argv[2]), daemon=True).start()\n"
    # torch imports tabulate, where there is one, on its way out, and by that CPython forgets that Ctrl-C ended it
    program = "import sys; sys.path[:0] = [sys.argv[1]]; sys.modules['tabulate'] = None\n"
    program += "from faults.victims import *\n" + waits
    program += "run(Path(sys.argv[2]), max_steps=100_000, save_strategy='no', logging_strategy='no')"
    command = [victims.PYTHON, "-W", "ignore", "-c", program, str(Path(__file__).parents[1]), str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.stdout.readline() != "STEPS\n":
        pass
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == code
    assert f"{number.name}: the run stops after this forward pass, and saves a checkpoint" in said
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    found = Trajectory.open(tmp_path / "trajectory.zoo")
    assert checkpoint.name == f"checkpoint-{len(found)}"
    again = replay(victims.tiny_lstm(), found)
    for name, weight in load_file(checkpoint / "model.safetensors").items():
        assert torch.equal(weight, again.state_dict()[name]), "θ was not displaced"
