"""Speed of the recurrent models, forward only, beside their counterparts in torch and transformers.

    python benchmarks/models.py                 # all models, about 10 minutes on two cores
    python benchmarks/models.py --rounds 3 --models lstm torch.lstm

Two tables. Tokens a second of one forward pass without gradients, batch 8 × 128, about 5 million parameters, float32:
all models in one process, in turn (A B C … A B C …), medians; the ratio to `torch.lstm` is taken within each round.
Milliseconds a token of `generate`, batch 1, after 10 tokens and after 10,000: the median of a hundred tokens each.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from report import save_results, table
from torch import nn
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM, RwkvConfig, RwkvForCausalLM
from transformers.generation.streamers import BaseStreamer

from zoo_hf import (
    DNCConfig,
    DNCForCausalLM,
    RNNConfig,
    RNNForCausalLM,
    RWKV7Config,
    RWKV7ForCausalLM,
    ZooMamba2Config,
    ZooMamba2ForCausalLM,
)


VOCABULARY, BATCH, TOKENS = 256, 8, 128


class TorchModel(nn.Module):
    """Embedding, one of torch's own recurrent layers, and a linear head."""

    def __init__(self, kind: type[nn.RNNBase], embedding_size: int, hidden_size: int):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, embedding_size)
        self.layer = kind(embedding_size, hidden_size, batch_first=True)
        self.head = nn.Linear(hidden_size, VOCABULARY)

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> torch.Tensor:
        return self.head(self.layer(self.embedding(input_ids))[0])


def rnn(cell_type: str, hidden_size: int, **choices: int) -> RNNForCausalLM:
    return RNNForCausalLM(RNNConfig(cell_type=cell_type, embedding_size=512, hidden_size=hidden_size, **choices))


MAMBA = {"vocab_size": VOCABULARY, "hidden_size": 256, "num_hidden_layers": 11}
MAMBA2 = MAMBA | {"num_heads": 8, "head_dim": 64, "state_size": 64, "n_groups": 1}
RWKV = {"vocab_size": VOCABULARY, "hidden_size": 256, "num_hidden_layers": 7}

MODELS: dict[str, Callable[[], nn.Module]] = {
    "torch.lstm": lambda: TorchModel(nn.LSTM, 512, 896),
    "lstm": lambda: rnn("lstm", 896),
    "lstm, 8 heads": lambda: rnn("lstm", 1536, num_heads=8),
    "torch.gru": lambda: TorchModel(nn.GRU, 512, 1024),
    "gru": lambda: rnn("gru", 1024),
    "gru, 8 heads": lambda: rnn("gru", 1792, num_heads=8),
    "slstm": lambda: rnn("slstm", 896),
    "slstm, 4 heads": lambda: rnn("slstm", 1280, num_heads=4),
    "elman": lambda: rnn("elman", 1920),
    "elman, 8 heads": lambda: rnn("elman", 4096, num_heads=8),
    "dnc": lambda: DNCForCausalLM(DNCConfig.preset(4)),
    "rwkv7": lambda: RWKV7ForCausalLM(RWKV7Config(**RWKV)),
    "transformers.rwkv": lambda: RwkvForCausalLM(RwkvConfig(**RWKV, attention_hidden_size=256)),
    "mamba2": lambda: ZooMamba2ForCausalLM(ZooMamba2Config(**MAMBA2)),
    "transformers.mamba2": lambda: Mamba2ForCausalLM(Mamba2Config(**MAMBA2)),
    "transformers.mamba": lambda: MambaForCausalLM(MambaConfig(**MAMBA)),
}
GENERATING = [name for name in MODELS if "." not in name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=9, help="Times each forward pass is timed.")
    parser.add_argument("--generate", type=int, default=10_000, help="Tokens to generate; 0 for none.")
    options = parser.parse_args()
    rows = speeds(options.models, options.rounds)
    print(table(rows))
    save_results("models", rows, plot)
    if options.generate:
        generated = [latency(name, options.generate) for name in options.models if name in GENERATING]
        print(table(generated))
        save_results("generation", generated, plot_generation)


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]().eval().to("cuda" if torch.cuda.is_available() else "cpu")


@torch.inference_mode()
def speeds(names: list[str], rounds: int) -> list[dict[str, object]]:
    """A row a model: parameters, tokens a second, and speed over `torch.lstm`'s in the same round."""
    models = {name: make(name) for name in names}
    device = next(iter(models.values())).parameters().__next__().device
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(rounds + 1):  # the first is a warm-up
        for name, model in models.items():
            ids = torch.randint(100, (BATCH, TOKENS), device=device)
            start = time.perf_counter()
            model(ids, use_cache=False)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if round_:
                seconds[name].append(time.perf_counter() - start)
        print(f"round {round_}/{rounds}", flush=True)
    reference = seconds.get("torch.lstm", seconds[names[0]])
    return [
        {
            "model": name,
            "parameters": sum(p.numel() for p in models[name].parameters()),
            "tokens/s": BATCH * TOKENS / statistics.median(times),
            "speed / torch.lstm": statistics.median(a / b for a, b in zip(reference, times, strict=True)),
        }
        for name, times in seconds.items()
    ]


class Clock(BaseStreamer):
    """When each token was there."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


@torch.inference_mode()
def latency(name: str, length: int) -> dict[str, object]:
    """Median milliseconds of five hundred tokens, at the end of a long text and, right after it, of a new one."""
    model = make(name)
    prompt = torch.randint(100, (1, 8), device=model.device)

    def generate(tokens: int) -> list[float]:
        clock = Clock()
        model.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, streamer=clock)
        return [1e3 * (b - a) for a, b in zip(clock.times, clock.times[1:], strict=False)]

    late, early = statistics.median(generate(length)[-500:]), statistics.median(generate(510)[10:])
    print(f"{name}: {early:.2f} ms, {late:.2f} ms", flush=True)
    return {"model": name, "ms a token, token 10": early, f"ms a token, token {length:,}": late, "ratio": late / early}


def plot(axes, rows: list[dict]) -> None:
    axes.barh([row["model"] for row in rows], [row["tokens/s"] for row in rows])
    axes.set_xlabel("tokens a second, forward only")
    axes.invert_yaxis()


def plot_generation(axes, rows: list[dict]) -> None:
    labels = [key for key in rows[0] if key.startswith("ms")]
    for offset, label in enumerate(labels):
        axes.barh([i + 0.4 * offset for i in range(len(rows))], [row[label] for row in rows], height=0.4, label=label)
    axes.set_yticks(range(len(rows)), [row["model"] for row in rows])
    axes.set_xlabel("milliseconds a token, batch 1")
    axes.legend()
    axes.invert_yaxis()


if __name__ == "__main__":
    main()
