"""Replaying a run beside running it, and the size of its trajectory beside that of a checkpoint.

    python benchmarks/replay.py                                     # 4 minutes on two cores
    python benchmarks/replay.py --run outputs/lstm-python-docs      # that of a run's folder as well

One step of an LSTM of 7 million weights, 96 directions, a batch of 16 × 64 bytes, SGD: the run and its replay in turn,
in one process. Both ratios are of whole calls, `train()` and `replay()`, hashing and writing included.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from report import save_results, table
from transformers import default_data_collator

from zoo_hf import RNNConfig, RNNForCausalLM, Trajectory, ZOOConfig, ZOOTrainer, replay


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directions", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--run", type=Path, help="Folder of a run with a checkpoint, whose sizes are shown.")
    options = parser.parse_args()
    rows = [measure(options.directions, options.rounds)]
    print(table(rows))
    save_results("replay", rows, plot)
    if options.run:
        rows = [sizes(options.run)]
        print(table(rows))
        save_results("trajectory_size", rows, plot_sizes)


def lstm() -> RNNForCausalLM:
    torch.manual_seed(0)
    return RNNForCausalLM(RNNConfig(vocab_size=256, embedding_size=512, hidden_size=1024))


def measure(directions: int, rounds: int) -> dict[str, object]:
    """Seconds of a step and of its replay."""
    folder = tempfile.mkdtemp()
    args = ZOOConfig(
        folder,
        max_steps=1,
        num_directions=directions,
        per_device_train_batch_size=16,
        optim="sgd",
        learning_rate=1e-4,
        smoothing_radius=1e-3,
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    ids = torch.randint(0, 256, (16, 64), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in ids]
    run, repeated = [], []
    for round_ in range(rounds + 1):  # the first is a warm-up
        trainer = ZOOTrainer(lstm(), args, train_dataset=data, data_collator=default_data_collator)
        seconds = timed(trainer.train)
        model = lstm().to(args.device)
        again = timed(lambda model=model: replay(model, f"{folder}/trajectory.zoo"))
        same = all(torch.equal(a, b) for a, b in zip(trainer.model.parameters(), model.parameters(), strict=True))
        assert same, "replay gives the bits of the run"
        if round_:
            run.append(seconds)
            repeated.append(again)
        print(f"round {round_}/{rounds}: {seconds:.2f} s, replayed in {again:.3f} s", flush=True)
    ratios = [a / b for a, b in zip(run, repeated, strict=True)]
    return {
        "parameters": model.num_parameters(),
        "directions": directions,
        "run s": statistics.median(run),
        "replay s": statistics.median(repeated),
        "run / replay": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
    }


def timed(work) -> float:
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def sizes(run: Path) -> dict[str, object]:
    """Kilobytes of a run's trajectory, its last checkpoint and the weights in it."""
    found = Trajectory.open(run / "trajectory.zoo")
    checkpoint = max(run.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    files = [path for path in checkpoint.iterdir() if path.is_file()]
    return {
        "run": run.name,
        "steps": len(found),
        "directions": found.header.settings["num_directions"],
        "trajectory kB": found.end / 1e3,
        "a step adds, bytes": found.header.step_bytes + 12,
        "checkpoint kB": sum(path.stat().st_size for path in files) / 1e3,
        "weights kB": (checkpoint / "model.safetensors").stat().st_size / 1e3,
    }


def plot(axes, rows: list[dict]) -> None:
    axes.bar(["run", "replay"], [rows[0]["run s"], rows[0]["replay s"]])
    axes.set_ylabel("seconds a step")
    axes.set_yscale("log")


def plot_sizes(axes, rows: list[dict]) -> None:
    names = ["trajectory kB", "checkpoint kB", "weights kB"]
    axes.bar([name.removesuffix(" kB") for name in names], [rows[0][name] for name in names])
    axes.set_ylabel("kB")


if __name__ == "__main__":
    main()
