"""How near estimates come to the gradient: against the number of directions, and against the smoothing radius.

    python benchmarks/cosine.py        # three minutes on one core

An LSTM of 24,960 weights on 16 × 32 bytes of CPython's documentation, as it starts and after 60 updates. First the
cosine of ĝ to the gradient, by automatic differentiation, for n directions beside √(n / (n + d − 1)); then, for 64
directions, that cosine over its law and `signal_to_noise`, which needs no gradient, for every smoothing radius.
"""

import math

import torch
from report import save_results, table
from transformers import default_data_collator

from zoo_hf import CentralDifference, Direction, RNNConfig, RNNForCausalLM, gradient
from zoo_hf.tasks import byte_tokenizer, python_documentation, token_blocks


DIRECTIONS = (1, 4, 16, 64, 256, 1024)
RADII = (1.0, 0.3, 0.1, 3e-2, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
UPDATES = 60


class Measured:
    """A model on one batch, and its gradient."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        blocks = token_blocks(python_documentation(5.0), byte_tokenizer(), 32)["train"]
        self.batch = default_data_collator([blocks[i] for i in range(16)])
        self.model = RNNForCausalLM(RNNConfig()).eval()
        self.parameters = dict(self.model.named_parameters())
        self.weights = sum(p.numel() for p in self.parameters.values())

    def loss(self) -> torch.Tensor:
        return self.model(**self.batch, use_cache=False).loss

    def learn(self) -> None:
        """Some updates, by backpropagation, as only where the model is matters here."""
        optimizer = torch.optim.Adam(self.parameters.values(), lr=1e-2)
        for _ in range(UPDATES):
            optimizer.zero_grad()
            self.loss().backward()
            optimizer.step()

    def gradient(self) -> torch.Tensor:
        found = torch.autograd.grad(self.loss(), list(self.parameters.values()))
        return torch.cat([part.flatten() for part in found]).double()

    def estimate(self, n: int, radius: float, distribution: str, dtype: torch.dtype, step: int = 0):
        """ĝ, flat, and its signal to noise."""
        directions = [Direction(0, step, i) for i in range(n)]
        narrow = dtype is not torch.float32
        with torch.inference_mode(), torch.autocast("cpu", dtype if narrow else torch.bfloat16, enabled=narrow):
            estimate = CentralDifference(radius, distribution)(self.loss, self.parameters, directions)
        parts = [gradient(estimate, name, p.detach()).flatten() for name, p in self.parameters.items()]
        return torch.cat(parts).double(), estimate.signal_to_noise


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.nn.functional.cosine_similarity(a, b, dim=0).item()


def by_directions(measured: Measured) -> list[dict]:
    """A row a number of directions; means of up to eight estimates."""
    exact, rows = measured.gradient(), []
    for n in DIRECTIONS:
        row: dict = {"directions": n, "law": math.sqrt(n / (n + measured.weights - 1))}
        for distribution in ("rademacher", "gaussian"):
            steps = range(max(1, min(8, 256 // n)))
            found = [cosine(measured.estimate(n, 1e-3, distribution, torch.float32, s)[0], exact) for s in steps]
            row[distribution] = sum(found) / len(found)
        rows.append(row)
    return rows


def by_radius(measured: Measured, when: str) -> list[dict]:
    """A row a smoothing radius, for 64 directions."""
    exact, law, rows = measured.gradient(), math.sqrt(64 / (64 + measured.weights - 1)), []
    for radius in RADII:
        row: dict = {"weights": when, "smoothing radius": f"{radius:g}"}
        for dtype in (torch.float32, torch.bfloat16):
            found, signal = measured.estimate(64, radius, "rademacher", dtype)
            name = str(dtype).removeprefix("torch.")
            row[f"cosine / law, {name}"] = cosine(found, exact) / law if found.any() else 0.0
            row[f"signal to noise, {name}"] = signal
        rows.append(row)
    return rows


def plot_directions(axes, rows: list[dict]) -> None:
    directions = [row["directions"] for row in rows]
    axes.plot(directions, [row["law"] for row in rows], "--", color="0.4", label="√(n/(n+d−1))")
    for name, marker in (("rademacher", "o"), ("gaussian", "s")):
        axes.plot(directions, [row[name] for row in rows], marker, label=name)
    axes.set(xscale="log", yscale="log", xlabel="directions n", ylabel="cosine of ĝ to the gradient")
    axes.legend()


def plot_radius(axes, rows: list[dict]) -> None:
    for color, when in zip(("#1d4ed8", "#c2410c"), ("at the start", "after 60 updates"), strict=True):
        own = [row for row in rows if row["weights"] == when]
        radii = [float(row["smoothing radius"]) for row in own]
        for dtype, style in (("float32", "o-"), ("bfloat16", "s--")):
            values = [row[f"signal to noise, {dtype}"] for row in own]
            axes.plot(radii, values, style, color=color, label=f"{dtype}, {when}", markersize=4)
    axes.axhline(0.6, color="0.5", linewidth=0.8)  # below which the trainer warns
    axes.set(xscale="log", yscale="log", xlabel="smoothing radius ε", ylabel="signal to noise")
    axes.legend(fontsize=8)


def main() -> None:
    measured = Measured()
    directions = by_directions(measured)
    print(table(directions))
    radii = by_radius(measured, "at the start")
    measured.learn()
    radii += by_radius(measured, "after 60 updates")
    print(table(radii))
    save_results("cosine", directions, plot_directions)
    save_results("smoothing_radius", radii, plot_radius)


if __name__ == "__main__":
    main()
