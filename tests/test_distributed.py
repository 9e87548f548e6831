"""Several processes: two ranks end with the bits of one, and only losses cross between them."""

import os
import socket
import subprocess
import sys

import pytest
import torch
from scripts import ranks

from zoo_hf.distributed import exchange, share


LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port"],
}


def launch(launcher: str, *arguments: str) -> None:
    """Run the script of the cases in two processes; none is left behind."""
    command = [sys.executable, "-m", *LAUNCHERS[launcher]]
    if launcher == "accelerate":
        with socket.socket() as free:
            free.bind(("localhost", 0))
            command.append(str(free.getsockname()[1]))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, ranks.__file__, *arguments, "--use_cpu"], env=environment)
    try:
        assert process.wait(timeout=240) == 0
    finally:
        process.terminate()  # the launcher ends its processes
        process.wait()


# a fork of the test process for the loader's worker, as everywhere on Linux
FORKED = "ignore:This process .* is multi-threaded, use of fork:DeprecationWarning"


@pytest.mark.parametrize("world_size", [1, 2, 3, 8, 13])
@pytest.mark.parametrize("total", [1, 2, 9, 10, 128])
def test_shares_cover_all_members_once_and_differ_by_at_most_one(total, world_size):
    shares = [list(range(total))[share(total, rank, world_size)] for rank in range(world_size)]
    assert [member for each in shares for member in each] == list(range(total))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


class Rank:
    """One of two ranks, whose sum over ranks adds what the other rank has sent."""

    num_processes, device = 2, torch.device("cpu")

    def __init__(self, process_index: int):
        self.process_index = process_index
        self.received = torch.zeros(5, dtype=torch.float64)

    def reduce(self, tensor: torch.Tensor, reduction: str) -> torch.Tensor:
        assert reduction == "sum"
        self.sent = tensor
        return tensor + self.received


def test_exchange_returns_every_loss_bit_for_bit_whichever_rank_evaluated_it(rng):
    losses = torch.randn(5, generator=rng, dtype=torch.float64).exp()
    losses[1], losses[4] = torch.inf, torch.nan
    sender, receiver = Rank(0), Rank(1)
    exchange(losses[share(5, 0, 2)], 5, sender)
    receiver.received = sender.sent
    everyone = exchange(losses[share(5, 1, 2)], 5, receiver)
    assert torch.equal(everyone.nan_to_num(nan=-1.0), losses.nan_to_num(nan=-1.0))
    assert receiver.sent.dtype == torch.float64
    assert receiver.sent.shape == (5,)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process ends with, for every case; "central" leaves its third step's checkpoint for two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    checkpoints = {"save_strategy": "steps", "save_steps": 3}
    results = {case: ranks.train(case, folder, **checkpoints if case == "central" else {}) for case in ranks.CASES}
    return folder, results | {"resumed": results["central"]}


@pytest.fixture(scope="module", params=LAUNCHERS)
def launched(request, alone):
    """What both ranks of one launch end with, for every case."""
    folder, _ = alone
    launch(request.param, str(folder))
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.filterwarnings(FORKED)
@pytest.mark.parametrize("case", [*ranks.CASES, "resumed"])
def test_two_ranks_end_with_the_bits_of_one_process(alone, launched, case):
    _, results = alone
    one, first, second = results[case], launched[0][case], launched[1][case]
    assert (one["world_size"], first["world_size"], second["world_size"]) == (1, 2, 2)
    for key in ("steps", "last_loss", "forward_passes"):
        assert one[key] == first[key] == second[key]
    assert one["steps"] >= 5
    for name, weight in one["weights"].items():
        assert torch.equal(weight, first["weights"][name]), name
        assert torch.equal(weight, second["weights"][name]), name


@pytest.mark.slow
@pytest.mark.filterwarnings(FORKED)
@pytest.mark.parametrize(("case", "members"), [("split_pair", 10), ("wide", 10), ("forward", 5), ("accumulated", 8)])
def test_after_the_start_only_the_members_losses_cross_ranks_whatever_the_models_size(launched, case, members):
    for result in (rank[case] for rank in launched):
        start = 1 + len(result["weights"])  # a generator's state, and every weight once
        assert [name for name, *_ in result["heard"][:start]] == ["broadcast"] * start
        steps = [["all_reduce", members, "torch.float64"]] * result["steps"]
        figure = ["all_gather", 1, "torch.float32"]  # the Trainer adds up floating-point operations when it ends
        assert result["heard"][start:] == [*steps, figure]
