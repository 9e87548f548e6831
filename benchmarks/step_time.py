"""Time of a zero-order step beside its floor, a MeZO-style step and a step of backpropagation through time.

    python benchmarks/step_time.py            # all sizes, float32 and bfloat16, about 15 minutes on two cores
    python benchmarks/step_time.py --sizes 0.5M --dtypes float32 --rounds 3

All four run in one process on the same model and batch, in turn (A B C D A B C D …), so that a noisy machine disturbs
them alike, and each after an untimed forward pass, so that all find the same caches and free memory. The table
gives medians, and each step's ratio is taken within its round.

- zoo: `ZOOTrainer.training_step` and its optimizer's step (CD-RGE, Rademacher, SGD): probes, restoration, update.
- floor: the 2n forward passes under `no_grad`, and nothing else.
- mezo: walk +ε, −2ε, +ε through the weights with `torch.randn`, then the update (one seed a direction).
- bptt: one forward and one backward pass and SGD.
"""

import argparse
import statistics
import tempfile
import time

import torch
from report import save_results, table

from zoo_hf import RNNConfig, RNNForCausalLM, ZOOConfig, ZOOTrainer


SIZES = {  # label: (model, batch size, tokens, directions)
    "0.5M": ({"embedding_size": 128, "hidden_size": 256}, 16, 64, 4),
    "7M": ({"embedding_size": 512, "hidden_size": 1024}, 16, 64, 4),
    "50M": ({"embedding_size": 1024, "hidden_size": 2048, "num_layers": 2}, 16, 128, 2),
}
STEPS = ("zoo", "floor", "mezo", "bptt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=15, help="Times each step is timed.")
    options = parser.parse_args()
    rows = [measure(size, dtype, options.rounds) for size in options.sizes for dtype in options.dtypes]
    print(table(rows))
    save_results("step_time", rows, plot)


def measure(size: str, dtype: str, rounds: int) -> dict[str, object]:
    """Medians over the rounds, milliseconds, and ratios to the floor."""
    shape, batch_size, tokens, directions = SIZES[size]
    torch.manual_seed(0)
    model = RNNForCausalLM(RNNConfig(**shape))
    ids = torch.randint(0, 256, (batch_size, tokens))
    batch = {"input_ids": ids, "labels": ids}
    steps = Steps(model, batch, directions, bf16=dtype == "bfloat16")
    seconds: dict[str, list[float]] = {name: [] for name in STEPS}
    for round_ in range(rounds + 1):  # the first is a warm-up
        for name in STEPS:
            steps.settle()
            wait_for_device()
            start = time.perf_counter()
            getattr(steps, name)()
            wait_for_device()
            if round_:
                seconds[name].append(time.perf_counter() - start)
        print(f"{size} {dtype} round {round_}/{rounds}", flush=True)
    ratios = {
        f"{name}/floor": statistics.median(a / b for a, b in zip(seconds[name], seconds["floor"], strict=True))
        for name in ("zoo", "mezo")
    }
    medians = {f"{name} ms": 1e3 * statistics.median(seconds[name]) for name in STEPS}
    spread = {"zoo min–max ms": f"{1e3 * min(seconds['zoo']):.0f}–{1e3 * max(seconds['zoo']):.0f}"}
    about = {"model": f"LSTM {size}", "parameters": model.num_parameters(), "dtype": dtype}
    return about | {"batch": f"{batch_size} × {tokens}", "directions": directions} | ratios | medians | spread


def wait_for_device() -> None:
    """Kernels on a GPU run on after their launch returns."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Steps:
    """The four steps, and one forward pass; bfloat16 is autocast, as `bf16=True` has it, for all of them."""

    def __init__(self, model: RNNForCausalLM, batch: dict, directions: int, *, bf16: bool):
        self.args = ZOOConfig(
            tempfile.mkdtemp(),
            num_directions=directions,
            optim="sgd",
            learning_rate=1e-6,
            bf16=bf16,
            use_cpu=not torch.cuda.is_available(),
        )
        self.trainer = ZOOTrainer(model, self.args)
        self.trainer.create_optimizer()
        # as Trainer.train does; with bf16 this makes every forward pass, of all four steps, run under autocast
        self.model, self.trainer.optimizer = self.trainer.accelerator.prepare(model, self.trainer.optimizer)
        self.batch = {name: value.to(self.args.device) for name, value in batch.items()}
        self.parameters = list(model.parameters())
        self.sgd = torch.optim.SGD(self.parameters, lr=1e-6)

    def loss(self) -> torch.Tensor:
        return self.model(**self.batch).loss

    def zoo(self) -> None:
        predictions = (self.batch["labels"][:, 1:] != -100).sum()  # the Trainer counts them for every update
        self.trainer.training_step(self.model, self.batch, predictions)
        self.trainer.optimizer.step()

    @torch.no_grad()
    def settle(self) -> None:
        self.loss()

    @torch.no_grad()
    def floor(self) -> None:
        for _ in range(2 * self.args.num_directions):
            self.loss()

    @torch.no_grad()
    def mezo(self) -> None:
        radius, n = self.args.smoothing_radius, self.args.num_directions
        for seed in range(n):
            self.walk(seed, radius)
            plus = self.loss()
            self.walk(seed, -2 * radius)
            minus = self.loss()
            self.walk(seed, radius)
            self.walk(seed, -1e-6 * float(plus - minus) / (2 * radius * n))

    def walk(self, seed: int, scale: float) -> None:
        torch.manual_seed(seed)
        for parameter in self.parameters:
            parameter.add_(torch.randn_like(parameter), alpha=scale)

    def bptt(self) -> None:
        self.loss().backward()
        self.sgd.step()
        self.sgd.zero_grad()


def plot(axes, rows: list[dict]) -> None:
    """Bars: each step's time over the floor's."""
    labels = [f"{row['model']}\n{row['dtype']}" for row in rows]
    for offset, name in enumerate(("zoo", "mezo")):
        positions = [i + 0.35 * (offset - 0.5) for i in range(len(rows))]
        axes.bar(positions, [row[f"{name}/floor"] for row in rows], width=0.33, label=name)
    axes.axhline(1, color="black", linewidth=1, label="floor: 2n forward passes")
    axes.set_xticks(range(len(rows)), labels, fontsize=8)
    axes.set_ylabel("time of a step / time of its forward passes")
    axes.legend()


if __name__ == "__main__":
    main()
