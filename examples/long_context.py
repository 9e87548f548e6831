r"""Trains on texts of 100,000 tokens at once, in the memory of a thousand.

    python examples/long_context.py

A recurrent model reads a text in chunks and keeps its state alone, and a zero-order step keeps nothing else: memory
does not grow with the context. Backpropagation through time keeps the activations of every token. The script trains a
few steps on contexts of 1,000 and of 100,000 tokens of CPython's documentation, then a step of backpropagation on
1,000 and on 4,000, each in a fresh process, and prints for each run the peak of its memory, above what was held before
training began, seconds a step, and the loss at the first and the last step (a step's batch is one text). It takes
three minutes on one core.
Linux only, as memory is read from /proc; `benchmarks/context.py` measures more models.
"""

import argparse
import multiprocessing
import re
import tempfile
from pathlib import Path

import datasets
import torch
from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed

from zoo_hf import RNNConfig, RNNForCausalLM, ZOOConfig, ZOOTrainer
from zoo_hf.tasks import byte_tokenizer, python_documentation, token_blocks


LONGEST = 100_000  # tokens: blocks are cut from a thousand paragraphs at a time, which hold little more


def resident(name):
    """MB that the process holds (VmRSS), or has held at most (VmHWM)."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.search(rf"{name}:\s+(\d+)", status)[1]) / 1000


def train(kind, tokens, steps, queue):
    """Put peak memory above what was held before, in MB, seconds a step, and the losses of all steps."""
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    set_seed(0)
    text = token_blocks(python_documentation(), byte_tokenizer(), tokens)["train"]
    config = RNNConfig(vocab_size=256, embedding_size=64, hidden_size=128, chunk_length=1000)
    arguments = {"max_steps": steps, "per_device_train_batch_size": 1, "save_strategy": "no", "use_cpu": True}
    arguments |= {"logging_steps": 1, "report_to": "none", "dataloader_pin_memory": False, "disable_tqdm": True}
    own = {"num_directions": 8, "learning_rate": 5e-2, "probes": "serial"} if kind == "zero-order" else {}
    with tempfile.TemporaryDirectory() as folder:
        trainer, args = (ZOOTrainer, ZOOConfig) if own else (Trainer, TrainingArguments)
        made = trainer(RNNForCausalLM(config), args(folder, **arguments, **own), train_dataset=text)
        made.remove_callback(PrinterCallback)
        before = resident("VmRSS")
        seconds = made.train().metrics["train_runtime"] / steps
    losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    queue.put((resident("VmHWM") - before, seconds, losses))


def measured(kind, tokens, steps):
    """What `train` puts, from a process of its own: a forked one would hold the memory of this one."""
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=train, args=(kind, tokens, steps, queue))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{kind} on {tokens:,} tokens ended with exit code {process.exitcode}.")
    return queue.get()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", type=int, default=1000, help="tokens of the short context (1000)")
    parser.add_argument("--long", type=int, default=100_000, help="tokens of the long context (100000)")
    parser.add_argument("--backprop", type=int, default=4000, help="tokens of backpropagation's long context (4000)")
    parser.add_argument("--steps", type=int, default=10, help="updates of a zero-order run (10)")
    options = parser.parse_args()
    for name, value in vars(options).items():
        most = 10_000 if name == "steps" else LONGEST
        if not 1 < value <= most:
            parser.exit(2, f"{parser.prog}: error: --{name} must be from 2 to {most:,}, got {value:,}.\n")
    if not Path("/proc/self/status").exists():
        parser.exit(2, f"{parser.prog}: error: memory is read from /proc, which this system has not: use Linux.\n")
    print(f"{'':15} {'tokens':>8} {'MB':>7} {'s a step':>9} {'loss':>7}")
    runs = [("zero-order", options.short, options.steps), ("zero-order", options.long, options.steps)]
    runs += [("backpropagation", options.short, 1), ("backpropagation", options.backprop, 1)]
    for kind, tokens, steps in runs:
        memory, seconds, losses = measured(kind, tokens, steps)
        fall = f"{losses[0]:.3f} → {losses[-1]:.3f}" if steps > 1 else f"{losses[0]:.3f}"
        print(f"{kind:15} {tokens:8,} {memory:7.1f} {seconds:9.2f}   {fall}", flush=True)


if __name__ == "__main__":
    main()
