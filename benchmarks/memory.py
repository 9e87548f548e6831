"""Peak memory of inference, a zero-order step and a step of backpropagation through time, over context lengths.

    python benchmarks/memory.py                       # 7 M-parameter LSTM, 256 … 16,384 tokens, about 10 minutes
    python benchmarks/memory.py --contexts 256 1024

Every figure is the peak resident memory of a fresh process while it runs, above what it held before it made the model,
in MB (10⁶ bytes); on a GPU, `torch.cuda.max_memory_allocated`. float32, batch 1, four directions, SGD, no momentum;
Adam would add its two moments, twice the weights, to the last two. Inference runs as many forward passes as the
zero-order step, one after the other. Two sets of figures: memory in use, for which the C library is told to give freed
blocks of 64 KiB and more back at once; and "default", what the system sees when it keeps them as it likes, the median
of three processes, as that varies from one to the next (one process beyond 4,096 tokens). Linux only.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path


MODES = ("inference", "zoo", "bptt")
SHAPE = {"embedding_size": 512, "hidden_size": 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", nargs="+", type=int, default=[256, 1024, 4096, 16384])
    parser.add_argument("--child", nargs=2, metavar=("MODE", "CONTEXT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.child[0], int(options.child[1]))))
        return

    from report import save_results, table

    rows = []
    for context in options.contexts:
        rows.append({"context": context} | figures(context))
        print(rows[-1], flush=True)
    print(table(rows))
    save_results("memory", rows, plot)


def figures(context: int) -> dict[str, float]:
    """MB of the weights, of each mode's peak, and what training without backpropagation adds, over the weights."""
    in_use = {mode: in_a_fresh_process(mode, context, MALLOC_MMAP_THRESHOLD_="65536") for mode in MODES}
    default = {
        mode: statistics.median(in_a_fresh_process(mode, context)["peak"] for _ in range(1 if context > 4096 else 3))
        for mode in MODES[:2]
    }
    weights = in_use["zoo"]["weights"]
    return {
        "weights MB": weights,
        **{f"{mode} MB": in_use[mode]["peak"] for mode in MODES},
        "(zoo − inference) / weights": (in_use["zoo"]["peak"] - in_use["inference"]["peak"]) / weights,
        **{f"default {mode} MB": peak for mode, peak in default.items()},
        "default (zoo − inference) / weights": (default["zoo"] - default["inference"]) / weights,
    }


def in_a_fresh_process(mode: str, context: int, **environment: str) -> dict[str, float]:
    command = [sys.executable, "-W", "ignore", __file__, "--child", mode, str(context)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | environment)
    return json.loads(done.stdout.splitlines()[-1])


def measure(mode: str, context: int) -> dict[str, float]:
    """MB at the peak of one step above what was held before the model, and MB of weights."""
    import torch

    from zoo_hf import RNNConfig, RNNForCausalLM, ZOOConfig, ZOOTrainer

    before = resident("VmRSS")
    model = RNNForCausalLM(RNNConfig(**SHAPE))
    args = ZOOConfig(
        tempfile.mkdtemp(), num_directions=4, optim="sgd", learning_rate=1e-6, use_cpu=not torch.cuda.is_available()
    )
    trainer = ZOOTrainer(model, args)
    ids = torch.randint(0, 256, (1, context), device=args.device)
    batch = {"input_ids": ids, "labels": ids}
    trainer.create_optimizer()
    trainer.optimizer = trainer.accelerator.prepare(trainer.optimizer)
    reset_peak()
    if mode == "inference":
        with torch.inference_mode():
            for _ in range(2 * args.num_directions):
                model.eval()(**batch)
    elif mode == "zoo":
        trainer.training_step(model, batch, torch.tensor(context - 1))
        trainer.optimizer.step()
    else:
        model(**batch).loss.backward()
        torch.optim.SGD(model.parameters(), lr=1e-6).step()
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6
    if torch.cuda.is_available():
        return {"peak": torch.cuda.max_memory_allocated() / 1e6, "weights": weights}
    return {"peak": resident("VmHWM") - before, "weights": weights}


def resident(field: str) -> float:
    """A line of /proc/self/status, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024 / 1e6


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def plot(axes, rows: list[dict]) -> None:
    contexts = [row["context"] for row in rows]
    for mode in MODES:
        axes.plot(contexts, [row[f"{mode} MB"] for row in rows], marker="o", label=mode)
    axes.axhline(rows[0]["weights MB"], color="black", linewidth=1, linestyle=":", label="the weights")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("context length, tokens")
    axes.set_ylabel("peak memory of a step, MB")
    axes.legend()


if __name__ == "__main__":
    main()
