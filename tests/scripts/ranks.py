"""Trains every case and saves what each rank ends with: torchrun or accelerate launch … ranks.py FOLDER --use_cpu.

Imported, it trains the same cases in one process. Rank r starts from weights, batch order and generators of its own,
as a careless script would.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback, default_data_collator

from zoo_hf import RNNConfig, RNNForCausalLM, ZOOConfig, ZOOTrainer
from zoo_hf.distributed import Ranks
from zoo_hf.tasks import byte_tokenizer, text_streams


COLLECTIVES = (
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_reduce",
    "barrier",
    "broadcast",
    "broadcast_object_list",
    "gather",
    "reduce",
    "scatter",
    "send",
)


def corpus() -> Dataset:
    """Ten sequences of eight tokens, so that batches of four leave a ragged one; some labels do not count."""
    tokens = torch.randint(1, 16, (10, 8), generator=torch.Generator().manual_seed(0))
    labels = torch.where(tokens % 5 == 0, -100, tokens)
    return Dataset.from_dict({"input_ids": tokens.tolist(), "labels": labels.tolist()})


def lstm(hidden_size: int = 8) -> RNNForCausalLM:
    return RNNForCausalLM(RNNConfig(vocab_size=16, embedding_size=4, hidden_size=hidden_size))


def transformer() -> GPT2LMHeadModel:
    """A model with dropout."""
    sizes = {"vocab_size": 16, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.3, bos_token_id=0, eos_token_id=0))


def mask_at_random(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Hides a random half of the tokens."""
    batch = default_data_collator(examples)
    hidden = torch.rand(batch["input_ids"].shape) < 0.5
    return batch | {"input_ids": batch["input_ids"].masked_fill(hidden, 0)}


def streamed() -> Any:
    """Two shards, which a trainer would otherwise share out between two ranks."""
    return corpus().to_iterable_dataset(num_shards=2).shuffle(seed=3, buffer_size=4)


def byte_lstm() -> RNNForCausalLM:
    return RNNForCausalLM(RNNConfig(vocab_size=256, embedding_size=4, hidden_size=8))


def streams() -> Dataset:
    """Two texts, each read in windows of eight bytes by one row of the batch."""
    return text_streams(
        ["A first text that goes on.", "And a second one, no less."], byte_tokenizer(), 8, batch_size=2
    )


class Gathering(ZOOTrainer):
    """Its objective gathers a figure from all ranks, as those of TRL's trainers do."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().compute_loss(*args, **kwargs)
        assert self.accelerator.gather_for_metrics(loss).numel() == 1
        return loss


SEVERAL = ("central", "split_pair", "forward", "shares", "carried")  # for other numbers of ranks than two

CASES: dict[str, dict[str, Any]] = {
    "central": {"num_directions": 8},
    "split_pair": {"num_directions": 5},
    "wide": {"num_directions": 5, "model": lambda: lstm(hidden_size=16)},
    "forward": {"num_directions": 4, "estimator": "forward"},
    "accumulated": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "dropout": {"model": transformer, "dropout": True, "learning_rate": 1e-3},
    "streaming": {"dataset": streamed, "max_steps": 5},
    "collator": {"data_collator": mask_at_random, "remove_unused_columns": False},
    "workers": {"data_collator": mask_at_random, "remove_unused_columns": False, "dataloader_num_workers": 1},
    "gathering": {"num_directions": 4, "estimator": "forward", "trainer": Gathering},
    "clipped": {"max_grad_norm": 1.0, "optim": "sgd"},
    "population": {"probes": "population", "members_per_forward": 2, "distribution": "low_rank"},
    "shares": {"data": "split", "num_directions": 3},
    "carried": {"model": byte_lstm, "dataset": streams, "carry_state": True, "per_device_train_batch_size": 2},
    "logged": {"logging_strategy": "steps", "logging_steps": 1, "include_num_input_tokens_seen": "all"},
}


class LastLoss(TrainerCallback):
    """Loss of the last estimate, in `value`."""

    def on_pre_optimizer_step(self, args, state, control, optimizer, **kwargs):
        self.value = optimizer.optimizer.estimate.loss


def trainer_of(
    folder: Path,
    *,
    rank: int,
    model: Callable[[], torch.nn.Module] = lstm,
    dataset: Callable[[], Any] = corpus,
    data_collator: Any = None,
    trainer: type[ZOOTrainer] = ZOOTrainer,
    **arguments: Any,
) -> ZOOTrainer:
    defaults = {
        "num_directions": 4,
        "probes": "serial",
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "logging_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    args = ZOOConfig(str(folder / "run"), **defaults | arguments)
    torch.manual_seed(rank)
    made = trainer(model(), args, train_dataset=dataset(), data_collator=data_collator)
    torch.manual_seed(10 + rank)
    return made


@contextmanager
def listening() -> Iterator[list[list[Any]]]:
    """What crosses ranks inside the block: [collective, number of entries, dtype], in order."""
    heard: list[list[Any]] = []
    sum_ = Ranks._sum_
    originals = {name: getattr(torch.distributed, name) for name in COLLECTIVES}

    def recorded(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            tensors = [a for a in args if isinstance(a, Tensor)]
            heard.append([name, tensors[0].numel(), str(tensors[0].dtype)] if tensors else [name, 0, ""])
            return originals[name](*args, **kwargs)

        return call

    def heard_sum_(self: Ranks, numbers: Tensor) -> None:
        heard.append(["all_reduce", numbers.numel(), str(numbers.dtype)])
        sum_(self, numbers)

    Ranks._sum_ = heard_sum_
    for name in COLLECTIVES:
        setattr(torch.distributed, name, recorded(name))
    try:
        yield heard
    finally:
        Ranks._sum_ = sum_
        for name, original in originals.items():
            setattr(torch.distributed, name, original)


def train(case: str, folder: Path, *, rank: int = 0, resume: bool = False, **arguments: Any) -> dict[str, Any]:
    """Final weights, what crossed ranks, loss and world size of one case."""
    trainer, last = trainer_of(folder, rank=rank, **CASES[case] | arguments), LastLoss()
    trainer.add_callback(last)
    with listening() as heard:
        trainer.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-3") if resume else None)
    return {
        "weights": {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()},
        "heard": heard,
        "last_loss": last.value,
        "steps": trainer.state.global_step,
        "forward_passes": trainer.update.forward_passes,
        "tokens": trainer.state.num_input_tokens_seen,
        "bytes": [e["bytes_to_other_ranks"] for e in trainer.state.log_history if "bytes_to_other_ranks" in e],
        "world_size": trainer.accelerator.num_processes,
    }


def main(folder: Path) -> None:
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    results = {case: train(case, folder, rank=rank) for case in (CASES if ranks == 2 else SEVERAL)}
    results["resumed"] = train("central", folder, rank=rank, resume=True)
    torch.save(results, folder / f"rank{rank}.pt")


if __name__ == "__main__":
    from accelerate import PartialState

    PartialState(cpu="--use_cpu" in sys.argv)
    main(Path(sys.argv[1]))
