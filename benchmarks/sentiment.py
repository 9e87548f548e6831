"""A pretrained language model tuned for sentiment, by forward passes and by backpropagation: accuracy, time, memory.

    python benchmarks/sentiment.py --model_name_or_path MODEL --train_file reviews.csv      # three hours on one core

Runs `examples/finetune_sentiment.py` as it stands, each run in a fresh process, whose peak memory is its own: an
adapter with each seed, then all weights. Backpropagation with AdamW beside them has the same model, data, batches and
loss, and a quarter of the forward passes, three a step. Accuracy is that on the same held-out reviews, with its
standard error √(p (1 − p)/N). Where glibc's allocator gives memory back after every pass, most of the time goes
there: set MALLOC_MMAP_MAX_=0 and MALLOC_TRIM_THRESHOLD_=100000000000.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path


EXAMPLES = Path(__file__).parent.parent / "examples"
RATES = {"lora": 5e-4, "full": 1e-5}  # of backpropagation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--train_file", required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="Of the adapter's runs.")
    parser.add_argument("--steps", nargs=2, type=int, help="Updates: of an adapter, of all weights.")
    parser.add_argument("--held_out", type=int, default=1000)
    parser.add_argument("--backprop", choices=RATES, help=argparse.SUPPRESS)  # in a process of its own
    options, others = parser.parse_known_args()
    source = ["--model_name_or_path", options.model_name_or_path, "--train_file", options.train_file]
    shared = [*source, "--held_out", str(options.held_out), *others]
    if options.backprop:
        backprop(options.backprop, shared)
        return

    from report import save_results, table

    jobs = example().JOB
    steps = dict(zip(jobs, options.steps or [job["max_steps"] for job in jobs.values()], strict=True))
    rows = []
    for method, seeds in (("lora", options.seeds), ("full", [1])):
        passes = 2 * jobs[method]["num_directions"] * steps[method]
        for seed in seeds:
            own = ["--method", method, "--seed", str(seed), "--max_steps", str(steps[method])]
            script = str(EXAMPLES / "finetune_sentiment.py")
            rows.append({"trained": method, "by": "CD-RGE", "seed": seed} | run([script, *own, *shared], passes))
            print(table(rows), flush=True)
        own = ["--backprop", method, "--seed", "1", "--max_steps", str(passes // 12), *shared]
        rows.append({"trained": method, "by": "backpropagation", "seed": 1} | run([__file__, *own], passes // 4))
        print(table(rows), flush=True)
    save_results("sentiment", rows, plot)


def example():
    sys.path.append(str(EXAMPLES))
    import finetune_sentiment

    return finetune_sentiment


def run(arguments: list[str], passes: int) -> dict[str, object]:
    """What a run in a process of its own found."""
    with tempfile.TemporaryDirectory() as folder:
        quiet = ["--output_dir", folder, "--report_to", "none", "--disable_tqdm", "True"]
        subprocess.run([sys.executable, *arguments, *quiet], check=True, stdout=subprocess.DEVNULL)
        found = json.loads((Path(folder) / "sentiment_results.json").read_text())
    shares = {
        when: f"{found[f'accuracy_{when}']:.3f} ± {found[f'standard_error_{when}']:.3f}"
        for when in ("before", "after")
    }
    return {
        **shares,
        "forward passes": passes,
        "minutes": found["minutes"],
        "peak MB": found["peak_memory_mb"],
        "accuracy": found["accuracy_after"],
        "standard error": found["standard_error_after"],
    }


def backprop(method: str, others: list[str]) -> None:
    """The example, with the stock Trainer, gradients and AdamW."""
    from transformers import Trainer

    finetune_sentiment = example()

    class BackpropTrainer(Trainer):
        def __init__(self, model, args, data_collator, compute_objective, **data):
            args.learning_rate, args.optim = RATES[method], "adamw_torch"
            super().__init__(model, args, data_collator, **data)

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return finetune_sentiment.loss(model, inputs)

    finetune_sentiment.ZOOTrainer = BackpropTrainer
    sys.argv = ["finetune_sentiment.py", "--method", method, *others]
    finetune_sentiment.main()


def plot(axes, rows: list[dict]) -> None:
    names = [f"{row['trained']}, {row['by']}\nseed {row['seed']}" for row in rows]
    colours = ["C0" if row["by"] == "CD-RGE" else "C1" for row in rows]
    errors = [row["standard error"] for row in rows]
    axes.bar(names, [row["accuracy"] for row in rows], yerr=errors, color=colours, capsize=4)
    axes.axhline(float(rows[0]["before"].split()[0]), color="grey", linestyle=":")
    axes.set_ylabel("accuracy on held-out reviews; dotted: before")
    axes.tick_params(axis="x", labelsize=7)
    axes.set_ylim(0.5, 1)


if __name__ == "__main__":
    main()
