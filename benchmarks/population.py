"""Steps with many members in one forward pass beside steps with one at a time, and one layer beside itself.

    python benchmarks/population.py                      # 20 minutes on two cores; 4, 16 and 64 members
    python benchmarks/population.py --models llama slstm --members 64    # in part: on the terminal alone

First small models, one batch of 1 × 32 and 4 × 32 tokens: a whole step (noise, probes, update with SGD) of `serial`
and `population` probes and of what `auto` takes, over their floor, the step's 2n forward passes alone in inference
mode, as steps run them. All are interleaved in one process; figures are medians, and of `auto` also the slowest and
the fastest step beside the floor of the same round. Then a linear layer, 2048 × 2048 in bfloat16: 256 rows for 64
members with low-rank displacements of their own, noise included, beside the plain layer on the same rows.
`--fit` adds the constants of `zoo_hf.prediction.RATES` that these times ask for.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from memory import reset_peak, resident
from report import save_results, table
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from zoo_hf import (
    CentralDifference,
    Direction,
    DNCConfig,
    DNCForCausalLM,
    RNNConfig,
    RNNForCausalLM,
    RWKV7Config,
    RWKV7ForCausalLM,
    Update,
    ZooMamba2Config,
    ZooMamba2ForCausalLM,
)
from zoo_hf.displaced import multiplied
from zoo_hf.kernels import use_compiler
from zoo_hf.low_rank import LowRank, kind_of
from zoo_hf.meter import work
from zoo_hf.population import evaluate, member_weights
from zoo_hf.probes import Probes


def rnn(cell_type: str, embedding_size: int, hidden_size: int, num_heads: int = 1) -> RNNForCausalLM:
    sizes = {"embedding_size": embedding_size, "hidden_size": hidden_size, "num_heads": num_heads}
    return RNNForCausalLM(RNNConfig(cell_type=cell_type, **sizes))


LLAMA = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, num_hidden_layers=4, tie_word_embeddings=True)),
    "lstm": lambda: rnn("lstm", 96, 160),
    "lstm, 16 heads": lambda: rnn("lstm", 96, 256, 16),
    "gru, 16 heads": lambda: rnn("gru", 96, 320, 16),
    "slstm": lambda: rnn("slstm", 96, 160),
    "slstm, 16 heads": lambda: rnn("slstm", 96, 256, 16),
    "dnc": lambda: DNCForCausalLM(DNCConfig(vocab_size=256, hidden_size=128)),
    "rwkv7": lambda: RWKV7ForCausalLM(RWKV7Config(vocab_size=256, hidden_size=64, num_hidden_layers=3, head_dim=32)),
    "mamba2": lambda: ZooMamba2ForCausalLM(
        ZooMamba2Config(
            vocab_size=256, hidden_size=64, num_hidden_layers=4, num_heads=4, head_dim=32, state_size=16, n_groups=1
        )
    ),
}
SHARE = "share of the plain layer's speed"
WAYS = {  # name: (distribution, probes)
    "serial": ("rademacher", "serial"),
    "auto": ("rademacher", "auto"),
    "auto, low rank": ("low_rank", "auto"),
    "population": ("rademacher", "population"),
    "population, low rank": ("low_rank", "population"),
}
AUTO = ("auto", "auto, low rank")
TIMED = ("serial", *AUTO, "population", "population, low rank")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--members", nargs="+", type=int, default=[4, 16, 64])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4], help="Sentences of 32 tokens in a batch.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--child", nargs=2, metavar=("MODEL", "WAY"), help=argparse.SUPPRESS)
    parser.add_argument("--fit", action="store_true", help="Print what RATES should be, by least squares.")
    options = parser.parse_args()
    if options.child:
        print(peak(*options.child))
        return
    layer = linear(max(15, options.rounds))
    print(table(layer))
    rows = []
    for name in options.models:
        for batch in options.rows:
            for members in options.members:
                rows.append(measure(name, batch, members, options.rounds))
                print(rows[-1], flush=True)
    memory = [row_of_memory(name) for name in options.models]
    print(table(rows))
    print(table(memory))
    if all(vars(options)[name] == parser.get_default(name) for name in ("models", "members", "rows")):
        save_results("population", rows, plot)
        save_results("population_memory", memory, plot_memory)
        save_results("population_layer", layer, plot_layer)
    if options.fit:
        print(fit(rows))


class Steps:
    """Steps of one model on one batch, in every way."""

    def __init__(self, name: str, rows: int, members: int):
        torch.manual_seed(0)
        self.model = MODELS[name]().eval()
        self.ids = torch.randint(0, 256, (rows, 32))
        self.parameters = dict(self.model.named_parameters())
        self.members = members
        names = {parameter: name for name, parameter in self.parameters.items()}
        self.update = Update(torch.optim.SGD(self.parameters.values(), lr=1e-9), names)
        self.probes = {way: Probes(probes) for way, (_, probes) in WAYS.items()}
        self.kinds = {way: kind_of(distribution, self.model, 1) for way, (distribution, _) in WAYS.items()}
        self.number = 0

    def loss(self) -> torch.Tensor:
        return self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss

    @torch.inference_mode()  # as in steps
    def floor(self) -> None:
        for _ in range(self.members):
            self.loss()

    def step(self, way: str) -> None:
        self.number += 1
        directions = [Direction(0, self.number, index) for index in range(self.members // 2)]
        estimator = CentralDifference(1e-3, self.kinds[way])
        arguments = self.loss, self.parameters, estimator.members(directions), 1e-3
        with torch.inference_mode():
            how = {"model": self.model, "distribution": self.kinds[way], "batch": {"input_ids": self.ids}}
            losses = self.probes[way].losses(*arguments, **how)
        self.update.hold(estimator.estimate(directions, losses))
        self.update.step()


@torch.no_grad()
def measure(name: str, rows: int, members: int, rounds: int) -> dict[str, object]:
    """Medians in milliseconds, the floor over the time of a step, and of `auto` the range of that."""
    steps = Steps(name, rows, members)
    runs: dict[str, Callable[[], object]] = {"floor": steps.floor} | {way: partial(steps.step, way) for way in TIMED}
    seconds = interleaved(runs, rounds)
    faster = {way: [a / b for a, b in zip(seconds["floor"], seconds[way], strict=True)] for way in TIMED}
    ratios = {f"floor / {way}": statistics.median(faster[way]) for way in TIMED}
    ranges = {f"{way}: slowest, fastest": f"{min(faster[way]):.2f}, {max(faster[way]):.2f}" for way in AUTO}
    # a step with few members has no choice of its own
    chosen = {f"{way}: members a pass": max(steps.probes[way].chosen.values(), default=1) for way in AUTO}
    about = {"model": name, "weights": steps.model.num_parameters(), "batch": f"{rows} × 32", "members": members}
    times = {f"{way} ms": 1e3 * statistics.median(times) for way, times in seconds.items()}
    return about | times | ratios | ranges | chosen


def interleaved(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every run, A B C … A B C …; a first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if round_:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def row_of_memory(name: str) -> dict[str, object]:
    """MB that the forward passes of 64 members take alone, and a whole step as a population, in fresh processes."""
    peaks = {way: in_a_fresh_process(name, way) for way in ("floor", "population", "population, low rank")}
    added = {f"{way} adds": peaks[way] - peaks["floor"] for way in peaks if way != "floor"}
    weights = 4e-6 * sum(p.numel() for p in MODELS[name]().parameters())
    return {"model": name, "weights MB": weights, "inference MB": peaks["floor"]} | added


def in_a_fresh_process(name: str, way: str) -> float:
    command = [sys.executable, "-W", "ignore", __file__, "--child", name, way]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # freed blocks go back at once
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return float(done.stdout.splitlines()[-1])


def peak(name: str, way: str) -> float:
    """MB at the peak of one step, or of its forward passes alone, above what was held before; 4 × 32 tokens."""
    before, steps = resident("VmRSS"), Steps(name, 4, 64)
    reset_peak()
    with torch.no_grad():
        steps.floor() if way == "floor" else steps.step(way)
    return resident("VmHWM") - before


@torch.inference_mode()
def linear(rounds: int, size: int = 2048, rows: int = 256, members: int = 64) -> list[dict[str, object]]:
    """A layer with members' displacements, their noise included, beside the plain layer: its share of the speed."""
    torch.manual_seed(0)
    weight, x = torch.randn(size, size, dtype=torch.bfloat16), torch.randn(rows, size, dtype=torch.bfloat16)
    kind, number = LowRank(frozenset("w")), 0

    def displaced() -> torch.Tensor:
        nonlocal number
        number += 1
        directions = [Direction(0, number, index) for index in range(members)]
        a, b = kind.factors(directions, {"w": weight})["w"]
        a, b = (a * 1e-3).bfloat16(), b.bfloat16()
        own = x.view(members, -1, size)
        return torch.func.vmap(lambda x, a, b: multiplied(x, weight, None, a, b))(own, a, b)

    found = []
    for compiled in (False, True):
        use_compiler(compiled)
        seconds = interleaved({"plain": lambda: F.linear(x, weight), "members": displaced}, rounds)
        ratios = [a / b for a, b in zip(seconds["plain"], seconds["members"], strict=True)]
        medians = {f"{name} ms": 1e3 * statistics.median(times) for name, times in seconds.items()}
        speed = {
            SHARE: statistics.median(ratios),
            "slowest": min(ratios),
            "fastest": max(ratios),
        }
        found.append({"noise": "compiled" if compiled else "eager"} | medians | speed)
    use_compiler(False)
    return found


