"""Whole steps of the paper's LSTMs on one GPU, beside its eight, backpropagation, and the arithmetic's floor."""

import torch
from timing import DEVICE, milliseconds, peak_bytes, product_rate

from zoo_hf import CentralDifference, Direction, RNNConfig, RNNForCausalLM, Update
from zoo_hf.perturbation import probe
from zoo_hf.population import probe_population


PAPER = {  # model → n → seconds a step on eight A40 (arXiv:2505.17852)
    "100k": {96: 0.05, 512: 0.25},
    "1M": {96: 0.06, 512: 0.29},
    "10M": {96: 0.07, 512: 0.29},
    "100M": {96: 0.40, 512: 1.87},
    "1.1B": {96: 4.4, 512: 19.3},
}
TOGETHER = {"100k": 192, "1M": 48, "10M": 8, "100M": 1, "1.1B": 1}  # members in a forward pass
BATCH, TOKENS, RADIUS = 1024, 10, 2.0**-6


class Steps:
    """Steps of one model on one fixed batch, in bfloat16 throughout: 2 bytes a weight."""

    def __init__(self, config: RNNConfig, directions: int, together: int, batch: int = BATCH, tokens: int = TOKENS):
        torch.manual_seed(0)
        with DEVICE:
            self.model = RNNForCausalLM(config).to(torch.bfloat16).eval()
            self.ids = torch.randint(config.vocab_size, (batch, tokens))
        self.directions, self.together, self.number = directions, together, 0
        self.parameters = dict(self.model.named_parameters())
        names = {parameter: name for name, parameter in self.parameters.items()}
        self.update = Update(torch.optim.SGD(self.parameters.values(), lr=1e-9), names)
        self.descent = torch.optim.SGD(self.parameters.values(), lr=1e-9)

    def loss(self) -> torch.Tensor:
        return self.model(input_ids=self.ids, labels=self.ids, use_cache=False, skip_logits=True).loss

    @torch.inference_mode()
    def zoo(self) -> None:
        self.number += 1
        directions = [Direction(0, self.number, index) for index in range(self.directions)]
        estimator = CentralDifference(RADIUS)
        members = estimator.members(directions)
        if self.together == 1:
            losses = probe(self.loss, self.parameters, members, RADIUS)
        else:
            way = {"model": self.model, "members_per_forward": self.together}
            losses = probe_population(self.loss, self.parameters, members, RADIUS, **way)
        self.update.hold(estimator.estimate(directions, losses))
        self.update.step()

    def bptt(self) -> None:
        self.loss().backward()
        self.descent.step()
        self.descent.zero_grad()

    @property
    def floor_flops(self) -> float:
        """Of a step's 2n forward passes: two for every weight and token."""
        return 2 * self.directions * 2 * sum(p.numel() for p in self.parameters.values()) * self.ids.numel()


def measure(name: str, rounds: int = 10) -> list[dict]:
    """A row a number of directions."""
    rate = product_rate()
    return [row(name, directions, rate, rounds) for directions in PAPER[name]]


def row(name: str, directions: int, rate: float, rounds: int) -> dict:
    steps = Steps(RNNConfig.preset(name), directions, TOGETHER[name])
    seconds = milliseconds({"zoo": steps.zoo}, rounds)["zoo"] / 1e3
    memory = peak_bytes(steps.zoo)
    bptt, bptt_memory = backpropagation(steps, rounds)
    floor = steps.floor_flops / rate
    return {
        "model": name,
        "n": directions,
        "zoo s": seconds,
        "8 × A40 s": PAPER[name][directions],
        "8 × A40 / zoo": PAPER[name][directions] / seconds,
        "floor s": floor,
        "floor / zoo": floor / seconds,
        "zoo GB": memory / 1e9,
        "bptt s": bptt,
        "bptt GB": bptt_memory,
    }


def backpropagation(steps: Steps, rounds: int) -> tuple[float | str, float | str]:
    """Seconds of one step through time, and the most memory it held, in GB."""
    try:
        seconds = milliseconds({"bptt": steps.bptt}, rounds)["bptt"] / 1e3
        return seconds, peak_bytes(steps.bptt) / 1e9
    except torch.cuda.OutOfMemoryError:
        return "does not fit", "does not fit"
