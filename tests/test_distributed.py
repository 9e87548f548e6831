"""Several processes: two ranks end with the bits of one, and only losses cross between them."""

import os
import subprocess
import sys

import pytest
import torch
from scripts import ranks

from zoo_hf.distributed import exchange, share


LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    # port 0: a free one
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"],
}


def launch(launcher: str, *arguments: str) -> None:
    """Run the script of the cases in two processes; none is left behind."""
    command = [sys.executable, "-m", *LAUNCHERS[launcher]]
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
        self.received = torch.zeros(5, dtype=torch.int64)

    def reduce(self, tensor: torch.Tensor, reduction: str) -> torch.Tensor:
        assert reduction == "sum"
        self.sent = tensor
        return tensor + self.received


def test_exchange_returns_every_loss_bit_for_bit_whichever_rank_evaluated_it(rng):
    losses = torch.randn(5, generator=rng, dtype=torch.float64).exp()
    losses[0], losses[1], losses[4] = -0.0, torch.inf, torch.nan
    sender, receiver = Rank(0), Rank(1)
    exchange(losses[share(5, 0, 2)], 5, sender)
    receiver.received = sender.sent
    everyone = exchange(losses[share(5, 1, 2)], 5, receiver)
    assert everyone.dtype == torch.float64
    assert torch.equal(everyone.view(torch.int64), losses.view(torch.int64))
    assert receiver.sent.shape == (5,)
    assert receiver.sent.dtype == torch.int64, "mps, for one, has no float64"


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
    for key in ("steps", "last_loss", "forward_passes", "tokens"):
        assert one[key] == first[key] == second[key]
    assert one["steps"] >= 5
    for name, weight in one["weights"].items():
        assert torch.equal(weight, first["weights"][name]), name
        assert torch.equal(weight, second["weights"][name]), name


@pytest.mark.slow
@pytest.mark.filterwarnings(FORKED)
def test_tokens_that_all_ranks_see_are_counted_once(launched):
    assert [rank["logged"]["tokens"] for rank in launched] == [2 * 10 * 8] * 2  # epochs, sequences, tokens of each


@pytest.mark.slow
@pytest.mark.filterwarnings(FORKED)
@pytest.mark.parametrize(
    ("case", "members"), [("split_pair", 10), ("wide", 10), ("forward", 5), ("accumulated", 8), ("logged", 8)]
)
def test_after_the_start_only_the_members_losses_cross_ranks_whatever_the_models_size(launched, case, members):
    for result in (rank[case] for rank in launched):
        start = 1 + len(result["weights"])  # a generator's state, and every weight once
        assert [name for name, *_ in result["heard"][:start]] == ["broadcast"] * start
        losses = [["all_reduce", members, "torch.int64"]]
        figure = ["all_gather", 1, "torch.float32"]  # the Trainer's loss, or its count of floating-point operations
        logged = [figure] * 2 if case == "logged" else []
        *steps, (name, numel, _) = result["heard"][start:]
        assert steps == (losses + logged) * result["steps"]
        assert (name, numel) == ("all_gather", 1), "the count once more, when it ends"
