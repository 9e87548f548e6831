"""Which learning rate is best for how many directions.

    python benchmarks/learning_rate.py        # about ten minutes on one core

An LSTM of 24,960 weights on 16 × 32 bytes of CPython's documentation a step, for 150 steps with Adam at a constant
rate, from the same weights: the mean loss of the last 30 steps, for every number of directions and every rate.
"""

import tempfile

import torch
from report import save_results, table
from transformers import PrinterCallback, default_data_collator, set_seed

from zoo_hf import RNNConfig, RNNForCausalLM, ZOOConfig, ZOOTrainer
from zoo_hf.tasks import byte_tokenizer, python_documentation, token_blocks


DIRECTIONS = (8, 32, 128)
RATES = (2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2, 8e-2)
STEPS, LAST = 150, 30


def main() -> None:
    torch.set_num_threads(1)
    blocks = token_blocks(python_documentation(), byte_tokenizer(), 32)["train"]
    rows: list[dict] = []
    for n in DIRECTIONS:
        losses = {f"{rate:g}": trained(blocks, n, rate) for rate in RATES}
        best = min(losses, key=losses.__getitem__)
        rows.append(
            {"directions": n, "unset": ZOOConfig("unused", num_directions=n).learning_rate, "best": best} | losses
        )
        print(table(rows), flush=True)
    save_results("learning_rate", rows, plot)


def trained(blocks, n: int, rate: float) -> float:
    set_seed(0)
    args = ZOOConfig(
        tempfile.mkdtemp(),
        max_steps=STEPS,
        num_directions=n,
        learning_rate=rate,
        lr_scheduler_type="constant",
        per_device_train_batch_size=16,
        logging_steps=LAST,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    model = RNNForCausalLM(RNNConfig(vocab_size=256))
    trainer = ZOOTrainer(model, args, default_data_collator, train_dataset=blocks)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-1]


def plot(axes, rows: list[dict]) -> None:
    for row in rows:
        axes.plot(RATES, [row[f"{rate:g}"] for rate in RATES], "o-", label=f"{row['directions']} directions")
    axes.set(xscale="log", xlabel="learning rate", ylabel=f"loss of the last {LAST} of {STEPS} steps")
    axes.legend()


if __name__ == "__main__":
    main()
