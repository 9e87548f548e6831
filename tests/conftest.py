"""What the tests share: tiny data, a tiny model, and a trainer on a CPU that talks to nobody."""

import os
from dataclasses import fields

import torch


os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers reads it
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before kernels are defined: they run, slowly, where a test asks for them

import pytest
from transformers import TrainerCallback, TrainingArguments

from zoo_hf import RNNConfig, RNNForCausalLM, ZOOConfig, ZOOTrainer


torch.set_num_threads(1)

VOCABULARY = 32
# what it is called in this version; where it has two names, the one that is not deprecated stands first
CHECKPOINTING = next(field.name for field in fields(TrainingArguments) if field.name.endswith("_checkpointing"))


def texts(count: int, length: int = 8) -> list[dict[str, torch.Tensor]]:
    """Sentences of random tokens, each an example of a language model."""
    tokens = torch.randint(VOCABULARY, (count, length), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in tokens]


def batch(examples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The examples as one batch."""
    return {name: torch.stack([example[name] for example in examples]) for name in examples[0]}


def tiny_lstm(**config) -> RNNForCausalLM:
    """An LSTM language model of 2.3 k parameters, the same at every call."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "embedding_size": 8, "hidden_size": 16}
    return RNNForCausalLM(RNNConfig(**(sizes | config)))


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the model's parameters."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


class Estimates(TrainerCallback):
    """Every estimate that a run gives to its optimizer, in `seen`."""

    def __init__(self):
        self.seen = []

    def on_pre_optimizer_step(self, args, state, control, optimizer, **kwargs):
        self.seen.append(optimizer.optimizer.estimate)


@pytest.fixture(scope="session", autouse=True)
def reports_of_trackio(tmp_path_factory) -> None:
    os.environ["TRACKIO_DIR"] = str(tmp_path_factory.mktemp("trackio"))  # read when trackio is imported


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def config(tmp_path):
    """`config(**arguments)`: a ZOOConfig of two steps with four directions, without files or reports."""

    def make(kind=ZOOConfig, **arguments):
        defaults = {
            "output_dir": str(tmp_path),
            "use_cpu": True,
            "disable_tqdm": True,
            "save_strategy": "no",
            "per_device_train_batch_size": 4,
            "max_steps": 2,
            "logging_steps": 1,
            "optim": "sgd",
            "lr_scheduler_type": "constant",
            "learning_rate": 1e-2,
        }
        own = (
            {"num_directions": 4, "smoothing_radius": 1e-2, "probes": "serial"} if issubclass(kind, ZOOConfig) else {}
        )
        return kind(**(defaults | own | arguments))

    return make


@pytest.fixture
def trainer(config):
    """`trainer(model, examples, trainer's keywords, **arguments)`: a ZOOTrainer, not yet started."""

    def make(model, examples, keywords=(), **arguments):
        return ZOOTrainer(model, config(**arguments), train_dataset=examples, **dict(keywords))

    return make
