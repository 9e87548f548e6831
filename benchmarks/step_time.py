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
from collections.abc import Callable

import torch
from report import save_results, table

from zoo_hf import RNNConfig, RNNForCausalLM, ZOOConfig, ZOOTrainer


SIZES = {  # label: (model, batch size, tokens, directions)
    "0.5M": ({"embedding_size": 128, "hidden_size": 256}, 16, 64, 8),
    "7M": ({"embedding_size": 512, "hidden_size": 1024}, 16, 64, 8),
    "50M": ({"embedding_size": 1024, "hidden_size": 2048, "num_layers": 2}, 16, 128, 2),
}
STEPS = ("zoo", "floor", "mezo", "bptt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=7, help="Times each step is timed.")
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
    steps = make_steps(model, batch, directions, bf16=dtype == "bfloat16")
    seconds: dict[str, list[float]] = {name: [] for name in STEPS}
    for round_ in range(rounds + 1):  # the first is a warm-up
        for name in STEPS:
            steps["settle"]()
            start = time.perf_counter()
            steps[name]()
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


def make_steps(model: RNNForCausalLM, batch: dict, directions: int, *, bf16: bool) -> dict[str, Callable[[], None]]:
    """The four steps, and one forward pass; bfloat16 is autocast, as `bf16=True` has it, for all of them."""
    args = ZOOConfig(
        tempfile.mkdtemp(),
        num_directions=directions,
        optim="sgd",
        learning_rate=1e-6,
        bf16=bf16,
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = ZOOTrainer(model, args)
    trainer.create_optimizer()
    batch = {name: value.to(args.device) for name, value in batch.items()}
    predictions = (batch["labels"][:, 1:] != -100).sum()  # the Trainer counts them for every update
    parameters = list(model.parameters())
    sgd = torch.optim.SGD(parameters, lr=1e-6)

    # as Trainer.train does; with bf16 this makes every forward pass, of all four steps, run under autocast
    model, trainer.optimizer = trainer.accelerator.prepare(model, trainer.optimizer)

    def loss() -> torch.Tensor:
        return model(**batch).loss

    def zoo() -> None:
        trainer.training_step(model, batch, predictions)
        trainer.optimizer.step()

    @torch.no_grad()
    def settle() -> None:
        loss()

    @torch.no_grad()
    def floor() -> None:
        for _ in range(2 * directions):
            loss()

    @torch.no_grad()
    def mezo() -> None:
        for seed in range(directions):
            walk(seed, args.smoothing_radius)
            plus = loss()
            walk(seed, -2 * args.smoothing_radius)
            minus = loss()
            walk(seed, args.smoothing_radius)
            walk(seed, -1e-6 * float(plus - minus) / (2 * args.smoothing_radius * directions))

    def walk(seed: int, scale: float) -> None:
        torch.manual_seed(seed)
        for parameter in parameters:
            parameter.add_(torch.randn_like(parameter), alpha=scale)

    def bptt() -> None:
        loss().backward()
        sgd.step()
        sgd.zero_grad()

    return {"settle": settle, "zoo": zoo, "floor": floor, "mezo": mezo, "bptt": bptt}


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
