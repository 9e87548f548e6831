"""The README's job, trained without backpropagation and, for the same seconds, with it.

    python benchmarks/against_bptt.py        # about 9 minutes on one core

The model, text, batches and evaluation of `examples/run_clm.py` without arguments. Backpropagation through time is the
stock Trainer with AdamW, a linear schedule and clipping at 1.0, once for each learning rate; its number of steps is
what fits into the seconds of the zero-order run. A step of it counts as three forward passes.
"""

import argparse
import tempfile
import time

import torch
from datasets import Dataset
from report import save_results, table
from transformers import Trainer, TrainingArguments, default_data_collator, set_seed

from zoo_hf import RNNConfig, RNNForCausalLM, ZOOConfig, ZOOTrainer
from zoo_hf.tasks import byte_tokenizer, python_documentation, token_blocks


BLOCK, BATCH, STEPS, EVALUATIONS = 32, 16, 1500, 15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--learning-rates", nargs="+", type=float, default=[3e-3, 1e-2, 3e-2])
    parser.add_argument("--steps", type=int, default=STEPS, help="Steps of the zero-order run.")
    options = parser.parse_args()
    torch.set_num_threads(1)
    blocks = token_blocks(python_documentation(), byte_tokenizer(), BLOCK)
    args = arguments(ZOOConfig, options.steps, smoothing_radius=1e-2)
    members = 2 * args.num_directions
    rows = [run("CD-RGE, Adam", ZOOTrainer, args, blocks, members)]
    warm_up = run("", Trainer, arguments(TrainingArguments, 200), blocks, 3)
    steps = int(200 * rows[0]["seconds"] / warm_up["seconds"])
    for rate in options.learning_rates:
        args = arguments(TrainingArguments, steps, learning_rate=rate)
        rows.append(run(f"BPTT, Adam {rate:g}", Trainer, args, blocks, 3))
        print(rows[-1]["training"], rows[-1]["validation loss"], flush=True)
    print(table([{name: value for name, value in row.items() if name != "curve"} for row in rows]))
    save_results("against_bptt", rows, plot)
    for split, counted in (("validation", "train"), ("train", "train")):
        alone, pairs = entropies(blocks[counted], blocks[split])
        print(f"{split} text, nats a byte, by counts of the training text: bytes {alone:.2f}, pairs {pairs:.2f}")


def entropies(counted: Dataset, predicted: Dataset) -> tuple[float, float]:
    """Cross-entropy of a text under the frequencies of bytes, and of pairs of bytes, in another."""
    (train, text) = (torch.tensor(blocks["input_ids"][:]).flatten() for blocks in (counted, predicted))
    pairs = torch.bincount(256 * train[:-1] + train[1:], minlength=256**2).view(256, 256) + 0.01
    alone = torch.bincount(train, minlength=256) + 0.01
    following = -(pairs / pairs.sum(1, keepdim=True)).log()[text[:-1], text[1:]].mean()
    return -(alone / alone.sum()).log()[text].mean().item(), following.item()


def arguments(kind: type, steps: int, **changes: float) -> TrainingArguments:
    """Those of `examples/run_clm.py`'s own job."""
    return kind(
        tempfile.mkdtemp(),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=128,
        eval_strategy="steps",
        eval_steps=max(1, steps // EVALUATIONS),
        logging_steps=steps,
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        **changes,
    )


def run(name: str, kind: type, args: TrainingArguments, blocks: dict, passes: int) -> dict[str, object]:
    """Seconds of training, without evaluation, and the validation loss along them."""
    set_seed(args.seed)
    trainer = kind(
        RNNForCausalLM(RNNConfig()),
        args,
        train_dataset=blocks["train"],
        eval_dataset=blocks["validation"],
        data_collator=default_data_collator,
    )
    start = time.perf_counter()
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    seconds = time.perf_counter() - start - sum(entry["eval_runtime"] for entry in history)
    share = seconds / args.max_steps
    return {
        "training": name,
        "seconds": seconds,
        "steps": args.max_steps,
        "forward passes": passes * args.max_steps,
        "validation loss": trainer.evaluate()["eval_loss"],
        "curve": [(entry["step"] * share, entry["eval_loss"]) for entry in history],
    }


def plot(axes, rows: list[dict]) -> None:
    for row in rows:
        axes.plot(*zip(*row["curve"], strict=True), marker=".", label=row["training"])
    axes.set_xlabel("seconds of training on one core")
    axes.set_ylabel("validation loss, nats a byte")
    axes.legend()


if __name__ == "__main__":
    main()
