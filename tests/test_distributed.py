"""Several processes: two ranks end with the bits of one, and only losses cross between them."""

import os
import subprocess
import sys

import pytest
import torch
from scripts import ranks

from zoo_hf.distributed import share


LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node"],
    # port 0: a free one
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--main_process_port", "0", "--num_processes"],
}


def launch(launcher: str, processes: int, *arguments: str) -> None:
    """Run the script of the cases in several processes; none is left behind."""
    command = [sys.executable, "-m", *LAUNCHERS[launcher], str(processes)]
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
    launch(request.param, 2, str(folder))
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


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


@pytest.mark.filterwarnings(FORKED)
def test_tokens_that_all_ranks_see_are_counted_once(launched):
    assert [rank["logged"]["tokens"] for rank in launched] == [2 * 10 * 8] * 2  # epochs, sequences, tokens of each


@pytest.mark.filterwarnings(FORKED)
@pytest.mark.parametrize(
    ("case", "members"), [("split_pair", 10), ("wide", 10), ("forward", 5), ("accumulated", 8), ("logged", 8)]
)
def test_after_the_start_only_the_members_losses_cross_ranks_whatever_the_models_size(launched, case, members):
    for result in (rank[case] for rank in launched):
        decided, heard = result["heard"][:2], result["heard"][2:]
        assert [name for name, *_ in decided] == ["broadcast"] * 2, "from where the run goes on: its length, and it"
        start = 1 + len(result["weights"])  # a generator's state, and every weight once
        assert [name for name, *_ in heard[:start]] == ["broadcast"] * start
        recorded, agreed = heard[start : start + 2], heard[start + 2]
        assert recorded == [["broadcast", 1, "torch.int64"], ["broadcast", 1, "torch.uint8"]], "no step was recorded"
        assert agreed == ["all_reduce", 2 * 4 * 32, "torch.int64"], "32 bytes for each thing to be equal, of both"
        losses = [["all_reduce", members, "torch.int64"]]
        figure = ["all_gather", 1, "torch.float32"]  # the Trainer's loss, or its count of floating-point operations
        # before the Trainer gathers, ranks make sure that all have come
        logged = [["all_reduce", 1, "torch.int64"], figure, figure] if case == "logged" else []
        *steps, (name, numel, _), last = heard[start + 3 :]
        assert steps == (losses + logged) * result["steps"]
        assert (name, numel) == ("all_gather", 1), "the count once more, when it ends"
        assert last == ["all_reduce", 2 * 4, "torch.int64"], "a hash of the weights, of both"


@pytest.mark.filterwarnings(FORKED)
def test_the_log_says_how_many_bytes_a_step_gave_to_the_other_ranks(launched):
    for entries in (rank["logged"]["bytes"] for rank in launched):
        assert entries == [8 * 2 * 4 + 8] * 6, "a float64 for every member, and once that ranks have come"


@pytest.mark.filterwarnings(FORKED)
@pytest.mark.parametrize("processes", [3, 4, pytest.param(8, marks=pytest.mark.slow)])
def test_any_number_of_ranks_ends_with_the_bits_of_one_process(alone, processes):
    folder, results = alone
    launch("torchrun", processes, str(folder))
    for rank in range(processes):
        found = torch.load(folder / f"rank{rank}.pt")
        assert set(found) == {*ranks.SEVERAL, "resumed"}
        for case, result in found.items():
            assert (result["world_size"], result["steps"]) == (processes, results[case]["steps"])
            for name, weight in results[case]["weights"].items():
                assert torch.equal(weight, result["weights"][name]), (case, name)
