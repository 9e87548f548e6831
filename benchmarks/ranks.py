"""Steps of one and of two ranks on two cores, what crosses between them, and what more ranks would gain.

    python benchmarks/ranks.py                # 5 minutes on two cores

Two processes with a thread each; in turn the first makes a whole step alone, while the other waits, and both make it
together. The second table is no measurement: it adds up, for more ranks, what one rank was measured to need,

    step(W) = ⌈2n/W⌉ · probe + exchange · log₂ W + update,

where a probe is a forward pass with its displacement, an exchange the all-reduce of 2n losses between two ranks, and
the update, which every rank makes for all n directions, is what does not shrink.
"""

import argparse
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from report import save_results, table

from zoo_hf import RNNConfig, RNNForCausalLM, ZOOConfig, ZOOTrainer


SIZES = {  # label: (model, batch size, tokens, directions)
    "0.5M": ({"embedding_size": 128, "hidden_size": 256}, 16, 64, 32),
    "7M": ({"embedding_size": 512, "hidden_size": 1024}, 16, 64, 8),
}
MORE = (1, 8, 64, 1024)  # ranks
DIRECTIONS = (96, 1024)  # of the steps that are simulated


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "RANKS_ROUNDS": str(options.rounds)}
        subprocess.run([*command, __file__, folder], check=True, env=environment)
        measured = torch.load(Path(folder, "rows.pt"))
    rows = [row | {"two / one": row["two ranks ms"] / row["one rank ms"]} for row in measured]
    print(table(rows))
    save_results("ranks", rows, plot)
    simulated = [row for each in rows for directions in DIRECTIONS for row in simulate(each, directions)]
    print(table(simulated))
    save_results("ranks_simulated", simulated, plot_simulated)


def worker(folder: str) -> None:
    """What each of the two processes does; the first saves the rows."""
    rows = [measure(size, int(os.environ["RANKS_ROUNDS"])) for size in SIZES]
    if dist.get_rank() == 0:
        torch.save(rows, Path(folder, "rows.pt"))


def measure(size: str, rounds: int) -> dict[str, object]:
    """Medians over the rounds, milliseconds."""
    shape, rows, tokens, directions = SIZES[size]
    torch.manual_seed(0)
    model = RNNForCausalLM(RNNConfig(**shape))
    args = ZOOConfig(
        tempfile.mkdtemp(), num_directions=directions, probes="serial", optim="sgd", learning_rate=1e-6, use_cpu=True
    )
    trainer = ZOOTrainer(model, args)
    ids = torch.randint(0, 256, (rows, tokens), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids}
    trainer.create_optimizer()
    seconds: dict[str, list[float]] = {name: [] for name in ("one", "two", "exchange", "update", "probe")}
    for round_ in range(rounds + 1):  # the first is a warm-up
        parts = once(trainer, model, batch)
        if round_:
            for name, part in parts.items():
                seconds[name].append(part)
    medians = {name: 1e3 * statistics.median(found) for name, found in seconds.items()}
    return {
        "model": f"LSTM {size}",
        "parameters": model.num_parameters(),
        "directions": directions,
        "one rank ms": medians["one"],
        "two ranks ms": medians["two"],
        "probe ms": medians["probe"],
        "update ms": medians["update"],
        "exchange ms": medians["exchange"],
        "bytes a rank gives in a step": 2 * directions * 8,
    }


def once(trainer: ZOOTrainer, model: torch.nn.Module, batch: dict) -> dict[str, float]:
    """Seconds of a step of the first rank alone, of one of both, and of their parts."""
    rank, members = dist.get_rank(), 2 * trainer.args.num_directions
    dist.barrier()
    found = {"one": 0.0, "update": 0.0, "probe": 0.0}
    trainer.ranks.rank, trainer.ranks.world_size = 0, 1
    if rank == 0:
        probes = timed(lambda: trainer.training_step(model, batch))
        update = timed(trainer.optimizer.step)
        found = {"one": probes + update, "update": update, "probe": probes / members}
    else:
        trainer.losses = []
    dist.barrier()
    trainer.ranks.rank, trainer.ranks.world_size = rank, 2
    trainer.ranks.take_bytes()
    found["two"] = timed(lambda: (trainer.training_step(model, batch), trainer.optimizer.step()))
    assert trainer.ranks.take_bytes() == members * 8
    dist.barrier()
    losses = torch.zeros(members // 2, dtype=torch.float64)
    found["exchange"] = timed(lambda: trainer.ranks.exchange(losses, members))
    return found


def timed(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def simulate(row: dict, directions: int) -> list[dict]:
    """The step of a row with so many directions, on more ranks."""
    update = row["update ms"] / row["directions"] * directions
    found = []
    for ranks in MORE:
        probes = math.ceil(2 * directions / ranks) * row["probe ms"]
        exchange = row["exchange ms"] * math.log2(ranks)
        found.append(
            {
                "model": row["model"],
                "directions": directions,
                "ranks": ranks,
                "probes ms": probes,
                "exchange ms": exchange,
                "update ms": update,
                "step ms": probes + exchange + update,
            }
        )
    alone = found[0]["step ms"]
    return [each | {"speed-up": alone / each["step ms"], "limit": alone / update} for each in found]


def plot(axes, rows: list[dict]) -> None:
    axes.bar(
        [f"{row['model']}\n{ranks}" for row in rows for ranks in ("one rank", "two ranks")],
        [row[name] for row in rows for name in ("one rank ms", "two ranks ms")],
    )
    axes.set_ylabel("milliseconds a step")


def plot_simulated(axes, rows: list[dict]) -> None:
    for model, directions in dict.fromkeys((row["model"], row["directions"]) for row in rows):
        some = [row for row in rows if (row["model"], row["directions"]) == (model, directions)]
        label = f"{model}, n = {directions:,}"
        axes.plot([row["ranks"] for row in some], [row["speed-up"] for row in some], marker="o", label=label)
    axes.plot(MORE, MORE, color="0.6", linestyle="--", label="ideal")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xlabel("ranks")
    axes.set_ylabel("speed-up (simulated)")
    axes.legend()


if __name__ == "__main__":
    if "RANK" in os.environ:
        worker(sys.argv[1])
    else:
        main()
