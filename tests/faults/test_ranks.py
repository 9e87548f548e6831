"""A rank that fails ends the run on all ranks, soon and by name, and no finished step is lost."""

import os
import re
import shutil
import subprocess
import sys
import time

import pytest
import torch
from scripts import failing

from zoo_hf import Trajectory
from zoo_hf.distributed import ASKING, PATIENCE


# gloo takes the address of the host's name otherwise, which both namespaces share
OVER_THE_CABLE = {"GLOO_SOCKET_IFNAME": "cable", "TP_SOCKET_IFNAME": "cable"}
LAUNCHER = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run"]


def launched(how, folder, *options, processes=2, inside=(), **variables):
    """A launcher of some ranks."""
    options = options or ("--standalone",)
    command = [*inside, *LAUNCHER, *options, "--nproc_per_node", str(processes), failing.__file__, how, str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    return subprocess.Popen(
        [*command, "--use_cpu"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )


def ended(*launchers):
    """Exit codes and output of launchers, when all have ended."""
    try:
        outputs = [launcher.communicate(timeout=200)[0] for launcher in launchers]
    finally:
        for launcher in launchers:
            launcher.kill()
            launcher.wait()
    return [launcher.returncode for launcher in launchers], outputs


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What a run ends with in which nothing fails."""
    folder = tmp_path_factory.mktemp("ranks")
    (code,), (output,) = ended(launched("nothing", folder))
    assert code == 0, output
    return torch.load(folder / "final.pt")


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ("dies", r"Signal 9 \(SIGKILL\)"),
        ("hangs", r"Rank 2 of 3 has died, hangs or ran out of memory: it did not come within 1\d s"),
        pytest.param(
            "hangs after a step", r"Rank 2 of 3 has died, hangs or ran out of memory", marks=pytest.mark.slow
        ),
        ("out of memory", r"OutOfMemoryError: CUDA out of memory"),
    ],
)
def test_a_rank_that_fails_ends_the_run_within_a_minute_and_is_named(undisturbed, tmp_path, how, named):
    (code,), (output,) = ended(launched(how, tmp_path, processes=3))
    took = time.time() - float(re.search(r"FAILS ([\d.]+)", output)[1])
    assert code != 0
    assert re.search(named, output), output
    assert took < 60
    if not how.startswith("hangs"):
        assert re.search(r"rank\s*: 2 \(local_rank: 2\)", output), "the launcher names it"
    assert len(Trajectory.open(tmp_path / "trajectory.zoo")) == failing.FAILS
    (code,), (output,) = ended(launched("resumed", tmp_path, processes=2))  # one rank less
    assert code == 0, output
    final = torch.load(tmp_path / "final.pt")
    assert all(torch.equal(final[name], weight) for name, weight in undisturbed.items())


def test_the_patience_leaves_time_for_a_launcher_to_kill_a_rank_that_hangs():
    assert PATIENCE + ASKING + 30 < 60  # torchrun gives processes half a minute to end


def test_ranks_that_drift_apart_stop_the_run_which_goes_on_from_where_they_were_equal(undisturbed, tmp_path):
    (code,), (output,) = ended(launched("drifts", tmp_path))
    assert code != 0
    said = re.findall(r"RankError: (Ranks differ in weights .*)", output)[-1]
    assert "Ranks differ in weights at step 6: [1] from rank 0; they were equal after step 4." in said
    assert f"The last good checkpoint is {tmp_path / 'checkpoint-4'}" in said
    assert len(Trajectory.open(tmp_path / "trajectory.zoo")) == 4
    (code,), (output,) = ended(launched("resumed", tmp_path))
    assert code == 0, output
    final = torch.load(tmp_path / "final.pt")
    assert all(torch.equal(final[name], weight) for name, weight in undisturbed.items())


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ("configured otherwise", r"Ranks differ in `num_directions` at step 0: \[1\] from rank 0; at the start"),
        ("other data", r"Ranks differ in the first batch at step 0: \[1\] from rank 0; at the start of the run"),
    ],
)
def test_ranks_that_begin_otherwise_are_refused(tmp_path, how, named):
    (code,), (output,) = ended(launched(how, tmp_path))
    assert code != 0
    assert re.search(named, output), output
    assert len(Trajectory.open(tmp_path / "trajectory.zoo")) == 0


def test_torchrun_restarts_from_the_trajectory(undisturbed, tmp_path):
    # without it a restarted process may be given the address of the one that has died, which no trainer can mend:
    # https://github.com/pytorch/pytorch/issues/135712
    own_store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    options = ("--standalone", "--max-restarts", "1")
    (code,), (output,) = ended(launched("restarted", tmp_path, *options, **own_store))
    assert code == 0, output
    assert not (tmp_path / "trajectory-1.zoo").exists(), "the same file goes on"
    final = torch.load(tmp_path / "final.pt")
    assert all(torch.equal(final[name], weight) for name, weight in undisturbed.items())


def nodes(how, folder, port):
    """Two launchers with a rank each that meet at a port, as on two machines."""
    common = ("--nnodes", "2", "--master_addr", "127.0.0.1", "--master_port", str(port))
    return [launched(how, folder, *common, "--node_rank", str(node), processes=1) for node in (0, 1)]


def test_two_launchers_meet_at_a_port(undisturbed, tmp_path, free_port):
    codes, outputs = ended(*nodes("nothing", tmp_path, free_port))
    assert codes == [0, 0], outputs
    final = torch.load(tmp_path / "final.pt")
    assert all(torch.equal(final[name], weight) for name, weight in undisturbed.items())


@pytest.fixture
def machines():
    """Two network namespaces with a cable between them: how to run a command in each, and the first one's address."""
    names = [f"zoo-{os.getpid()}-{node}" for node in (0, 1)]
    ip = shutil.which("ip")
    if ip is None or subprocess.run([ip, "netns", "add", names[0]], capture_output=True).returncode:
        pytest.skip("network namespaces need `ip` and root")
    cable = [f"zoo{os.getpid() % 10_000}{node}" for node in "ab"]
    try:
        subprocess.run([ip, "netns", "add", names[1]], check=True)
        subprocess.run([ip, "link", "add", cable[0], "type", "veth", "peer", "name", cable[1]], check=True)
        for name, end, address in zip(names, cable, ("10.77.0.1/24", "10.77.0.2/24"), strict=True):
            subprocess.run([ip, "link", "set", end, "netns", name, "name", "cable"], check=True)
            subprocess.run([ip, "-n", name, "address", "add", address, "dev", "cable"], check=True)
            for device in ("lo", "cable"):
                subprocess.run([ip, "-n", name, "link", "set", device, "up"], check=True)
        yield [(ip, "netns", "exec", name) for name in names], "10.77.0.1"
    finally:
        for name in names:
            subprocess.run([ip, "netns", "delete", name], capture_output=True)


def test_two_machines_meet_over_a_cable(undisturbed, tmp_path, machines):
    inside, address = machines
    common = ("--nnodes", "2", "--master_addr", address, "--master_port", "29555")
    launchers = [
        launched("nothing", tmp_path, *common, "--node_rank", str(node), processes=1, inside=how, **OVER_THE_CABLE)
        for node, how in enumerate(inside)
    ]
    codes, outputs = ended(*launchers)
    assert codes == [0, 0], outputs
    final = torch.load(tmp_path / "final.pt")
    assert all(torch.equal(final[name], weight) for name, weight in undisturbed.items())


@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_a_rank_of_another_launcher_that_fails_is_named(tmp_path, free_port, how):
    first, second = nodes(how, tmp_path, free_port)
    output = first.communicate(timeout=200)[0]
    took = time.time()
    second.kill()
    # a process that is stopped keeps the pipe open
    subprocess.run(["pkill", "-9", "-f", f"{failing.__file__} {how} {tmp_path}"], check=False)
    rest = second.communicate()[0]
    assert first.returncode != 0
    assert re.search(r"Rank 1 of 2 has died, hangs or ran out of memory", output), output
    assert took - float(re.search(r"FAILS ([\d.]+)", rest)[1]) < 60


def test_a_signal_to_one_rank_stops_all_with_a_checkpoint_of_the_last_step(undisturbed, tmp_path):
    (code,), (output,) = ended(launched("terminated", tmp_path))
    assert code != 0
    assert "SIGTERM: the run stops after this forward pass, and saves a checkpoint" in output
    assert (tmp_path / f"checkpoint-{failing.FAILS}" / "trainer_state.json").exists()
    (code,), (output,) = ended(launched("resumed", tmp_path))
    assert code == 0, output
    final = torch.load(tmp_path / "final.pt")
    assert all(torch.equal(final[name], weight) for name, weight in undisturbed.items())
