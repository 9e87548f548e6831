"""Peak memory of a zero-order step over very long contexts: models that run a text in chunks need no more for more.

    python benchmarks/context.py                        # about an hour on two cores
    python benchmarks/context.py --models dnc --tokens 4096 32768

Every figure is the peak resident memory of a fresh process during one step of one direction (batch 1, SGD, float32),
above what the process held before it made the model (the text is there by then), in MB (10⁶ bytes), with freed blocks
given back at once; on a GPU, `torch.cuda.max_memory_allocated`. Chunks are those of the default configuration, 1,024
tokens. Linux only.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time

from memory import reset_peak, resident


LONG, SHORT = (4096, 262_144), (4096, 32_768)
RNN = {"embedding_size": 128, "hidden_size": 256}
LAYERS = {"vocab_size": 256, "hidden_size": 128, "num_hidden_layers": 2}
MODELS = {  # name: (configuration class, its arguments, numbers of tokens)
    "lstm": ("RNNConfig", RNN | {"cell_type": "lstm"}, LONG),
    "lstm, 8 heads": ("RNNConfig", RNN | {"cell_type": "lstm", "num_heads": 8}, SHORT),
    "gru": ("RNNConfig", RNN | {"cell_type": "gru"}, LONG),
    "slstm": ("RNNConfig", RNN | {"cell_type": "slstm"}, SHORT),
    "elman": ("RNNConfig", RNN | {"cell_type": "elman"}, LONG),
    "dnc": ("DNCConfig", {"vocab_size": 256, "hidden_size": 128}, SHORT),
    "rwkv7": ("RWKV7Config", LAYERS, SHORT),
    "mamba2": ("ZooMamba2Config", LAYERS | {"num_heads": 8, "state_size": 32, "n_groups": 1}, LONG),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--tokens", nargs=2, type=int, help="Instead of each model's own two lengths.")
    parser.add_argument("--child", nargs=2, metavar=("MODEL", "TOKENS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.child[0], int(options.child[1]))))
        return

    from report import save_results, table

    rows = []
    for name in options.models:
        short, long = options.tokens or MODELS[name][2]
        small, large = in_a_fresh_process(name, short), in_a_fresh_process(name, long)
        rows.append(
            {
                "model": name,
                "parameters": small["parameters"],
                "tokens": f"{short:,} / {long:,}",
                "peak MB, short": small["peak"],
                "peak MB, long": large["peak"],
                "ratio": large["peak"] / small["peak"],
                "seconds, long": large["seconds"],
            }
        )
        print(rows[-1], flush=True)
    print(table(rows))
    save_results("context", rows, plot)


def in_a_fresh_process(name: str, tokens: int) -> dict[str, float]:
    command = [sys.executable, "-W", "ignore", __file__, "--child", name, str(tokens)]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def measure(name: str, tokens: int) -> dict[str, float]:
    """Peak MB of one step, its seconds, and the number of weights."""
    import torch
    from transformers import AutoModelForCausalLM

    import zoo_hf

    ids = torch.randint(0, 256, (1, tokens))
    before = resident("VmRSS")
    kind, sizes, _ = MODELS[name]
    model = AutoModelForCausalLM.from_config(getattr(zoo_hf, kind)(**sizes))
    args = zoo_hf.ZOOConfig(
        tempfile.mkdtemp(), num_directions=1, optim="sgd", learning_rate=1e-6, use_cpu=not torch.cuda.is_available()
    )
    trainer = zoo_hf.ZOOTrainer(model, args)
    ids = ids.to(args.device)
    trainer.create_optimizer()
    trainer.optimizer = trainer.accelerator.prepare(trainer.optimizer)
    reset_peak()
    start = time.perf_counter()
    trainer.training_step(model, {"input_ids": ids, "labels": ids}, torch.tensor(tokens - 1))
    trainer.optimizer.step()
    figures = {"seconds": time.perf_counter() - start, "parameters": model.num_parameters()}
    if torch.cuda.is_available():
        return figures | {"peak": torch.cuda.max_memory_allocated() / 1e6}
    return figures | {"peak": resident("VmHWM") - before}


def plot(axes, rows: list[dict]) -> None:
    for offset, length in enumerate(("short", "long")):
        places = [i + 0.4 * offset for i in range(len(rows))]
        axes.barh(places, [row[f"peak MB, {length}"] for row in rows], height=0.4, label=f"{length} context")
    axes.set_yticks(range(len(rows)), [f"{row['model']}\n{row['tokens']}" for row in rows], fontsize=8)
    axes.set_xlabel("peak memory of a step, MB")
    axes.legend()
    axes.invert_yaxis()


if __name__ == "__main__":
    main()
