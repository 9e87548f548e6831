"""Whole steps of the paper's LSTMs on one GPU, beside its eight, backpropagation, and the arithmetic's floor."""

from typing import NamedTuple

import torch
from timing import DEVICE, if_it_fits, milliseconds, product_rate, with_peak
from transformers import PreTrainedModel

from zoo_hf import CentralDifference, Direction, RNNConfig, RNNForCausalLM, Update
from zoo_hf.perturbation import probe
from zoo_hf.population import probe_population


RADIUS = 2.0**-6
DOES_NOT_FIT = "does not fit"


class Case(NamedTuple):
    """A model of the paper's, and how its steps are made.

    Args:
        together: members in a forward pass.
        paper: n → seconds a step on eight A40 (arXiv:2505.17852).
        asked: of one of the table's columns.
    """

    config: RNNConfig
    together: int
    paper: dict[int, float]
    asked: str
    batch: int = 1024
    tokens: int = 10


def case(name: str, together: int, paper: dict[int, float], asked: str = "floor / zoo ≥ 0.6") -> Case:
    return Case(RNNConfig.preset(name), together, paper, asked)


CASES = {
    "100k": case("100k", 192, {96: 0.05, 512: 0.25}, "8 × A40 / zoo ≥ 5"),
    "1M": case("1M", 48, {96: 0.06, 512: 0.29}, "8 × A40 / zoo ≥ 2.5"),
    "10M": case("10M", 8, {96: 0.07, 512: 0.29}),
    "100M": case("100M", 1, {96: 0.40, 512: 1.87}),
    "1.1B": case("1.1B", 1, {96: 4.4, 512: 19.3}),
}


class Steps:
    """Steps of one model on one fixed batch, in bfloat16 throughout: 2 bytes a weight."""

    def __init__(self, kind: type[PreTrainedModel], config, together: int, *, batch: int, tokens: int):
        torch.manual_seed(0)
        with DEVICE:
            self.model = kind(config).to(torch.bfloat16).eval()
        self.together, self.number = together, 0
        self.take(batch, tokens)
        self.parameters = dict(self.model.named_parameters())
        self.weights = sum(p.numel() for p in self.parameters.values())
        names = {parameter: name for name, parameter in self.parameters.items()}
        self.update = Update(torch.optim.SGD(self.parameters.values(), lr=1e-9), names)
        self.descent = torch.optim.SGD(self.parameters.values(), lr=1e-9)

    def take(self, batch: int, tokens: int) -> None:
        """Another batch of random tokens."""
        self.ids = torch.randint(self.model.config.vocab_size, (batch, tokens), device=DEVICE)

    def loss(self) -> torch.Tensor:
        return self.model(input_ids=self.ids, labels=self.ids, use_cache=False, skip_logits=True).loss

    @torch.inference_mode()
    def probe(self, n: int) -> tuple[list[Direction], torch.Tensor]:
        """New directions, and the losses of both members of each, (2n,)."""
        self.number += 1
        directions = [Direction(0, self.number, index) for index in range(n)]
        members = CentralDifference(RADIUS).members(directions)
        if self.together == 1:
            return directions, probe(self.loss, self.parameters, members, RADIUS)
        way = {"model": self.model, "members_per_forward": self.together}
        return directions, probe_population(self.loss, self.parameters, members, RADIUS, **way)

    @torch.inference_mode()
    def zoo(self, n: int) -> None:
        self.update.hold(CentralDifference(RADIUS).estimate(*self.probe(n)))
        self.update.step()

    def warm_up(self, n: int) -> None:
        """The shortest step that runs all kernels of one with n directions: a pair and, together, a full forward."""
        self.zoo(min(n, max(1, self.together // 2)))

    def bptt(self) -> None:
        self.loss().backward()
        self.descent.step()
        self.descent.zero_grad()

    def floor_flops(self, n: int) -> float:
        """Of a step's 2n forward passes: two for every weight and token."""
        return 2 * n * 2 * self.weights * self.ids.numel()


def measure(cases: dict[str, Case], rounds: int = 10, size: int = 8192) -> list[dict]:
    """A row a model and number of directions; `size`: of the product that tells the floor's rate."""
    rate = product_rate(size)
    return [row for name, own in cases.items() for row in rows_of(name, own, rate, rounds)]


def rows_of(name: str, case: Case, rate: float, rounds: int) -> list[dict]:
    steps = Steps(RNNForCausalLM, case.config, case.together, batch=case.batch, tokens=case.tokens)
    rows = [row(name, case, steps, n, rate, rounds) for n in case.paper]
    seconds, memory = backpropagation(steps, rounds)
    return [one | {"bptt s": seconds, "bptt GB": memory, "asked": case.asked} for one in rows]


def row(name: str, case: Case, steps: Steps, n: int, rate: float, rounds: int) -> dict:
    times, memory = with_peak(lambda: milliseconds({"zoo": lambda: steps.zoo(n)}, rounds, [lambda: steps.warm_up(n)]))
    seconds, floor = times["zoo"] / 1e3, steps.floor_flops(n) / rate
    return {
        "model": name,
        "n": n,
        "weights": steps.weights,
        "zoo s": seconds,
        "8 × A40 s": case.paper[n],
        "8 × A40 / zoo": case.paper[n] / seconds,
        "product TFLOP/s": rate / 1e12,
        "floor s": floor,
        "floor / zoo": floor / seconds,
        "zoo GB": memory,
    }


def backpropagation(steps: Steps, rounds: int) -> tuple[float | str, float | str]:
    """Seconds of one step through time, and the most memory it held, in GB."""
    found = if_it_fits(lambda: with_peak(lambda: milliseconds({"bptt": steps.bptt}, rounds)))
    steps.descent.zero_grad()  # what a pass that did not fit has left
    return (DOES_NOT_FIT, DOES_NOT_FIT) if found is None else (found[0]["bptt"] / 1e3, found[1])