@torch.inference_mode()
def fit(rows: list[dict]) -> dict[str, float]:
    """Non-negative constants of `Rates` with the least sum of squared relative errors of all rows' forward passes."""
    from scipy.optimize import nnls

    left = []
    for row in rows:
        steps = Steps(row["model"], int(row["batch"].split()[0]), row["members"])
        one = work(steps.loss)
        left.append([v * row["members"] / row["floor ms"] * 1e3 for v in (one.operations, 0, one.bytes, one.flops)])
        for way in ("population", "population, low rank"):
            members = CentralDifference(1e-3).members([Direction(0, 0, i) for i in range(row["members"] // 2)])
            weights = member_weights(steps.parameters, members, 1e-3, steps.kinds[way])
            run = partial(evaluate, steps.loss, steps.model, weights)
            (seconds,) = interleaved({"": run}, 5).values()
            done = work(run)
            left.append([v / statistics.median(seconds) for v in (0, done.operations, done.bytes, done.flops)])
    rates, error = nnls(torch.tensor(left).numpy(), torch.ones(len(left)).numpy())
    names = ("operation", "member_operation", "byte", "flop")
    return dict(zip(names, rates.tolist(), strict=True)) | {"relative error": error / len(left) ** 0.5}


def plot(axes, rows: list[dict]) -> None:
    """Time of a step against members, in a batch of one sentence; a picture for each model."""
    figure, names = axes.figure, list(dict.fromkeys(row["model"] for row in rows))
    axes.remove()
    figure.set_size_inches(8, 7)
    grid = figure.subplots(3, 3, sharex=True, sharey=True).flat
    for name, small in zip(names, grid, strict=False):
        some = [row for row in rows if row["model"] == name and row["batch"].startswith("1 ")]
        for way, style in (("floor", "k:"), ("serial", "C0--"), ("auto", "C1-"), ("auto, low rank", "C2-")):
            small.loglog(
                [row["members"] for row in some], [row[f"{way} ms"] for row in some], style, base=2, label=way
            )
        small.set_title(name, fontsize=9)
        small.grid(alpha=0.3)
    grid[0].legend(fontsize=7)
    figure.supxlabel("members a step")
    figure.supylabel("milliseconds a step, 1 × 32 tokens")


def plot_memory(axes, rows: list[dict]) -> None:
    axes.barh([row["model"] for row in rows], [row["population adds"] for row in rows], label="population")
    axes.barh(
        [row["model"] for row in rows],
        [row["population, low rank adds"] for row in rows],
        height=0.4,
        label="low rank",
    )
    axes.axvline(64, color="black", linewidth=1, linestyle=":", label="what is allowed")
    axes.set_xlabel("MB that a population of 64 members adds to inference, 4 × 32 tokens")
    axes.legend()


def plot_layer(axes, rows: list[dict]) -> None:
    axes.bar([row["noise"] for row in rows], [row[SHARE] for row in rows])
    axes.set_ylabel(SHARE)


if __name__ == "__main__":
    main()
