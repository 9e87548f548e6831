"""Recurrent language models with members in one forward pass, beside a forward pass of the weights themselves.

To the scans of RWKV-7 and Mamba-2 members are more sequences; those of GRU and sLSTM make R + s Z of each on the chip.
"""

import os
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import torch
from steps import Steps
from timing import milliseconds, product_rate
from transformers import PreTrainedConfig, PreTrainedModel

from zoo_hf import (
    RNNConfig,
    RNNForCausalLM,
    RWKV7Config,
    RWKV7ForCausalLM,
    ZooMamba2Config,
    ZooMamba2ForCausalLM,
)


class Shape(NamedTuple):
    """Of the models, of a forward pass, and of a measurement.

    Args:
        head: units of a head.
        members: in a forward pass, each with `batch` sequences of `tokens`.
        directions: whose 2n members are evaluated, so many that what a step does once has its due share.
    """

    width: int = 1024
    layers: int = 12
    head: int = 64
    members: int = 8
    batch: int = 8
    tokens: int = 512
    directions: int = 16


def models(shape: Shape) -> dict[str, tuple[type[PreTrainedModel], PreTrainedConfig]]:
    width, layers, head = shape[:3]
    rnn = {"embedding_size": width, "hidden_size": width, "num_layers": layers, "num_heads": width // head}
    rnn |= {"residual": True, "intermediate_size": 4 * width}
    others = {"hidden_size": width, "num_hidden_layers": layers, "head_dim": head}
    mamba2 = {"num_heads": 2 * width // head, "state_size": 2 * head}
    return {
        "rwkv7": (RWKV7ForCausalLM, RWKV7Config(**others)),
        "mamba2": (ZooMamba2ForCausalLM, ZooMamba2Config(**others, **mamba2)),
        "gru": (RNNForCausalLM, RNNConfig(cell_type="gru", **rnn)),
        "slstm": (RNNForCausalLM, RNNConfig(cell_type="slstm", **rnn)),
    }


def measure(shape: Shape = Shape(), rounds: int = 10, size: int = 8192) -> list[dict]:  # noqa: B008  # a tuple
    """A row a model; `size`: of the product that tells the ceiling."""
    rate = product_rate(size)
    return [row(name, *models(shape)[name], shape, rate, rounds) for name in models(shape)]


def row(
    name: str, kind: type[PreTrainedModel], config: PreTrainedConfig, shape: Shape, rate: float, rounds: int
) -> dict:
    steps = Steps(kind, config, shape.members, batch=shape.batch, tokens=shape.tokens)
    times, tokens = milliseconds(ways(steps, shape.directions), rounds), steps.ids.numel()
    members = 2 * shape.directions * tokens / times["members"] * 1e3
    plain, torchs = (shape.members * tokens / times[way] * 1e3 for way in ("plain", "torch"))
    return {
        "model": name,
        "weights": steps.weights,
        "members × sequences × tokens": f"{shape.members} × {shape.batch} × {shape.tokens}",
        "members' tokens/s": members,
        "plain tokens/s": plain,
        "members / plain": members / plain,
        "plain, torch's operations, tokens/s": torchs,
        "product TFLOP/s": rate / 1e12,
        "members' products / product": 2 * steps.weights * members / rate,
    }


def ways(steps: Steps, directions: int) -> dict[str, Callable[[], object]]:
    """All members' losses; the loss of as many sequences as a forward pass of members has, with the weights alone."""
    ids = steps.ids.repeat(steps.together, 1)

    @torch.inference_mode()
    def plain() -> torch.Tensor:
        return steps.model(input_ids=ids, labels=ids, use_cache=False, skip_logits=True).loss

    def torchs() -> torch.Tensor:
        with mock.patch.dict(os.environ, {"ZOO_HF_KERNELS": "plain"}):
            return plain()

    return {"members": lambda: steps.probe(directions), "plain": plain, "torch": torchs}
