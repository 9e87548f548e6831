"""Low-rank directions beside full ones: the loss on held-out text after as many forward passes, with n directions.

    python benchmarks/low_rank.py                    # 20 minutes on two cores
    python benchmarks/low_rank.py --directions 32 --seeds 1 --passes 6400

The small LSTM of `examples/run_clm.py`, on the same text in the same blocks, with AdamW. For every kind of directions
and every n the learning rate is the best of `RATES[n]` for seed 0 on the held-out text; the runs that count have other
seeds, which both kinds share, weights and batches included.
"""

import argparse
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from report import save_results, table
from transformers import default_data_collator, set_seed

from zoo_hf import RNNConfig, RNNForCausalLM, ZOOConfig, ZOOTrainer
from zoo_hf.tasks import byte_tokenizer, python_documentation, token_blocks


KINDS = {"full": "rademacher", "low rank": "low_rank"}
RATES = {
    32: (2e-2, 4e-2, 8e-2, 16e-2),
    128: (4e-2, 8e-2, 16e-2, 32e-2),
    512: (8e-2, 16e-2, 32e-2, 64e-2),
    2048: (16e-2, 32e-2, 64e-2, 128e-2),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directions", nargs="+", type=int, choices=RATES, default=list(RATES))
    parser.add_argument("--passes", type=int, default=24_576, help="Forward passes of a run.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    cells = [(kind, n) for n in options.directions for kind in KINDS]
    with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:
        tried = {
            (*cell, rate): pool.submit(loss, *cell, rate, 0, options.passes)
            for cell in cells
            for rate in RATES[cell[1]]
        }
        rates = {}
        for kind, n in cells:
            losses = {rate: tried[kind, n, rate].result() for rate in RATES[n]}
            rates[kind, n] = min(losses, key=losses.__getitem__)
            print(kind, n, losses, flush=True)
        seeds = range(1, options.seeds + 1)
        runs = {
            cell: [pool.submit(loss, *cell, rates[cell], seed, options.passes) for seed in seeds] for cell in cells
        }
        rows = [row(kind, n, rates[kind, n], [run.result() for run in runs[kind, n]]) for kind, n in cells]
    print(table(rows))
    save_results("low_rank", rows, plot)


def loss(kind: str, n: int, rate: float, seed: int, passes: int) -> float:
    """Held-out loss of one run, nats a byte."""
    torch.set_num_threads(1)
    set_seed(seed)
    blocks = token_blocks(python_documentation(5.0), byte_tokenizer(), 32)
    model = RNNForCausalLM(RNNConfig(vocab_size=256))
    args = ZOOConfig(
        tempfile.mkdtemp(),
        distribution=KINDS[kind],
        num_directions=n,
        smoothing_radius=1e-2,
        learning_rate=rate,
        max_steps=passes // (2 * n),
        per_device_train_batch_size=16,
        per_device_eval_batch_size=128,
        seed=seed,
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    data = {"train_dataset": blocks["train"], "eval_dataset": blocks["validation"]}
    trainer = ZOOTrainer(model, args, data_collator=default_data_collator, **data)
    trainer.train()
    return trainer.evaluate()["eval_loss"]


def row(kind: str, n: int, rate: float, losses: list[float]) -> dict[str, object]:
    """A line of the table."""
    spread = {"lowest": min(losses), "highest": max(losses)}
    return {"directions": kind, "n": n, "learning rate": rate, "held-out loss": statistics.mean(losses)} | spread


def plot(axes, rows: list[dict]) -> None:
    for kind in KINDS:
        some = [row for row in rows if row["directions"] == kind]
        mean = [row["held-out loss"] for row in some]
        below = [row["held-out loss"] - row["lowest"] for row in some]
        above = [row["highest"] - row["held-out loss"] for row in some]
        axes.errorbar([row["n"] for row in some], mean, [below, above], marker="o", capsize=4, label=kind)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("directions an update, n, for as many forward passes")
    axes.set_ylabel("held-out loss, nats a byte")
    axes.legend()


if __name__ == "__main__":
    main()
