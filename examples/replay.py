r"""Makes a trained model again from its starting weights and a record of a few kilobytes.

    python examples/replay.py

Trains a small GRU, throws the weights away, starts from the same seed and repeats the recorded updates: no data is
read and no forward pass run. Weights are compared bit for bit. The command line does the same for any run:
`zoo-hf replay outputs/replay again`. Every argument of a `ZOOConfig` may be given.
"""

import time
from pathlib import Path

import datasets
import torch
from transformers import HfArgumentParser, PrinterCallback, TrainerCallback, default_data_collator, set_seed

from zoo_hf import RNNConfig, RNNForCausalLM, Trajectory, ZOOConfig, ZOOTrainer, replay
from zoo_hf.tasks import byte_tokenizer, python_documentation, token_blocks


JOB = {
    "output_dir": "outputs/replay",
    "max_steps": 200,
    "per_device_train_batch_size": 16,
    "logging_steps": 50,
    "save_strategy": "no",
    "disable_tqdm": True,
    "dataloader_pin_memory": torch.cuda.is_available(),
}
CONFIG = {"cell_type": "gru", "vocab_size": 256, "embedding_size": 32, "hidden_size": 64}


class Lines(TrainerCallback):
    """Prints a line for each loss in the log."""

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            print(f"step {state.global_step:4}: loss {logs['loss']:.3f}", flush=True)


def new_model(seed):
    set_seed(seed)
    return RNNForCausalLM(RNNConfig(**CONFIG))


def main():
    datasets.disable_progress_bars()
    parser = HfArgumentParser(ZOOConfig, description=__doc__)
    parser.set_defaults(**JOB)
    try:
        (args,) = parser.parse_args_into_dataclasses()
        text = token_blocks(python_documentation(), byte_tokenizer(), 32)["train"]
        trainer = ZOOTrainer(new_model(args.seed), args, train_dataset=text, data_collator=default_data_collator)
    except ValueError as error:  # what the user can put right
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Lines)
    start = time.perf_counter()
    trainer.train()
    trained, seconds = trainer.model, time.perf_counter() - start

    trajectory = Trajectory.open(Path(args.output_dir) / "trajectory.zoo")
    start = time.perf_counter()
    again = replay(new_model(args.seed), trajectory).to(trained.device)
    print(f"trained in {seconds:.1f} s, made again in {time.perf_counter() - start:.1f} s")
    equal = all(torch.equal(a, b) for a, b in zip(trained.parameters(), again.parameters(), strict=True))
    weights = sum(p.nbytes for p in trained.parameters())
    print(f"trajectory {trajectory.end:,} bytes, weights {weights:,} bytes; bit for bit equal: {equal}")
    if not equal:
        raise SystemExit("The weights differ: replay needs the same kind of device and the same versions.")


if __name__ == "__main__":
    main()
